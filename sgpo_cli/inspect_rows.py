"""Shows rows of a step in the terminal, with what differs between their texts.

What the rows hold is data: it reaches the terminal as plain text, with control characters escaped.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
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
    """Print the chosen rows of a step, and how many there are.

    Raises:
        UsageError: no such directory, a step that has not finished, or no row has the id or reason.
        IntegrityError: the rows are not what the step wrote.
    """
    kept, dropped = rows_files(directory)
    paths = [kept, dropped] if choice.ids else [dropped if choice.rejects or choice.reason else kept]
    number = 0
    for row in _chosen(paths, choice):
        _show(row, console)
        number += 1
    if not number and (choice.ids or choice.reason):
        raise UsageError(f"{visible(str(directory))}: {_nothing(paths[-1], choice)}")
    total = sum(map(count_rows, paths))
    names = " and ".join(visible(str(path)) for path in paths)
    console.print(Text(f"{number} of {total} rows of {names}", style="dim"), soft_wrap=True)


def rows_files(directory: Path) -> tuple[Path, Path]:
    """The rows that were kept and those that were dropped, compared with the step's manifest first."""
    name = visible(str(directory))
    if not directory.is_dir():
        raise UsageError(f"{name}: no such directory", "name a step's directory, as runs/demo/pairs")
    step = step_of(directory)
    if step is not None and not (step / MANIFEST).exists():
        raise UsageError(
            f"{visible(str(step))}: this step has not finished; its rows appear when it has",
            "run it again if it is not running; it continues where it stopped",
        )
    kept, dropped = (directory / file for file in DATA_FILES)
    if not kept.exists():
        inside = sorted(found.parent.name for found in directory.glob(f"*/{DATA_FILES[0]}"))
        raise UsageError(
            f"{name}: no {DATA_FILES[0]} here",
            f"look into one of {', '.join(map(visible, inside))}" if inside else "a training step keeps no rows",
        )
    if step is not None:
        verify(step, under=kept)
        verify(step, under=dropped)
    return kept, dropped


def _chosen(paths: Sequence[Path], choice: Choice) -> Iterator[Row]:
    if choice.sample:
        yield from sampled(paths[0], choice.sample, choice.seed)
        return
    rows = chain.from_iterable(lines(path) for path in paths if path.exists())
    if choice.ids:
        wanted = set(choice.ids)
        yield from (row for row in rows if str(row.get("id")) in wanted)
    elif choice.reason:
        yield from islice((row for row in rows if row.get("reason") == choice.reason), choice.limit)
    else:
        yield from islice(rows, choice.limit)


def _nothing(dropped: Path, choice: Choice) -> str:
    if choice.ids:
        return f"no row with the id {', '.join(map(shown, choice.ids))}"
    reasons = Counter(str(row.get("reason")) for row in (lines(dropped) if dropped.exists() else ()))
    known = ", ".join(f"{visible(name)} ({count})" for name, count in reasons.most_common())
    return f"no row was dropped as {shown(choice.reason)}; " + (
        f"the reasons are {known}" if known else "none was at all"
    )


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
        margin = Text().append((name if number == 0 else "").ljust(label), "dim")
        console.print(margin + line, soft_wrap=True)
