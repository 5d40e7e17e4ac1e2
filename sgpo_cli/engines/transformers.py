"""Generation with transformers, in this process: rows ordered by length, in batches that fit into memory."""

import gc
import logging
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from sgpo_cli.devices import is_out_of_memory
from sgpo_cli.engines.base import Generation, Message, Sampling
from sgpo_cli.engines.decoding import decode
from sgpo_cli.errors import ResourceError, UsageError
from sgpo_cli.loading import end_tokens, load_model, load_tokenizer, prompt_ids

logger = logging.getLogger(__name__)
BATCH_ROWS = 256  # with more, a small model on a CPU is slower again (benchmarks/generation.py)
MEMORY_SHARE = {"cuda": 0.8, "cpu": 0.5}


class TransformersEngine:
    """A local or Hub model, or a LoRA adapter over one, on the accelerator if there is one.

    `batch_tokens` is what a batch may hold, in tokens: rows times the longest prompt with the longest text.
    When memory runs out it is halved, for as long as the engine lives; `out_of_memory` counts how often.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        chat_template_kwargs: dict[str, Any] | None = None,
        engine_options: dict[str, Any] | None = None,
    ) -> None:
        if engine_options:
            raise UsageError("engine_options are for --engine vllm", "leave them out")
        self._template = chat_template_kwargs or {}
        self._tokenizer = load_tokenizer(model)
        self._model = load_model(model, dtype)
        self._context = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        self._end = end_tokens(self._model.generation_config, self._tokenizer)
        self._model.generation_config = GenerationConfig()  # nothing of the checkpoint's own may leak in
        self._name, self.batch_tokens, self.out_of_memory = model, affordable_tokens(self._model), 0
        logger.info(
            "%s: %s on %s, %s attention, up to %d rows and %d tokens at a time",
            model,
            str(self._model.dtype).removeprefix("torch."),
            self._model.device.type,
            self._model.config._attn_implementation,
            BATCH_ROWS,
            self.batch_tokens,
        )

    def generate(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        prompts = prompt_ids(self._tokenizer, conversations, **self._template)
        made = {row: Generation("", "too_long", len(ids)) for row, ids in enumerate(prompts)}
        # Prompts of a length together need little padding; the longest first, so what does not fit shows at once.
        fitting = (row for row, ids in enumerate(prompts) if len(ids) < self._context)
        waiting = sorted(fitting, key=lambda row: -len(prompts[row]))
        while waiting:
            room = self.batch_tokens // (len(prompts[waiting[0]]) + sampling.max_new_tokens)
            batch = waiting[: min(max(room, 1), BATCH_ROWS)]
            new = self._decode([prompts[row] for row in batch], sampling, [seeds[row] for row in batch])
            if new is None:
                continue
            for row, ids in zip(batch, new, strict=True):
                made[row] = self._read(ids, len(prompts[row]))
            del waiting[: len(batch)]
        return [made[row] for row in range(len(prompts))]

    def _decode(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[list[int]] | None:
        """New tokens per row; None if memory ran out, and smaller batches are to be made from now on.

        Raises:
            ResourceError: it ran out with a single row.
        """
        try:
            return decode(self._model, prompts, sampling, seeds, self._end, int(self._tokenizer.pad_token_id))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        if len(prompts) == 1:
            raise ResourceError(
                f"{self._name}: out of memory with one prompt of {len(prompts[0])} tokens and up to "
                f"{sampling.max_new_tokens} new ones",
                "lower --max-new-tokens, give a smaller number format (--dtype bfloat16), or use a larger machine",
            )
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.out_of_memory += 1
        # Half of what was tried: what is allowed may be far more.
        self.batch_tokens = len(prompts) // 2 * (len(prompts[0]) + sampling.max_new_tokens)
        logger.warning(
            "%s: out of memory with %d rows; from here on %d tokens at a time",
            self._name,
            len(prompts),
            self.batch_tokens,
        )
        return None

    def _read(self, ids: list[int], prompt_tokens: int) -> Generation:
        """The text up to the first end token; rows that end early are padded behind it."""
        length = next((place for place, token in enumerate(ids) if token in self._end), len(ids))
        text = str(self._tokenizer.decode(ids[:length], skip_special_tokens=True))
        ended = length < len(ids)
        return Generation(text, "stop" if ended else "length", prompt_tokens, min(length + 1, len(ids)))


def affordable_tokens(model: PreTrainedModel) -> int:
    """How many tokens memory has room for: their keys and values, and one layer's activations of prompts.

    On a GPU by what is free; on a CPU by what the machine has, so that batches are the same in every run.
    """
    config, itemsize = model.config.get_text_config(), model.dtype.itemsize
    queries = getattr(config, "num_attention_heads", 0)  # a state-space model has none
    heads = getattr(config, "num_key_value_heads", None) or queries
    head_width = getattr(config, "head_dim", None) or config.hidden_size // max(queries, 1)
    cached = 2 * config.num_hidden_layers * heads * head_width
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    activations = 4 * config.hidden_size + 3 * widest
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
    else:
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") - model.get_memory_footprint()
    return max(int(MEMORY_SHARE[model.device.type] * free / (itemsize * (cached + activations))), 1)
