"""Log-probabilities of texts under a model: the only tensor code that is ours."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgpo_cli.loading import load_model, load_tokenizer, template_ids

Message = dict[str, str]
CHUNK_TOKENS = 1024  # positions whose logits exist at the same time: 0.6 GB in fp32 at 150k vocabulary


@dataclass(frozen=True)
class Score:
    """Sum of the log-probabilities (natural log) of a text's tokens, end of turn included."""

    log_prob: float
    tokens: int

    @property
    def log_ppl(self) -> float:
        """Log-perplexity: minus the mean log-probability per token; NaN for a text without tokens."""
        return -self.log_prob / self.tokens if self.tokens else math.nan


class Scorer:
    """Scores completions under one model.

    Completion tokens are counted as TRL's SFT does: those after the longest common token prefix of the
    rendered prompt and the rendered conversation, so the end-of-turn token belongs to the completion.
    """

    def __init__(self, model: str, dtype: str = "auto", chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self._template = chat_template_kwargs or {}
        self._tokenizer = load_tokenizer(model)
        self._model = load_model(model, dtype)
        self._plain_head = self._head_gives_logits()

    @torch.inference_mode()
    def _head_gives_logits(self) -> bool:
        """Whether logits are just the output embedding of the hidden states; some models cap or scale them."""
        ids = torch.arange(8, device=self._model.device)[None]
        hidden = self._model.get_decoder()(input_ids=ids)[0]
        made = self._model.get_output_embeddings()(hidden)
        return torch.allclose(made.float(), self._model(input_ids=ids).logits.float(), atol=1e-3, rtol=1e-3)

    @torch.inference_mode()
    def score(self, prompts: Sequence[list[Message]], completions: Sequence[str]) -> list[Score]:
        """One score per pair of prompt and completion; order and batch composition change nothing."""
        pairs = [self._tokens(*pair) for pair in zip(prompts, completions, strict=True)]
        longest = max(len(ids) for ids, _ in pairs)
        ids = torch.full((len(pairs), longest), self._tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, (tokens, _) in enumerate(pairs):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        inputs = {"input_ids": ids.to(self._model.device), "attention_mask": mask.to(self._model.device)}
        if self._plain_head:
            states, head = self._model.get_decoder()(**inputs)[0], self._model.get_output_embeddings()
        else:
            states, head = self._model(**inputs).logits, torch.nn.Identity()
        return [_row_score(states[row], head, tokens, start) for row, (tokens, start) in enumerate(pairs)]

    def _tokens(self, prompt: list[Message], completion: str) -> tuple[list[int], int]:
        """Token ids of the whole conversation, and where the completion starts."""
        asked = template_ids(self._tokenizer, prompt, prompt=True, **self._template)
        turn = {"role": "assistant", "content": completion}
        full = template_ids(self._tokenizer, [*prompt, turn], prompt=False, **self._template)
        both = zip(asked, full, strict=False)
        common = next((place for place, (one, other) in enumerate(both) if one != other), min(len(asked), len(full)))
        return full, common


def _row_score(states: torch.Tensor, head: torch.nn.Module, tokens: list[int], start: int) -> Score:
    """The score of one row, with logits for a chunk of positions at a time.

    Args:
        states: (length, width) hidden states, or logits when `head` is the identity.
        start: index of the first token that counts; the first of all has no prediction.
    """
    total = 0.0
    for begin in range(max(start, 1), len(tokens), CHUNK_TOKENS):
        end = min(begin + CHUNK_TOKENS, len(tokens))
        logits = head(states[begin - 1 : end - 1]).float()
        targets = torch.tensor(tokens[begin:end], device=logits.device)
        total += torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).double().sum().item()
    return Score(total, len(tokens) - max(start, 1))
