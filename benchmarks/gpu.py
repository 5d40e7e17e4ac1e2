"""A 7B model on a GPU: what generation, scoring and training reach of the card, and whether memory is as stated.

    python benchmarks/gpu.py --work runs/bench-gpu      # on one NVIDIA card
    python benchmarks/gpu.py --parts training --trainings sft-lora-1024 dpo-lora-1024
    python benchmarks/gpu.py --shape tiny --rounds 1    # anywhere: whether this file works

The model has Qwen2.5-7B's shape, random weights in bf16 and the demo's tokenizer; it is made once, in `--work` (15 GB;
a full training needs 31 GB more for a while). After each part and training, figures go to `benchmarks/gpu.json` (or
`--output`, an absolute path without .json); a later call on the same card adds to them. None are committed: no GPU was
at hand. `peak_share` is of the card's dense bf16 operations, two for each parameter and token; null: card not known.

generation  New tokens per second at temperature 1, as many for each row (by chance `ours` ends one in as many tokens
            as the vocabulary has; those made count). `ours` gets rows as from a stage, `plain` is `generate()` in
            input order with fixed batches, `continuous` is `generate_batch()`. Each has the card for itself in its
            turn: it loads, warms up with the longest rows, and is timed once. Turns alternate, medians count; `times`
            is ours over it, by round. `bandwidth_share`: bytes of the weights for each forward pass (embeddings are
            only looked up), and of keys and values before each new token, per second, over the card's bandwidth; it
            is missing where passes cannot be counted, as with CUDA graphs.
scoring     Tokens per second of filter-ppl's scorer, prompts included and padding not.
training    `sgpo sft` and `sgpo dpo` as processes, to their end; rows exactly as long as stated. Tokens per second:
            `num_tokens` of training_log.json from the first to the last step, over the time between the logs of these
            two by the process's clock. Each step is logged, and a log has the loss, so it waits for the card. `mfu`:
            6 operations (full) or 4 (LoRA) per parameter and token; what checkpointing repeats does not count, and
            DPO's reference is done before the first step, as by default on a GPU. `peak_gib`: max_memory_allocated up
            to the last step (without a GPU: the process). `estimated_gib`: as --dry-run states it, CUDA's context and
            fragmentation included; a card with less skips the training.
"""

import argparse
import gc
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig, Qwen2Config

from sgpo_cli import checks, cli, memory
from sgpo_cli.artifacts import write_lines
from sgpo_cli.demo.model import build_base
from sgpo_cli.engines import Sampling, open_engine
from sgpo_cli.engines.transformers import BATCH_ROWS
from sgpo_cli.loading import load_model, load_tokenizer, prompt_ids, template_ids
from sgpo_cli.scoring import Scorer
from sgpo_cli.training_plan import PEAK

# Terabytes per second, from the maker's data sheets; the first name that is in the card's.
BANDWIDTH = {"H200": 4.8, "H100 80GB": 3.35, "A100-SXM4-80GB": 2.04, "L40S": 0.864, "4090": 1.008, "3090": 0.936}
WIDTHS = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SHAPES = {"7b": (152_064, 3584, 18_944, 28, 28, 4), "tiny": (2048, 64, 128, 2, 4, 2)}
ROWS = {"7b": 512, "tiny": 12}  # 512: what stages hand over at a time
MEDIAN, LONGEST, NEW_TOKENS = 200, 1024, 128  # tokens of a prompt or a scored answer; of a new text
PLAIN_BATCH, STEPS = 64, 6  # a step has two batches of two sequences
PARTS = ("generation", "scoring", "training")
ANSWERS = {"sft": ["completion"], "dpo": ["chosen", "rejected"]}
TRAININGS = [f"{stage}-{how}-{length}" for length in (1024, 2048) for how in ("lora", "full") for stage in ANSWERS]
Figures = dict[str, Any]
Conversation = list[dict[str, str]]
Run = Callable[[list[Conversation], int], int]  # rows and the new tokens of each in; how many were made out


