"""Generation with transformers' `generate`, in this process.

Padding is on the left and every sampling field is set here: right padding gives wrong tokens with only a
warning, and a checkpoint's generation_config would otherwise decide the temperature.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from sgpo_cli.engines.base import Generation, Message, Sampling
from sgpo_cli.errors import UsageError
from sgpo_cli.loading import end_tokens, load_model, load_tokenizer, prompt_ids


class RowSampling(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and leaves only that one possible.

    `generate` draws for the whole batch from one global generator, so a text depends on its neighbours;
    here, up to rounding in the model, it depends on its prompt and seed alone. One uniform number per
    token, by inversion of the cumulative distribution.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int]) -> None:
        draws = [np.random.default_rng(seed).random(sampling.max_new_tokens) for seed in seeds]
        self._draws = iter(torch.from_numpy(np.stack(draws, axis=1)))
        self._warpers: list[Any] = []
        if sampling.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Scores [rows, vocabulary] in; the same shape out, 0 for the drawn token and -inf for the others."""
        for warper in self._warpers:
            scores = warper(input_ids, scores)
        cumulative = scores.float().softmax(-1).cumsum(-1)
        total = cumulative[:, -1:]
        draw = next(self._draws).to(total)[:, None] * total
        # Below the total even where rounding met it: a token beyond it has no probability.
        draw = torch.minimum(draw, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, draw, right=True)
        return torch.full_like(scores, -math.inf).scatter(-1, token, 0.0)  # type: ignore[return-value]


class TransformersEngine:
    """A local or Hub model, on the accelerator if there is one."""

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

    def generate(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        prompts = prompt_ids(self._tokenizer, conversations, **self._template)
        fitting = [number for number, ids in enumerate(prompts) if len(ids) < self._context]
        made = iter(self._generate([prompts[n] for n in fitting], sampling, [seeds[n] for n in fitting]))
        return [next(made) if len(ids) < self._context else Generation("", "too_long", len(ids)) for ids in prompts]

    def _generate(self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]) -> list[Generation]:
        if not prompts:
            return []
        inputs = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        inputs = inputs.to(self._model.device)
        with torch.inference_mode():
            output = self._model.generate(  # type: ignore[operator]
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                generation_config=self._config(sampling),
                logits_processor=LogitsProcessorList([RowSampling(sampling, seeds)] if sampling.temperature else []),
            )
        new = output[:, inputs.input_ids.shape[1] :].tolist()
        return [self._read(ids, len(prompt)) for ids, prompt in zip(new, prompts, strict=True)]

    def _config(self, sampling: Sampling) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,  # what is random is RowSampling's
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=self._end,
            pad_token_id=self._tokenizer.pad_token_id,
            use_cache=True,
        )

    def _read(self, ids: list[int], prompt_tokens: int) -> Generation:
        """The text up to the first end token; rows that end early are padded behind it."""
        length = next((place for place, token in enumerate(ids) if token in self._end), len(ids))
        text = str(self._tokenizer.decode(ids[:length], skip_special_tokens=True))
        ended = length < len(ids)
        return Generation(text, "stop" if ended else "length", prompt_tokens, min(length + 1, len(ids)))
