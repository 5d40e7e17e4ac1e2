"""The rows of several data sets as one sequence, such as the pairs of several rounds."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain

from sgpo_cli.rows import BadRow, Row, Rows
from sgpo_cli.sliced import Sliced


class JoinedRows(Sliced[Row]):
    """Rows one data set after another.

    Data sets may have ids in common: the pairs of two rounds can be about the same prompts. So the id of a row of the
    second data set ends with `@2`, and so on; two rows never have the same id.
    """

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.rejected: list[BadRow] = list(chain.from_iterable(part.rejected for part in parts))
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __iter__(self) -> Iterator[Row]:
        for number, part in enumerate(self._parts, start=1):
            yield from (_numbered(row, number) for row in part)

    def item(self, position: int) -> Row:
        number = next(number for number, end in enumerate(self._ends) if position < end)
        before = self._ends[number - 1] if number else 0
        return _numbered(self._parts[number][position - before], number + 1)


def _numbered(row: Row, number: int) -> Row:
    return row | {"id": f"{row['id']}@{number}"}
