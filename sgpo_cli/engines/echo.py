"""An engine without a model: a deterministic answer made from the question. For tests of everything else."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

from sgpo_cli.engines.base import Generation, Message, Sampling


class EchoEngine:
    """Answers with the last words it was given, and a word that depends on the seed unless greedy."""

    def __init__(self, model: str, **settings: Any) -> None:
        self._model = model

    def generate(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        return [self._answer(messages, sampling, seed) for messages, seed in zip(conversations, seeds, strict=True)]

    def _answer(self, messages: list[Message], sampling: Sampling, seed: int) -> Generation:
        words = [word for message in messages for word in message["content"].split()]
        draw = str(seed) if sampling.temperature else ""
        word = hashlib.sha256(f"{draw}:{' '.join(words)}".encode()).hexdigest()[:6]
        answer = [word, *words[-8:]]
        cut = answer[: sampling.max_new_tokens]
        reason: Literal["stop", "length"] = "length" if len(cut) < len(answer) else "stop"
        return Generation(" ".join(cut), reason, len(words), len(cut))
