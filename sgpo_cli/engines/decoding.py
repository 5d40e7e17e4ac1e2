"""Token ids in, token ids out: transformers' `generate`, and rows that have ended leave the batch.

`generate` goes on with all rows until the last one has ended, although half of them may have ended half-way.
Here it stops when half of the rows have ended, and goes on with the others and their part of the cache.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper

from sgpo_cli.engines.base import Sampling


class RowSampling(LogitsProcessor):
    """Draws each row's next token with the row's own random numbers, and leaves only that one possible.

    `generate` draws for the whole batch from one global generator, so a text depends on its neighbours;
    here, up to rounding in the model, it depends on its prompt and seed alone. One uniform number per
    token, by inversion of the cumulative distribution.

    Args:
        done: tokens that the rows have already; their numbers are passed over.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], done: int = 0) -> None:
        draws = [np.random.default_rng(seed).random(sampling.max_new_tokens)[done:] for seed in seeds]
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


class HalfEnded(StoppingCriteria):
    """Stops the whole batch when half of its rows have ended; `ended` says which."""

    def __init__(self, rows: int, ends: torch.Tensor) -> None:
        self.ended = torch.zeros(rows, dtype=torch.bool, device=ends.device)
        self._ends = ends

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.BoolTensor:
        self.ended |= torch.isin(input_ids[:, -1], self._ends)
        enough = 2 * self.ended.sum() >= len(self.ended)  # compared on the device: no waiting for it
        return enough.expand(len(self.ended))  # type: ignore[return-value]


@torch.inference_mode()
def decode(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    seeds: Sequence[int],
    ends: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """The new tokens of each row, in order; a row that ended holds its end token, and maybe padding behind it.

    Args:
        ends: tokens that end a text.
    """
    width, made = max(map(len, prompts)), [list[int]()] * len(prompts)
    # Padding is on the left: on the right it gives wrong tokens, with only a warning.
    ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=model.device)
    rows, cache, end_ids = torch.arange(len(prompts)), None, torch.tensor(ends, device=model.device)
    while len(rows):
        done = ids.shape[1] - width
        numbers = [seeds[row] for row in rows.tolist()]
        half = HalfEnded(len(rows), end_ids)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            generation_config=_config(sampling.max_new_tokens - done, ends, pad),
            logits_processor=[RowSampling(sampling, numbers, done)] if sampling.temperature else [],
            stopping_criteria=[half],
            **({_cache_name(model): cache} if cache else {}),
        )
        ids, cache = output.sequences, output.past_key_values
        is_last = ids.shape[1] - width >= sampling.max_new_tokens
        left = torch.zeros_like(half.ended) if is_last else ~half.ended
        for row, tokens in zip(rows[~left.cpu()].tolist(), ids[~left, width:].tolist(), strict=True):
            made[row] = tokens
        rows, ids, mask = rows[left.cpu()], ids[left], mask[left]
        mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
        if cache and len(rows):
            cache.reorder_cache(left.nonzero()[:, 0])
    return made


def _config(max_new_tokens: int, ends: Sequence[int], pad: int) -> GenerationConfig:
    """Every field that matters is set: a checkpoint's own would otherwise decide the temperature."""
    return GenerationConfig(
        do_sample=False,  # what is random is RowSampling's
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends),
        pad_token_id=pad,
        use_cache=True,
        return_dict_in_generate=True,
    )


def _cache_name(model: PreTrainedModel) -> str:
    """What the model calls its cache: state-space models have a name of their own."""
    name = "cache_params"
    return name if name in inspect.signature(model.forward).parameters else "past_key_values"
