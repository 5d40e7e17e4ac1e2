"""Checks of the rows before training: lengths, beginnings and ends, as the trainer will see them."""

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from sgpo_cli.errors import UsageError

logger = logging.getLogger(__name__)

Row = dict[str, Any]
CHUNK = 1000  # rows that are tokenized together; fast tokenizers use all cores then
TAIL = 4  # tokens; behind the end-of-turn token a template may still print a line break
ENDED_SHARE = 0.95


@dataclass(frozen=True)
class RowTokens:
    """What is checked of a row: tokens of the prompt, of the prompt with its longest answer, of that answer."""

    prompt: int
    total: int
    ended: bool
    """Whether every answer ends with a token that ends a turn."""
    begins: int
    """How many BOS tokens the row has."""


def tokenize(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], ends: Collection[int], template: dict[str, Any]
) -> Iterator[RowTokens]:
    """The tokens of each row with prompt and completion, or prompt, chosen and rejected.

    Args:
        ends: tokens that end a turn.
        template: settings of the chat template.
    """
    answers = [name for name in ("completion", "chosen", "rejected") if name in rows[0]]
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id != tokenizer.eos_token_id else None
    for start in range(0, len(rows), CHUNK):
        chunk = rows[start : start + CHUNK]
        prompts = _ids(tokenizer, [row["prompt"] for row in chunk], add_generation_prompt=True, **template)
        columns = [_ids(tokenizer, [row["prompt"] + row[name] for row in chunk], **template) for name in answers]
        for prompt, *whole in zip(prompts, *columns, strict=True):
            ended = all(any(token in ends for token in ids[-TAIL:]) for ids in whole)
            begins = max(ids.count(bos) for ids in whole) if bos is not None else 0
            yield RowTokens(len(prompt), max(map(len, whole)), ended, begins)


def _ids(tokenizer: PreTrainedTokenizerBase, conversations: list[Any], **template: Any) -> list[list[int]]:
    texts = tokenizer.apply_chat_template(conversations, tokenize=False, **template)
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False).input_ids
    return ids


def check_ends(rows: Sequence[RowTokens], ends: Sequence[str], model: str) -> float:
    """The share of rows whose answers end with a token that ends a turn.

    Raises:
        UsageError: it is below 95 %; a model trained so would never stop.
    """
    share = sum(row.ended for row in rows) / len(rows)
    if share < ENDED_SHARE:
        raise UsageError(
            f"{model}: only {share:.0%} of the answers end with a token that ends generation ({', '.join(ends)}); "
            "the model would not learn to stop",
            "the chat template closes a turn with another token: name it with --eos-token, for example "
            "--eos-token '<|im_end|>'",
        )
    return share


def check_beginnings(rows: Sequence[RowTokens], tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Exactly one BOS in each row if the tokenizer starts texts with one, else at most one.

    Raises:
        UsageError: with what the template should say.
    """
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.eos_token_id:
        return
    wanted = tokenizer("a").input_ids[:1] == [bos]
    for number, row in enumerate(rows):
        if row.begins > 1 or (wanted and row.begins == 0):
            raise UsageError(
                f"{model}: row {number} has {row.begins} times the token {tokenizer.bos_token} that starts a text",
                f"{'exactly' if wanted else 'at most'} one is right; correct the chat template",
            )


@dataclass(frozen=True)
class Lengths:
    """How the rows fit in `max_length` tokens."""

    rows: int
    longest: int
    cut: int
    dropped: int
    max_length: int | None

    def __str__(self) -> str:
        limit = f"max_length {self.max_length}" if self.max_length else "no max_length"
        return (
            f"{self.rows} rows, longest {self.longest} tokens, {limit}: "
            f"{self.cut} cut ({self.cut / self.rows:.1%}), {self.dropped} dropped ({self.dropped / self.rows:.1%})"
        )


def check_lengths(rows: Sequence[RowTokens], max_length: int | None, max_share: float) -> Lengths:
    """Count what TRL will cut or drop without a word.

    Raises:
        UsageError: more than `max_share` of the rows would be cut or dropped.
    """
    longest = max(row.total for row in rows)
    limit = max_length or longest
    dropped = sum(row.prompt >= limit for row in rows)
    cut = sum(row.total > limit for row in rows) - dropped
    found = Lengths(len(rows), longest, cut, dropped, max_length)
    logger.info("%s", found)
    if cut + dropped > max_share * len(rows) or dropped == len(rows):
        raise UsageError(
            f"max_length {max_length}: {cut} of {len(rows)} rows would be cut, {dropped} dropped; the longest "
            f"has {found.longest} tokens",
            "raise --max-length, shorten the rows, or allow more with --max-truncated-share",
        )
    return found


def show_examples(tokenizer: PreTrainedTokenizerBase, rows: Any, count: int = 3) -> None:
    """Print decoded training rows, with the tokens that carry a label, as the trainer will see them."""
    for number in range(min(count, len(rows))):
        row = rows[number]
        if "labels" in row:
            labels = [token for token in row["labels"] if token != -100]
            logger.debug("example %d: %r", number, tokenizer.decode(row["input_ids"]))
            logger.debug("  trained on: %r", tokenizer.convert_ids_to_tokens(labels))
        else:
            logger.debug("example %d: %r", number, tokenizer.decode(row["prompt_ids"]))
            logger.debug("  chosen:   %r", tokenizer.decode(row["chosen_ids"]))
            logger.debug("  rejected: %r", tokenizer.decode(row["rejected_ids"]))
