"""Generation with transformers' `generate`, in this process.

Padding is on the left and every sampling field is set here: right padding gives wrong tokens with only a
warning, and a checkpoint's generation_config would otherwise decide the temperature.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig

from sgpo_cli.engines.base import Generation, Message, Sampling
from sgpo_cli.loading import end_tokens, load_model, load_tokenizer


class TransformersEngine:
    """A local or Hub model, on the accelerator if there is one."""

    def __init__(self, model: str, dtype: str = "auto", chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self._template = chat_template_kwargs or {}
        self._tokenizer = load_tokenizer(model)
        self._model = load_model(model, dtype)
        self._context = getattr(self._model.config, "max_position_embeddings", None) or math.inf
        self._end = end_tokens(self._model, self._tokenizer)
        self._model.generation_config = GenerationConfig()  # nothing of the checkpoint's own may leak in

    def generate(self, conversations: Sequence[list[Message]], sampling: Sampling) -> list[Generation]:
        texts = self._tokenizer.apply_chat_template(
            list(conversations), tokenize=False, add_generation_prompt=True, **self._template
        )
        prompts: list[list[int]] = self._tokenizer(texts, add_special_tokens=False).input_ids
        fitting = [ids for ids in prompts if len(ids) < self._context]
        made = iter(self._generate(fitting, sampling) if fitting else [])
        return [next(made) if len(ids) < self._context else Generation("", "too_long", len(ids)) for ids in prompts]

    def _generate(self, prompts: list[list[int]], sampling: Sampling) -> list[Generation]:
        inputs = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self._model.device)
        torch.manual_seed(sampling.seed)  # `generate` has no generator argument
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                generation_config=self._config(sampling),
            )
        new = output[:, inputs.input_ids.shape[1] :].tolist()
        return [self._read(ids, len(prompt)) for ids, prompt in zip(new, prompts, strict=True)]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        greedy = sampling.temperature == 0
        chosen = {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        return GenerationConfig(
            do_sample=not greedy,
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._end,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
            **chosen,
        )

    def _read(self, ids: list[int], prompt_tokens: int) -> Generation:
        """The text up to the first end token; rows that end early are padded behind it."""
        length = next((place for place, token in enumerate(ids) if token in self._end), len(ids))
        text = str(self._tokenizer.decode(ids[:length], skip_special_tokens=True))
        ended = length < len(ids)
        return Generation(text, "stop" if ended else "length", prompt_tokens, min(length + 1, len(ids)))
