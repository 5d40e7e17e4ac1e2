"""What was paid for: answers by the content of their requests, and what they cost.

The key is a digest of the whole request (address, model, messages, parameters, sample), so rows may be
added, removed or reordered and no answer is bought twice, and another prompt template never meets old
answers. The log lies in the step's directory and stays when the step is done; an output that replaces another
(`NAME.old-1` ...) takes over a copy of its log.
"""

import logging
import shutil
from array import array
from bisect import bisect_left
from dataclasses import asdict, replace
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from sgpo_cli.errors import IntegrityError
from sgpo_cli.journal import Log, decode, read_records
from sgpo_cli.remote.answer import Answer
from sgpo_cli.remote.budget import Prices

logger = logging.getLogger(__name__)
DIRECTORY = "paid"
INDEX_EVERY = 50_000  # keys in a set take a hundred bytes, in the index sixteen


def number_of(key: str) -> int:
    """The first 64 bits of a key: enough to find it by, and small."""
    return int(key[:16], 16)


class Paid:
    """The log, with 24 bytes of memory for an answer.

    A context manager; `add` needs the lock of the step.
    """

    def __init__(self, step_directory: Path, rank: int = 0) -> None:
        self._directory = step_directory
        self._own = step_directory / DIRECTORY / f"rank-{rank:04d}.jsonl"
        self._files: list[BufferedReader] = []
        self._keys, self._places, self._sources = array("Q"), array("Q"), array("I")
        self._recent: set[int] = set()
        self._usage = {False: [0, 0, 0], True: [0, 0, 0]}  # by whether it came as a batch

    def __enter__(self) -> Self:
        self._take_over()
        self._own.parent.mkdir(exist_ok=True)
        self._own.touch()
        for path in sorted(self._own.parent.glob("rank-*.jsonl")):
            for offset, _, record in read_records(path, mend=path == self._own, damaged=self._warn):
                self._count(record)
                if record["key"] is not None:
                    self._note(number_of(record["key"]), offset, len(self._files))
            self._files.append(path.open("rb"))
        self._log = Log(self._own)
        self._log_source = next(n for n, file in enumerate(self._files) if file.name == str(self._own))
        self.index()
        return self

    def _take_over(self) -> None:
        """Copy the log of the newest earlier output, which has those before it."""
        if self._own.parent.exists():
            return
        prefix = self._directory.name + ".old-"
        siblings = [path for path in self._directory.parent.iterdir() if path.name.startswith(prefix)]
        numbered = {
            int(path.name.removeprefix(prefix)): path for path in siblings if path.name[len(prefix) :].isdigit()
        }
        for number in sorted(numbered, reverse=True):
            if (earlier := numbered[number] / DIRECTORY).is_dir():
                copy = self._own.parent.with_name(DIRECTORY + ".tmp")
                shutil.copytree(earlier, copy)
                copy.rename(self._own.parent)
                return

    @staticmethod
    def _warn(place: str) -> None:
        logger.warning("%s: damaged and passed over; if it is an answer that is needed, it is asked for again", place)

    def _note(self, number: int, offset: int, source: int) -> None:
        self._keys.append(number)
        self._places.append(offset)
        self._sources.append(source)

    def _count(self, record: dict[str, Any]) -> None:
        usage = self._usage[record["batch"]]
        for place, name in enumerate(("prompt_tokens", "completion_tokens", "cached_tokens")):
            usage[place] += record[name]

    @property
    def tokens(self) -> int:
        """Of all answers that were ever paid for here, prompts and answers together."""
        return sum(prompt + completion for prompt, completion, _ in self._usage.values())

    def cost(self, prices: Prices) -> float:
        """Of all answers that were ever paid for here, at these prices."""
        return sum(prices.cost(*usage, batch=batch) for batch, usage in self._usage.items())

    def index(self) -> None:
        """Make the answers added so far findable."""
        import numpy as np

        keys = np.frombuffer(self._keys, dtype=np.uint64) if self._keys else np.zeros(0, np.uint64)
        order = np.argsort(keys, kind="stable")  # of answers to the same request, the first counts
        self._order = array("Q", order.astype(np.uint64).tobytes())
        self._sorted = array("Q", keys[order].tobytes())
        self._recent = {number for number in self._recent if self.find(number) is None}

    def claim(self, number: int) -> bool:
        """Whether this request is neither answered nor asked for yet; from now on it is."""
        if number in self._recent or self.find(number) is not None:
            return False
        self._recent.add(number)
        if len(self._recent) >= INDEX_EVERY:
            self.index()
        return True

    def find(self, number: int) -> int | None:
        """The place of the answer to a request, or None; knows what was there at the last `index()`."""
        place = bisect_left(self._sorted, number)
        if place == len(self._sorted) or self._sorted[place] != number:
            return None
        return self._order[place]

    def read(self, place: int) -> Answer:
        """An answer from disk.

        Raises:
            IntegrityError: the log changed while it was in use.
        """
        file = self._files[self._sources[place]]
        file.seek(self._places[place])
        record = decode(file.readline())
        if record is None:
            raise IntegrityError(f"{file.name}: record at byte {self._places[place]} changed while it was in use")
        return Answer(**{name: value for name, value in record.items() if name not in ("key", "batch")})

    def add(self, key: str | None, answer: Answer, *, batch: bool = False) -> None:
        """Keep an answer; without a key only what it cost: it was useless, but is on the bill."""
        text = answer.text if key is not None else ""
        record = {"key": key, **asdict(replace(answer, text=text)), "batch": batch}
        offset = self._log.append(record)
        self._count(record)
        if key is not None:
            self._note(number_of(key), offset, self._log_source)

    def __len__(self) -> int:
        return len(self._keys)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.close()
        for file in self._files:
            file.close()
