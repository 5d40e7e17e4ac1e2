"""Texts for all rows, pass by pass: each pass is kept as it is made, and continues where it was stopped.

A local engine works in batches of fixed membership, journaled batch by batch. A server is asked for many
rows at a time, and each answer is kept by the content of its request.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self, TypeVar

from sgpo_cli.batches import Batches, Row, derive_seed
from sgpo_cli.engines import Engine, Generation, LazyEngine, Sampling, token_counts
from sgpo_cli.engines.base import AsksServer, FitsMemory, Message
from sgpo_cli.progress import stopwatch
from sgpo_cli.ranks import SharedWorkDone
from sgpo_cli.remote.paid import Paid
from sgpo_cli.sliced import Sliced
from sgpo_cli.step import Step

T = TypeVar("T")


class Lazy(Sliced[T]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, length: int, make: Callable[[int], T]) -> None:
        self._length, self._make = length, make

    def __len__(self) -> int:
        return self._length

    def item(self, position: int) -> T:
        return self._make(position)

    def __iter__(self) -> Iterator[T]:
        return map(self._make, range(self._length))


def seeds_for(rows: Sequence[Row], seed: int, *parts: object) -> Sequence[int]:
    """A seed per row for one purpose: it stays the row's own when the data set grows or is reordered."""
    return Lazy(len(rows), lambda place: derive_seed(seed, *parts, rows[place]["id"]))


class Passes:
    """The passes of a step.

    Args:
        size: rows of a batch for local engines.
    """

    def __init__(self, step: Step, size: int) -> None:
        self._step, self._size = step, size
        self._open = ExitStack()
        self._paid: Paid | None = None
        self._local: dict[str, Texts] = {}
        self._asked: dict[str, Any] = {}
        self._sampling: dict[str, Any] = {}

    @property
    def stats(self) -> dict[str, Any]:
        """What the passes took and cost, all ranks together, and how each sampled; for the main one."""
        added: dict[str, Any] = {}
        reduced: dict[str, int] = {}
        for name, texts in self._local.items():
            for key, value in texts.stats().items():
                added[key] = round(added.get(key, 0) + value, 3)
            if (tokens := texts.reduced_to()) is not None:
                reduced[name] = tokens
        batches = {"batch_tokens": reduced} if reduced else {}
        return {**added, **batches, "sampling": self._sampling, **self._asked}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def generate(
        self,
        name: str,
        engine: Engine | AsksServer,
        conversations: Sequence[list[Message]],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> Sequence[Generation]:
        """A text per conversation, read from disk when it is asked for."""
        self._sampling[name] = asdict(sampling)
        if isinstance(engine, AsksServer):
            if not self._step.rank.is_main:
                raise SharedWorkDone  # many requests at a time need one process only
            asked = engine.ask_all(self.paid(), conversations, sampling, seeds, self._label(name))
            self._asked[name] = asked.facts
            return asked.texts
        return self._in_batches(name, engine, conversations, sampling, seeds)

    def paid(self) -> Paid:
        """The log of paid answers of this step, opened once."""
        if self._paid is None:
            self._paid = self._open.enter_context(Paid(self._step.directory))
        return self._paid

    def _label(self, name: str) -> str:
        return f"{self._step.request.stage}, {name}"

    def _in_batches(
        self,
        name: str,
        engine: Engine,
        conversations: Sequence[list[Message]],
        sampling: Sampling,
        seeds: Sequence[int],
    ) -> Sequence[Generation]:
        total, size = len(conversations), self._size

        def do(number: int) -> dict[str, Any]:
            rows = slice(number * size, (number + 1) * size)
            loaded = engine.load() if isinstance(engine, LazyEngine) else engine  # not on the clock of generation
            before = loaded.out_of_memory if isinstance(loaded, FitsMemory) else 0
            seconds: dict[str, float] = {}
            with stopwatch(seconds, "generation_seconds"):
                made = loaded.generate(conversations[rows], sampling, seeds[rows])
            stats, reduced = seconds | token_counts(made), {}
            if isinstance(loaded, FitsMemory) and loaded.out_of_memory:
                stats["out_of_memory"] = loaded.out_of_memory - before
                reduced = {"batch_tokens": loaded.batch_tokens}
            return {"texts": [_packed(text) for text in made], "stats": stats, **reduced}

        batches = Batches(self._step, name, total, size, do)
        self._open.callback(batches.close)
        batches.work(self._label(name))
        texts = Texts(batches, total, size)
        self._local[name] = texts
        return texts


class Texts(Sliced[Generation]):
    """The texts of a pass, a batch of them in memory; another rank's are waited for when they are asked for."""

    def __init__(self, batches: Batches, length: int, size: int) -> None:
        self._batches, self._length, self._size = batches, length, size
        self._number, self._batch = -1, list[Generation]()

    def __len__(self) -> int:
        return self._length

    def stats(self) -> dict[str, float]:
        """Seconds and tokens, added up over the batches."""
        added: dict[str, float] = {}
        for number in range(-(-self._length // self._size)):
            for name, value in self._batches.record(number)["stats"].items():
                added[name] = added.get(name, 0) + value
        return added

    def reduced_to(self) -> int | None:
        """The tokens of a batch after the last time that memory ran out; None if it never did."""
        records = map(self._batches.record, range(-(-self._length // self._size)))
        return min((record["batch_tokens"] for record in records if "batch_tokens" in record), default=None)

    def item(self, position: int) -> Generation:
        number, offset = divmod(position, self._size)
        if number != self._number:
            self._batch = [Generation(*packed) for packed in self._batches.record(number)["texts"]]
            self._number = number
        return self._batch[offset]


def _packed(text: Generation) -> tuple[Any, ...]:
    return text.text, text.finish_reason, text.prompt_tokens, text.completion_tokens
