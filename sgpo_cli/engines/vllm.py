"""Generation with vLLM's offline engine, in this process.

Token ids in, token ids out: the chat template, the end tokens and the decoding are those of the transformers
engine, and every sampling field is set here, so vLLM's own reading of a checkpoint's tokenizer and
generation_config decides nothing.
"""

import atexit
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import ValidationError
from transformers import AutoConfig
from transformers.utils.peft_utils import find_adapter_config_file
from vllm import LLM, RequestOutput, SamplingParams
from vllm.config.lora import MaxLoRARanks
from vllm.lora.request import LoRARequest
from vllm.platforms import current_platform

from sgpo_cli.artifacts import read_json
from sgpo_cli.devices import own_devices
from sgpo_cli.engines.base import Generation, Message, Sampling
from sgpo_cli.errors import ResourceError, UsageError
from sgpo_cli.loading import end_tokens, generation_config, load_tokenizer, prompt_ids, refusals


class VllmEngine:
    """A local or Hub model, or a LoRA adapter over one, on the GPUs of this process.

    Args:
        engine_options: any argument of vLLM's engine, such as `tensor_parallel_size`,
            `gpu_memory_utilization`, `max_model_len`.

    Raises:
        UsageError: vLLM refuses the model or an option.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        _prepare_process((engine_options or {}).get("tensor_parallel_size", 1))
        self._template = chat_template_kwargs or {}
        self._tokenizer = load_tokenizer(model)
        with refusals(model):
            adapter = find_adapter_config_file(model)
            settings = read_json(Path(adapter)) if adapter else {}
            base = str(settings.get("base_model_name_or_path", model))
            self._end = end_tokens(generation_config(base), self._tokenizer)
            options = _defaults() | (_for_adapter(model, settings) if adapter else {}) | (engine_options or {})
            self._adapter = LoRARequest("adapter", 1, model) if adapter else None
            try:
                self._llm = LLM(model=base, dtype=_dtype(base, dtype), **OURS, **options)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                place = "".join(f"{name}: " for name in problem["loc"])
                raise UsageError(f"{model}: vLLM refuses: {place}{problem['msg']}") from error
            if self._adapter:
                self._llm.llm_engine.add_lora(self._adapter)  # what it cannot load is refused now
        self._context: int = self._llm.model_config.max_model_len
        # Workers (tensor parallel) end with this engine, and before the interpreter's own clean-up kills them.
        atexit.register(weakref.finalize(self, self._llm.llm_engine.engine_core.shutdown))

    def generate(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        prompts = prompt_ids(self._tokenizer, conversations, **self._template)
        pairs = [pair for pair in zip(prompts, seeds, strict=True) if len(pair[0]) < self._context]
        made = iter(
            self._llm.generate(
                [{"prompt_token_ids": ids} for ids, _ in pairs],
                [self._parameters(sampling, seed) for _, seed in pairs],
                lora_request=self._adapter,
                use_tqdm=False,
            )
            if pairs
            else []
        )
        return [
            self._read(next(made)) if len(ids) < self._context else Generation("", "too_long", len(ids))
            for ids in prompts
        ]

    def _parameters(self, sampling: Sampling, seed: int) -> SamplingParams:
        greedy = sampling.temperature == 0
        return SamplingParams(
            n=1,
            temperature=sampling.temperature,
            top_p=1.0 if greedy else sampling.top_p,
            top_k=0,
            min_p=0.0,
            repetition_penalty=1.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            seed=None if greedy else seed,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=self._end,
            ignore_eos=True,  # what ends a text is `stop_token_ids`, the same as in the transformers engine
            detokenize=False,
        )

    def _read(self, output: RequestOutput) -> Generation:
        """The text up to its end token."""
        made = output.outputs[0]
        if made.finish_reason not in ("stop", "length"):
            raise ResourceError(f"vLLM gave up a text ({made.finish_reason})", "run the same command again")
        ids = list(made.token_ids)
        ended = bool(ids) and ids[-1] in self._end
        text = str(self._tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True))
        return Generation(text, "stop" if ended else "length", len(output.prompt_token_ids or ()), len(ids))


OURS = {
    "generation_config": "vllm",  # not the checkpoint's
    "trust_remote_code": False,
    "load_format": "safetensors",
    "use_tqdm_on_load": False,
}


def _defaults() -> dict[str, Any]:
    """What `engine_options` may change."""
    options = {"enable_prefix_caching": True}  # the improver's prompt begins with the policy's
    if current_platform.is_cpu():
        # vLLM 0.32 rewinds the generator of a request whose prompt was computed in part, which torch cannot do
        # on a CPU: with seeds, prompts must be computed whole.
        options["enable_chunked_prefill"] = False
    return options


def _for_adapter(model: str, settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's options for a PEFT adapter.

    Raises:
        UsageError: not LoRA, or a rank beyond what vLLM has.
    """
    if settings.get("peft_type") != "LORA":
        raise UsageError(f"{model}: vLLM only takes LoRA adapters, not {settings.get('peft_type')}", MERGE)
    rank = max([settings["r"], *(settings.get("rank_pattern") or {}).values()])
    fitting = [size for size in sorted(get_args(MaxLoRARanks)) if size >= rank]
    if not fitting:
        raise UsageError(f"{model}: a LoRA rank of {rank}; vLLM has at most {max(get_args(MaxLoRARanks))}", MERGE)
    return {"enable_lora": True, "max_loras": 1, "max_lora_rank": fitting[0]}


MERGE = "merge the adapter into its base model"


def _dtype(model: str, dtype: str) -> str:
    """The checkpoint's own number format for "auto", where vLLM would make 16 bits of 32."""
    own = AutoConfig.from_pretrained(model, trust_remote_code=False).dtype if dtype == "auto" else None
    return dtype if own is None else str(own).removeprefix("torch.")


def _prepare_process(devices: int) -> None:
    """What vLLM reads from the environment when an engine is made.

    Args:
        devices: how many GPUs the engine will use.

    Raises:
        UsageError: fewer GPUs than the ranks of this machine need.
    """
    # No engine process besides this one: it could outlive a kill -9, and errors would come without their reason.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    rank = os.environ.get("LOCAL_RANK")
    if rank is not None and current_platform.is_cuda_alike():
        variable = current_platform.device_control_env_var
        visible = os.environ.get(variable) or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ[variable] = own_devices(visible, int(rank), devices)
