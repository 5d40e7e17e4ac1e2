"""Shows rows of a step in the terminal, with what differs between their texts.

What the rows hold is data: it reaches the terminal as plain text, with control characters escaped.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from sgpo_cli.artifacts import DATA_FILES, MANIFEST, step_of, verify
from sgpo_cli.comparison import Segment, differences, plain, sides
from sgpo_cli.errors import UsageError
from sgpo_cli.measures import edit_share, length_ratio
from sgpo_cli.quality import count_rows, lines, sampled
from sgpo_cli.readers.strict import shown, visible

Row = dict[str, Any]
MARKS = {-1: ("[-", "-]", "red strike"), 1: ("{+", "+}", "bold green")}  # the signs of wdiff, where there is no colour
HEAD = ("id", "reason")
NARROWEST = 20


@dataclass(frozen=True)
class Choice:
    """Which rows to show: the first `limit`, or a sample, or those with these ids; kept or dropped ones."""

    limit: int = 10
    sample: int | None = None
    seed: int = 1
    ids: Sequence[str] = ()
    rejects: bool = False
    reason: str | None = None


def show(directory: Path, choice: Choice, console: Console) -> None:
    """Print the chosen rows of a step.

    Raises:
        UsageError: no such directory, a step that has not finished, or no row fits.
        IntegrityError: the rows are not what the step wrote.
    """
    path = rows_file(directory, choice)
    rows = list(_chosen(path, choice))
    if not rows:
        raise UsageError(f"{path}: {_nothing(path, choice)}")
    for row in rows:
        _show(row, console)
    total = count_rows(path)
    console.print(Text(f"{len(rows)} of {total} rows of {visible(str(path))}", style="dim"), soft_wrap=True)


def rows_file(directory: Path, choice: Choice) -> Path:
    """The file to read, compared with the step's manifest first."""
    if not directory.is_dir():
        raise UsageError(
            f"{visible(str(directory))}: no such directory", "name a step's directory, as runs/demo/pairs"
        )
    path = directory / DATA_FILES[1 if choice.rejects or choice.reason else 0]
    step = step_of(directory)
    if step is not None and not (step / MANIFEST).exists():
        raise UsageError(
            f"{visible(str(step))}: this step has not finished; its rows appear when it has",
            "run it again if it is not running; it continues where it stopped",
        )
    if not path.exists():
        what = "no rejected rows here" if path.name == DATA_FILES[1] else f"no {DATA_FILES[0]} here"
        inside = sorted(found.parent.name for found in directory.glob(f"*/{DATA_FILES[0]}"))
        raise UsageError(
            f"{visible(str(directory))}: {what}",
            f"look into one of {', '.join(map(visible, inside))}" if inside else "a training step keeps no rows",
        )
    if step is not None:
        verify(step, under=path)
    return path


def _chosen(path: Path, choice: Choice) -> Iterator[Row]:
    if choice.ids:
        wanted = set(choice.ids)
        yield from (row for row in lines(path) if str(row.get("id")) in wanted)
    elif choice.reason:
        yield from islice((row for row in lines(path) if row.get("reason") == choice.reason), choice.limit)
    elif choice.sample:
        yield from sampled(path, choice.sample, choice.seed)
    else:
        yield from islice(lines(path), choice.limit)


def _nothing(path: Path, choice: Choice) -> str:
    if choice.ids:
        return f"no row with the id {', '.join(map(shown, choice.ids))}"
    reasons = Counter(str(row.get("reason")) for row in lines(path))
    if choice.reason and reasons:
        known = ", ".join(f"{visible(name)} ({count})" for name, count in reasons.most_common())
        return f"no row was dropped as {shown(choice.reason)}; the reasons are {known}"
    return "there are no rows"


def _show(row: Row, console: Console) -> None:
    """One row: its id, its texts side by side with their names, its numbers."""
    head = [visible(str(row[name])) for name in HEAD if name in row]
    console.print(Text(" · ".join(head), style="bold"), soft_wrap=True)
    texts = {name: value for name, value in row.items() if name not in HEAD and isinstance(value, str | list)}
    segments = _segments(row, texts)
    label = max(map(len, map(visible, segments)), default=0) + 2
    for name, found in segments.items():
        _block(visible(name), _text(found, marks=not console.color_system), label, console)
    if line := _facts(row, [name for name in row if name not in HEAD and name not in texts]):
        _block("", Text(line, style="dim"), label, console)
    console.print()


def _segments(row: Row, texts: dict[str, Any]) -> dict[str, list[Segment]]:
    """The columns in reading order; the two that are compared stand last."""
    pair = sides(row)
    names = [name for name in texts if name not in (pair or ())]
    names.sort(key=lambda name: name != "prompt")
    segments = {name: [(0, plain(texts[name]))] for name in names}
    if pair:
        found = differences(*(plain(texts[name]) for name in pair))
        for name, side in zip(pair, (-1, 1), strict=True):
            segments[name] = [each for each in found if each[0] in (0, side)]
    return segments


def _text(segments: list[Segment], *, marks: bool) -> Text:
    text = Text()
    for kind, part in segments:
        words = part.strip()
        if not kind or not words:
            text.append(visible(part))
            continue
        before, after, style = MARKS[kind]
        space, _, more = part.partition(words)
        text.append(visible(space))
        text.append(f"{before}{visible(words)}{after}" if marks else visible(words), style)
        text.append(visible(more))
    return text


def _facts(row: Row, names: Sequence[str]) -> str:
    """The row's numbers, and how far the compared texts are apart."""
    facts = [f"{visible(name)} {_number(row[name])}" for name in names if row[name] is not None]
    if pair := sides(row):
        old, new = (plain(row[name]) for name in pair)
        facts += [f"{edit_share(old, new):.0%} of the words changed", f"{length_ratio(old, new):.2f} times as long"]
    return " · ".join(facts)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else visible(str(value))


def _block(name: str, text: Text, label: int, console: Console) -> None:
    """A text with its name in the margin; wrapped in a terminal, as it is in a file or pipe."""
    width = max(console.width - label, NARROWEST)
    lines = text.wrap(console, width) if console.is_terminal else text.split("\n", allow_blank=True)
    for number, line in enumerate(lines or [Text()]):
        line.rstrip()
        margin = Text((name if number == 0 else "").ljust(label), style="dim")
        console.print(margin + line, soft_wrap=True)