class Texts:
    """Random words of one token each, so that lengths are exact; no two begin alike, which a cache would know."""

    def __init__(self, model: str) -> None:
        self._dice, self._tokenizer = random.Random(1), load_tokenizer(model)
        words = (token.replace("Ġ", " ") for token in sorted(self._tokenizer.get_vocab()) if token.startswith("Ġ"))
        self._words = [word for word in words if word[1:].isalpha() and len(self._tokenizer(word).input_ids) == 1]

    def say(self, tokens: int | None = None) -> str:
        """Of so many tokens, or of a length drawn: mostly short, a few as long as may be."""
        drawn = min(max(int(MEDIAN * self._dice.lognormvariate(0, 0.7)), 8), LONGEST)
        return "".join(self._dice.choices(self._words, k=tokens or drawn))

    def count(self, prompt: str, answer: str) -> int:
        answered = {"role": "assistant", "content": answer}
        return len(template_ids(self._tokenizer, [*asked(prompt), answered], prompt=False))


def asked(prompt: str) -> Conversation:
    return [{"role": "user", "content": prompt}]


def build(directory: Path, shape: str) -> str:
    """The model's path; it is made, on the device, if it is not there."""
    if not (directory / "model").exists():
        build_base(temporary := directory / "model.tmp", [str(__doc__)] * 9, seed=1)
        # No end token here, so `plain` and `continuous` have none; ours has the tokenizer's.
        config = Qwen2Config(**dict(zip(WIDTHS, SHAPES[shape], strict=True)), max_position_embeddings=32_768)
        torch.manual_seed(1)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(temporary)
        temporary.rename(directory / "model")  # what has this name is whole
    return str(directory / "model")


def card() -> Figures:
    """Name, memory in bytes, and bandwidth (bytes) and peak (operations) per second; None where unknown."""
    if not torch.cuda.is_available():
        return dict.fromkeys(("name", "memory", "bandwidth", "peak"))
    properties = torch.cuda.get_device_properties(0)
    bandwidth = next((1e12 * value for key, value in BANDWIDTH.items() if key in properties.name), None)
    peak = next((value for key, value in PEAK.items() if key in properties.name), None)
    return {"name": properties.name, "memory": properties.total_memory, "bandwidth": bandwidth, "peak": peak}


def ours(path: str) -> tuple[Any, Run]:
    engine: Any = open_engine("transformers", path)

    def run(rows: list[Conversation], new: int) -> int:
        return sum(text.completion_tokens for text in engine.generate(rows, Sampling(new), range(len(rows))))

    return engine._model, run


def plain(path: str) -> tuple[Any, Run]:
    model, tokenizer = load_model(path), load_tokenizer(path)

    def run(rows: list[Conversation], new: int) -> int:
        sampled = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new, pad_token_id=tokenizer.pad_token_id)
        for start in range(0, len(rows), PLAIN_BATCH):
            ids = {"input_ids": prompt_ids(tokenizer, rows[start : start + PLAIN_BATCH])}
            inputs = tokenizer.pad(ids, padding_side="left", return_tensors="pt").to(model.device)
            model.generate(**inputs, generation_config=sampled).tolist()
        return new * len(rows)

    return model, run


def continuous(path: str) -> tuple[Any, Run]:
    """With room for as many rows as ours has in a batch; left to itself, it takes most of the memory."""
    model, tokenizer = load_model(path), load_tokenizer(path)

    def run(rows: list[Conversation], new: int) -> int:
        ids, at_once = prompt_ids(tokenizer, rows), min(len(rows), BATCH_ROWS)
        blocks = at_once * ((max(map(len, ids)) + new) // 256 + 1)
        sizes = {"page_size": 256, "num_blocks": blocks, "max_batch_tokens": 2048, "max_requests_per_batch": at_once}
        config = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=new)  # a new one: it is changed
        texts = model.generate_batch(ids, config, ContinuousBatchingConfig(**sizes))
        if len(texts) < len(rows) or any(text.error for text in texts.values()):
            raise RuntimeError("generate_batch has lost rows; what it said is above")
        return sum(len(text.generated_tokens) for text in texts.values())

    return model, run


