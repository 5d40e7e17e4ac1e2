"""How a conversation becomes a request, and a request its identity."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sgpo_cli.engines.base import Message, Sampling
from sgpo_cli.errors import UsageError
from sgpo_cli.remote.asker import Question


class RequestForm:
    """How a conversation becomes a request's body, and the body its identity.

    Args:
        extra: further fields of the body; they win over ours.
        drop: our fields that this server does not take.
        max_tokens_field: what this server calls the limit on new tokens.

    Raises:
        UsageError: a field that makes the request what it is would be changed, or an unknown one dropped.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        extra: Mapping[str, Any] | None = None,
        drop: Sequence[str] = (),
        max_tokens_field: str = "max_tokens",
        reasoning_effort: str | None = None,
    ) -> None:
        ours = ["temperature", "top_p", "seed", "reasoning_effort", max_tokens_field]
        if taken := sorted({"messages", "model", "n", "stream"} & {*(extra or {}), *drop}):
            raise UsageError(f"--extra-body and --drop-params: {taken[0]} is not to be changed", "leave it out")
        if unknown := sorted(set(drop) - set(ours)):
            raise UsageError(f"--drop-params {unknown[0]}: no such field", f"fields: {', '.join(ours)}")
        self._url, self.model, self._extra, self._drop = url, model, dict(extra or {}), set(drop)
        self._max_tokens_field, self._reasoning_effort = max_tokens_field, reasoning_effort

    def body(self, messages: list[Message], sampling: Sampling, seed: int) -> dict[str, Any]:
        """The fields of the request; sampled texts carry their seed, greedy ones have none."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            self._max_tokens_field: sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature:
            fields |= {"top_p": sampling.top_p, "seed": seed % 2**31}  # some servers take 32 bits
        if self._reasoning_effort:
            fields["reasoning_effort"] = self._reasoning_effort
        return {name: value for name, value in fields.items() if name not in self._drop} | self._extra

    def key(self, body: Mapping[str, Any], seed: int, sampled: bool) -> str:
        """The identity of a request: 32 hex digits of address, body and, if it is sampled, sample."""
        content = [self._url, body, seed if sampled else 0]
        text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

    def questions(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> Iterator[Question]:
        """One request per conversation, made when it is asked for."""
        sampled = bool(sampling.temperature)
        for row, (messages, seed) in enumerate(zip(conversations, seeds, strict=True)):
            body = self.body(messages, sampling, seed)
            yield Question(row, self.key(body, seed, sampled), body)
