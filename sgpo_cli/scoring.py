"""Log-probabilities of texts under a model: the only tensor code that is ours."""

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sgpo_cli.devices import is_out_of_memory
from sgpo_cli.errors import ResourceError
from sgpo_cli.loading import load_model, load_tokenizer

logger = logging.getLogger(__name__)

Message = dict[str, str]
# Tokens of one forward pass, padding included. On a CPU a small model is fastest while its activations stay in the
# cache: 1.5 s of processor time for a thousand rows of the demo with 1024 or 2048, 1.9 with 8192.
TOKEN_BUDGET = {"cpu": 2048, "cuda": 16384}
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


@dataclass(frozen=True)
class _Sequence:
    """Token ids of a whole conversation, and the place of the first one that counts."""

    ids: list[int]
    start: int


class Scorer:
    """Scores completions under one model.

    Completion tokens are counted as TRL's SFT does: those after the longest common token prefix of the
    rendered prompt and the rendered conversation, so the end-of-turn token belongs to the completion.

    `token_budget` is how many tokens go through the model together; it is halved when memory runs out, and
    `out_of_memory` says how often that was.
    """

    def __init__(self, model: str, dtype: str = "auto", chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self._name = model
        self._template = chat_template_kwargs or {}
        self._tokenizer = load_tokenizer(model)
        self._model = load_model(model, dtype)
        self.token_budget, self.out_of_memory = TOKEN_BUDGET.get(self._model.device.type, TOKEN_BUDGET["cuda"]), 0
        self._plain_head = self._head_gives_logits()

    @torch.inference_mode()
    def _head_gives_logits(self) -> bool:
        """Whether logits are just the output embedding of the hidden states; some models cap or scale them."""
        ids = torch.arange(8, device=self._model.device)[None]
        hidden = self._model.get_decoder()(input_ids=ids)[0]
        made = self._model.get_output_embeddings()(hidden)
        return torch.allclose(made.float(), self._model(input_ids=ids).logits.float(), atol=1e-3, rtol=1e-3)

    def score(self, prompts: Sequence[list[Message]], completions: Sequence[str]) -> list[Score]:
        """One score per pair of prompt and completion; order and batch composition change nothing.

        Rows of similar length go through the model together, the longest first: if memory does not suffice,
        that shows at once.

        Raises:
            ResourceError: memory does not suffice for a single row.
        """
        rows = self._tokenize(prompts, completions)
        left = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
        sums = [0.0] * len(rows)
        while left:
            longest = len(rows[left[-1]].ids)
            part = left[-max(self.token_budget // max(longest, 1), 1) :]
            found = self._sums_or_less([rows[place] for place in part])
            if found is None:
                continue
            for place, log_prob in zip(part, found, strict=True):
                sums[place] = log_prob
            del left[-len(part) :]
        return [Score(log_prob, len(row.ids) - row.start) for log_prob, row in zip(sums, rows, strict=True)]

    def _sums_or_less(self, rows: Sequence[_Sequence]) -> list[float] | None:
        """As `_sums`; None when memory has run out, and the budget is smaller now."""
        try:
            return self._sums(rows)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        longest = max(len(row.ids) for row in rows)
        if len(rows) == 1:
            raise ResourceError(
                f"{self._name}: out of memory with one row of {longest} tokens",
                "give a smaller number format (--dtype bfloat16), or use a larger machine",
            )
        gc.collect()
        if self._model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.token_budget, self.out_of_memory = len(rows) * longest // 2, self.out_of_memory + 1
        logger.warning("%s: out of memory; from here on %d tokens at a time", self._name, self.token_budget)
        return None

    def _tokenize(self, prompts: Sequence[list[Message]], completions: Sequence[str]) -> list[_Sequence]:
        turns = [{"role": "assistant", "content": completion} for completion in completions]
        whole = [[*prompt, turn] for prompt, turn in zip(prompts, turns, strict=True)]
        asked = self._ids(list(prompts), add_generation_prompt=True)
        pairs = zip(asked, self._ids(whole, add_generation_prompt=False), strict=True)
        # The first token of all has no prediction.
        return [_Sequence(full, max(_common_prefix(first, full), min(len(full), 1))) for first, full in pairs]

    def _ids(self, conversations: list[list[Message]], **settings: Any) -> list[list[int]]:
        texts = self._tokenizer.apply_chat_template(conversations, tokenize=False, **settings, **self._template)
        made = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
        return made.input_ids  # type: ignore[no-any-return]

    @torch.inference_mode()
    def _sums(self, rows: Sequence[_Sequence]) -> list[float]:
        """The summed log-probabilities of some rows, by one forward pass.

        Rows are padded on the right, behind all that counts: a causal model needs no mask for that.
        """
        device = self._model.device
        ids = torch.full((len(rows), max(len(row.ids) for row in rows)), self._tokenizer.pad_token_id)
        counts = torch.zeros_like(ids, dtype=torch.bool)
        for number, row in enumerate(rows):
            ids[number, : len(row.ids)] = torch.tensor(row.ids)
            counts[number, row.start : len(row.ids)] = True
        owner, place = counts.nonzero(as_tuple=True)
        targets = ids[owner, place].to(device)
        inputs = {"input_ids": ids.to(device), "use_cache": False}
        if self._plain_head:
            states, head = self._model.get_decoder()(**inputs)[0], self._model.get_output_embeddings()
        else:
            states, head = self._model(**inputs).logits, torch.nn.Identity()
        states = states[owner.to(device), place.to(device) - 1]
        found = _log_probs(states, head, targets, min(CHUNK_TOKENS, self.token_budget))
        return torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, found.double().cpu()).tolist()


def _log_probs(states: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """The log-probability of each target, with logits for `chunk` positions at a time.

    Args:
        states: (positions, width) hidden states, or logits when `head` is the identity.
        targets: (positions,) the tokens that follow.
    """
    found = []
    for some, wanted in zip(states.split(chunk), targets.split(chunk), strict=True):
        logits = head(some).float()
        found.append(torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None])[:, 0])
    return torch.cat(found)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    both = zip(first, second, strict=False)
    return next((place for place, (one, other) in enumerate(both) if one != other), min(len(first), len(second)))