def turn(load: Callable[[str], tuple[Any, Run]], path: str, rows: list[Conversation], gpu: Figures) -> Figures:
    """Load, warm up, and all rows once."""
    gc.collect()
    torch.cuda.empty_cache()  # the last one's; each has the whole card
    model, run = load(path)
    passes: list[None] = []
    model.register_forward_pre_hook(lambda *_: passes.append(None))
    run(sorted(rows, key=lambda row: -len(row[0]["content"]))[:8], 8)
    passes.clear()
    started = time.perf_counter()
    made = run(rows, NEW_TOKENS)
    seconds, config = time.perf_counter() - started, model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    before = statistics.mean(map(len, prompt_ids(load_tokenizer(path), rows))) + NEW_TOKENS / 2
    weights = model.num_parameters() - model.get_input_embeddings().weight.numel()
    read = 2 * (len(passes) * weights + made * before * 2 * config.num_hidden_layers * width)
    bandwidth, peak = gpu["bandwidth"] if len(passes) >= NEW_TOKENS else None, gpu["peak"]
    return {
        "tokens_per_second": made / seconds,
        "forward_passes": len(passes),
        "bandwidth_share": read / seconds / bandwidth if bandwidth else None,
        "peak_share": 2 * model.num_parameters() * made / seconds / peak if peak else None,
    }


