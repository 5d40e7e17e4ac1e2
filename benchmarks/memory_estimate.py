"""The memory that `--dry-run` states for a training, against trainings that were measured tensor by tensor.

    python benchmarks/memory_estimate.py

TRL's own trainer trains small models of the proportions of large ones for two optimizer steps of two batches each,
in bf16 on the processor. Every tensor is counted from its making to its end. Three things are done as on a GPU: the
optimizer is the fused one, dropout keeps a mask of one byte (`native_dropout`), and what TRL's kernel of the output
head does inside one kernel there counts for nothing here. Kernels' own workspaces, CUDA's context and fragmentation
are not in it. Writes `benchmarks/memory_estimate.json`.
"""

import argparse
import itertools
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import machine
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast, PrinterCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.kernels import chunked_logprob
from trl.trainer import utils

from sgpo_cli import memory

MIB = 2**20
VOCABULARY = 2000
TILE = 1024  # of the vocabulary in a piece of the logits: as small as the models are
KINDS = ("llama", "qwen2", "qwen3")
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Case:
    """A training to measure: a model of `kind`, so wide and deep, and batches of so many sequences of so many tokens.

    `tied`: the head's weights are the embeddings. `half`: frozen weights are in bf16. `stage`: "sft" or "dpo".
    """

    kind: str
    method: str
    checkpointing: bool
    hidden: int = 256
    intermediate: int = 768
    layers: int = 6
    heads: int = 8
    groups: int = 2
    sequences: int = 2
    tokens: int = 192
    tied: bool = False
    half: bool = True
    stage: str = "sft"

    @property
    def half_weights(self) -> bool:
        return self.half and self.method != "full"

    def config(self) -> Any:
        return AutoConfig.for_model(
            self.kind,
            vocab_size=VOCABULARY,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.hidden // self.heads,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )


class Meter(TorchDispatchMode):
    """Bytes of the tensors that live, and the most there ever were since `peak` was last set."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.paused = False

    def count(self, tensor: Any) -> None:
        if self.paused or not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.bytes += storage.nbytes()
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._ended, key).atexit = False

    def _ended(self, key: int) -> None:
        self.bytes -= self.alive.pop(key)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            self.count(leaf)
        return result

    def inside_a_kernel(self, function: Callable[..., None]) -> Callable[..., None]:
        """`function`, whose tensors are registers on a GPU."""

        def run(*args: Any, **kwargs: Any) -> None:
            self.paused = True
            try:
                function(*args, **kwargs)
            finally:
                self.paused = False

        return run


@contextmanager
def _as_on_a_gpu(meter: Meter) -> Iterator[None]:
    def dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p else x

    functions = {
        name: meter.inside_a_kernel(getattr(chunked_logprob, name))
        for name in ("_forward_tile", "_backward_tile", "_addmm_fp32")
    }
    with (
        mock.patch.multiple(chunked_logprob, **functions),
        mock.patch.object(torch.nn.functional, "dropout", dropout),
        mock.patch.object(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TILE),
    ):
        yield


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "<unknown>", *(f"w{number}" for number in range(3, VOCABULARY))]
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


def _rows(case: Case) -> list[dict[str, Any]]:
    """Enough for four batches; every second sequence is one token shorter than the longest, and padded."""
    ids = torch.randint(3, VOCABULARY, (case.tokens,)).tolist()
    if case.stage == "sft":
        return [{"input_ids": ids[: case.tokens - number % 2]} for number in range(4 * case.sequences)]
    words = [f" w{number}" for number in ids[:-1]]  # TRL ends them
    pair = {"prompt": "".join(words[:9]), "chosen": "".join(words[9:]), "rejected": "".join(words[9:-1])}
    return [pair] * (2 * case.sequences)


def trainer(case: Case, directory: Path) -> SFTTrainer | DPOTrainer:
    """TRL's trainer of a new model that is saved in the directory."""
    torch.manual_seed(1)
    dtype = torch.bfloat16 if case.half_weights else torch.float32
    AutoModelForCausalLM.from_config(case.config(), dtype=dtype).save_pretrained(directory)
    options = {
        "output_dir": str(directory / "out"),
        "model_init_kwargs": {"dtype": str(dtype).removeprefix("torch.")},
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "bf16": True,
        "use_cpu": True,
        "activation_checkpointing": case.checkpointing,
        "optim": "adamw_torch_fused",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": None,
    }
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    adapter = LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = {
        "train_dataset": Dataset.from_list(_rows(case)),
        "processing_class": _tokenizer(),
        "quantization_config": four_bits if case.method == "qlora" else None,
        "peft_config": adapter if case.method != "full" else None,
    }
    if case.stage == "sft":
        config = SFTConfig(per_device_train_batch_size=case.sequences, **options)
        return SFTTrainer(str(directory), args=config, **arguments)
    pairs = DPOConfig(per_device_train_batch_size=case.sequences // 2, precompute_ref_log_probs=True, **options)
    return DPOTrainer(str(directory), args=pairs, **arguments)


def measure(case: Case) -> int:
    """The most bytes that lived at once in a training."""
    meter = Meter()
    with tempfile.TemporaryDirectory() as directory:
        trained = trainer(case, Path(directory))
        trained.remove_callback(PrinterCallback)
        trained.get_train_dataloader()  # DPO's reference
        for tensor in itertools.chain(trained.model.parameters(), trained.model.buffers()):
            meter.count(tensor)
            for constants in vars(tensor.quant_state).values() if hasattr(tensor, "quant_state") else ():
                meter.count(constants)
        with _as_on_a_gpu(meter), meter:
            trained.train()
    return meter.peak


def estimate(case: Case) -> tuple[float, float]:
    """States and the rest as `sgpo_cli.memory` has them, without its allowances for fragmentation and CUDA."""
    load = memory.Load(
        case.sequences,
        case.tokens,
        case.checkpointing,
        reference=False,
        half_weights=case.half_weights,
        dropout=case.stage == "sft",
    )
    with mock.patch.object(memory, "TILE_VOCABULARY", TILE):
        shape = memory.Shape.from_config(case.config())
        return memory.state_bytes(shape, case.method, load), memory.activation_bytes(shape, case.method, load)


def compare(case: Case) -> dict[str, Any]:
    """A row of the table."""
    measured, (states, rest) = measure(case), estimate(case)
    return {
        **asdict(case),
        "measured_mib": round(measured / MIB, 1),
        "estimated_mib": round((states + rest) / MIB, 1),
        "ratio": round((states + rest) / measured, 3),
        "ratio_beyond_states": round(rest / (measured - states), 3),
    }


def cases() -> list[Case]:
    """Each kind and method with and without checkpointing; then other sizes, lengths, number formats and DPO."""
    small = [Case(*three) for three in itertools.product(KINDS, METHODS, (False, True))]
    wide = {"hidden": 512, "intermediate": 1792, "layers": 4}
    long = {"layers": 3, "sequences": 1, "tokens": 1024}
    many = {"hidden": 384, "heads": 6, "intermediate": 1024, "layers": 3, "sequences": 4}
    others = [
        Case(kind, method, checkpointing, **sizes)
        for kind, sizes in (("llama", wide), ("qwen3", long), ("qwen2", many))
        for method, checkpointing in itertools.product(METHODS, (False, True))
    ]
    tied = [Case("qwen2", "full", checkpointing, tied=True) for checkpointing in (False, True)]
    unhalved = [Case("llama", "lora", checkpointing, half=False) for checkpointing in (False, True)]
    pairs = [Case("llama", method, False, stage="dpo") for method in METHODS]
    return [*small, *others, *tied, *unhalved, *pairs]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("kind   method ckpt stage  width layers batch    measured estimated  ratio, beyond states")
    for case in cases():
        row = compare(case)
        rows.append(row)
        print(
            f"{case.kind:<6} {case.method:<6} {'yes' if case.checkpointing else 'no':<4} {case.stage:<5} "
            f"{case.hidden:>6} {case.layers:>6} {case.sequences} x {case.tokens:<4} {row['measured_mib']:>6.1f} MiB "
            f"{row['estimated_mib']:>6.1f} MiB {row['ratio']:>5.3f} {row['ratio_beyond_states']:>8.3f}",
            flush=True,
        )
    ratios = {name: [row[name] for row in rows] for name in ("ratio", "ratio_beyond_states")}
    ranges = {name: [min(values), max(values)] for name, values in ratios.items()}
    print(ranges)
    machine.write("memory_estimate", {"ranges": ranges, "cases": rows})


if __name__ == "__main__":
    main()