def generation(path: str, gpu: Figures, size: int, rounds: int) -> Figures:
    """All contenders; one that fails takes part in no further round, and the others go on."""
    texts, found = Texts(path), dict[str, Figures]()
    rows = [asked(texts.say()) for _ in range(size)]
    contenders = {"ours": ours, "plain": plain, "continuous": continuous}
    turns: dict[str, list[Figures]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in sorted(turns.keys() - found.keys(), reverse=bool(number % 2)):
            try:
                turns[name].append(turn(contenders[name], path, rows, gpu))
            except Exception as error:
                found[name] = {"failed": f"{type(error).__name__}: {error}"}
            print(f"generation, {name}:", found.get(name) or turns[name][-1], flush=True)
    for name in turns.keys() - found.keys():
        known = {what for what, value in turns[name][0].items() if value is not None}
        found[name] = {what: statistics.median(each[what] for each in turns[name]) for what in sorted(known)}
        pairs = zip(turns["ours"], turns[name], strict=False)
        times = [one["tokens_per_second"] / other["tokens_per_second"] for one, other in pairs]
        found[name] |= {"times": statistics.median(times) if times else None, "rounds": turns[name]}
    return found


def scoring(path: str, gpu: Figures, size: int, rounds: int) -> Figures:
    texts, scorer, rates = Texts(path), Scorer(path), []
    prompts, answers = [texts.say() for _ in range(size)], [texts.say() for _ in range(size)]
    tokens, parameters = sum(map(texts.count, prompts, answers)), memory.Shape.of(path).parameters
    for _ in range(rounds + 1):
        started = time.perf_counter()
        scorer.score(list(map(asked, prompts)), answers)
        rates.append(tokens / (time.perf_counter() - started))
    rate = statistics.median(rates[1:])  # the first warms up
    peak_share = 2 * parameters * rate / gpu["peak"] if gpu["peak"] else None
    return {"tokens_per_second": rate, "peak_share": peak_share, "rounds": rates[1:]}


def child() -> None:
    """A command of ours, which notes the clock and the peak of the card's memory (or its own) with each log."""
    report, notes = Path(sys.argv[2]), list[tuple[int, float, int]]()

    class Noting(checks.LogProgress):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            super().on_log(args, state, control, logs, **kwargs)
            if "loss" in (logs or {}):
                peak = torch.cuda.max_memory_allocated() or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                notes.append((state.global_step, time.perf_counter(), peak))
                report.write_text(json.dumps(notes))

    checks.LogProgress = Noting  # type: ignore[misc]
    sys.argv = ["sgpo", *sys.argv[3:]]
    cli.main()


def training(case: str, path: str, gpu: Figures, work: Path) -> Figures:
    """What one training reached, on rows made for it, or why there is nothing."""
    stage, method, length = case.split("-")
    texts, shape, answers, prompt = Texts(path), memory.Shape.of(path), ANSWERS[stage], int(length) // 8
    load = memory.Load(2, int(length), checkpointing=True, reference=False, half_weights=True)
    estimate = memory.total_bytes(shape, method, load)
    found: Figures = {"estimated_gib": estimate / 2**30}
    if gpu["memory"] and estimate > gpu["memory"]:
        return found | {"skipped": f"the card has {gpu['memory'] / 2**30:.1f} GiB"}
    sizes = {"prompt": prompt} | dict.fromkeys(answers, int(length) - prompt - texts.count("", ""))
    rows, output, notes = (work / f"{case}{suffix}" for suffix in (".jsonl", "", ".json"))
    write_lines(rows, ({name: texts.say(k) for name, k in sizes.items()} for _ in range(4 * STEPS // len(answers))))
    shutil.rmtree(output, ignore_errors=True)
    options = {"model-name-or-path": path, "dataset": rows, "output-dir": output, "max-length": length}
    options |= {"per-device-train-batch-size": 2 // len(answers), "gradient-accumulation-steps": 2}
    options |= {"max-steps": STEPS, "logging-steps": 1, "save-strategy": "no"}
    command = [sys.executable, __file__, "--child", notes, stage, "--activation-checkpointing"]
    command += ["--use-peft"] * (method == "lora") + ["--precompute-ref-log-probs"] * (stage == "dpo")
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    with (work / f"{case}.log").open("w+") as log:
        if subprocess.run(list(map(str, command)), stdout=log, stderr=log).returncode:
            log.seek(0)
            return found | {"failed": log.read().splitlines()[-3:]}
    logged = json.loads((output / "training_log.json").read_text())
    shutil.rmtree(output)  # of a full training, 15 GB
    tokens = {entry["step"]: entry["num_tokens"] for entry in logged if "num_tokens" in entry}
    (first, started, _), *_, (last, ended, peak) = json.loads(notes.read_text())
    rate = (tokens[last] - tokens[first]) / (ended - started)
    useful = memory.training_flops(shape, method, replace(load, checkpointing=False), rate, 1, once=True)
    found |= {"tokens_per_second": rate, "mfu": useful / gpu["peak"] if gpu["peak"] else None}
    return found | {"peak_gib": peak / 2**30, "estimated_over_peak": estimate / peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=TRAININGS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("runs/bench-gpu"))
    parser.add_argument("--output", help="without it, figures of the tiny shape are only printed")
    arguments = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one card: a training starts a process for each it sees
    shape, gpu = arguments.shape, card()
    if shape == "7b" and gpu["name"] is None:
        raise SystemExit("no GPU is visible; --shape tiny runs anywhere")
    work, output = arguments.work.resolve() / shape, arguments.output or ("gpu" if shape == "7b" else None)
    path, file = build(work, shape), machine.HERE / f"{output}.json"
    before = json.loads(file.read_text()) if file.exists() else {}
    results = before["results"] if (before.get("gpu"), before.get("shape")) == (gpu, shape) else {}
    cases = {"generation": ["generation"], "scoring": ["scoring"], "training": arguments.trainings}
    for case in (case for part in arguments.parts for case in cases[part]):
        gc.collect()
        torch.cuda.empty_cache()
        if case in TRAININGS:
            results[case] = training(case, path, gpu, work)
        else:
            results[case] = (generation if case == "generation" else scoring)(path, gpu, ROWS[shape], arguments.rounds)
        print(f"{case}: {results[case]}", flush=True)
        if output:
            machine.write(output, {"gpu": gpu, "shape": shape, "results": results})


if __name__ == "__main__":
    child() if sys.argv[1:2] == ["--child"] else main()
