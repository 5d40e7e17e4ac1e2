"""A comparison as tables, as a chart, and as JSON."""

import io
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from rich.console import Console
from rich.table import Table

from sgpo_cli import pipeline
from sgpo_cli.artifacts import write_atomically
from sgpo_cli.compare.figures import COSTS, Comparison, Method, estimate
from sgpo_cli.compare.seeds import SeedRun
from sgpo_cli.report.charts import Axis, add, canvas, markup, nice_ticks, number, padded
from sgpo_cli.report.lineage import short

FIGURES, CHART = "comparison.json", "comparison.svg"
WIDTH, NAMES, MARGIN = 680, 150, 24  # of the chart
MARK, ROW = 13, 12  # height of a mark, room between rows

Cell = Callable[[Method, str], str]


def lines(compared: Comparison) -> list[str]:
    """Scores, differences and costs as three tables."""
    seeds = f"mean over seeds {', '.join(map(str, compared.seeds))}"
    how = f"{seeds}, ± half of the 95 % interval (Student t)" if len(compared.seeds) > 1 else seeds
    others = [method for method in compared.methods if method.name != compared.against]
    found = _table(f"scores, {how}", compared.methods, compared.answers, score_cell)
    if others:
        title = f"more than {compared.against}, seed by seed"
        found += _table(
            title, others, compared.answers, lambda method, answer: difference_cell(compared, method, answer)
        )
    found += _table("cost of all steps behind a model, mean over seeds", compared.methods, COSTS, cost_cell)
    mixed = [f"{name} {' and '.join(found)}" for name, found in compared.versions.items() if len(found) > 1]
    return found + ([f"steps were made with different versions: {', '.join(mixed)}"] if mixed else [])


def score_cell(method: Method, answer: str) -> str:
    return _estimated(method.score(answer), "")


def difference_cell(compared: Comparison, method: Method, answer: str) -> str:
    return _estimated(compared.differences(method, answer), "+")


def cost_cell(method: Method, name: str) -> str:
    return f"{estimate([costs[name] for costs in method.costs])[0]:,.0f}"


def _estimated(values: Sequence[float] | None, sign: str) -> str:
    if values is None:
        return "-"
    mean, half = estimate(values)
    return f"{mean:{sign}.3f}" + ("" if half is None else f" ± {half:.3f}")


def _table(title: str, methods: Sequence[Method], columns: Sequence[str], cell: Cell) -> list[str]:
    table = Table("model", title=title, title_justify="left")
    for name in columns:
        table.add_column(name.replace("_", " "), justify="right")
    for method in methods:
        table.add_row(method.name, *(cell(method, name) for name in columns))
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    return [line.rstrip() for line in text.getvalue().splitlines()]


def write(compared: Comparison, runs: Sequence[SeedRun]) -> list[Path]:
    """Write comparison.json and comparison.svg beside the seeds' directories; the same runs give the same bytes."""
    directory = runs[0].directory.parent
    figures = {"recipes": _recipes(runs[0]), **as_dict(compared)}
    write_atomically(directory / FIGURES, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    write_atomically(directory / CHART, chart(compared))
    return [directory / FIGURES, directory / CHART]


def _recipes(run: SeedRun) -> list[dict[str, str]]:
    """The recipes as `sgpo run` records them: without what may be secret in their URLs."""
    texts = ((book.path, book.path.read_text(encoding="utf-8")) for book in run.books)
    return [{"path": str(path), "text": pipeline.URL.sub(r"\1\2", text)} for path, text in texts]


def as_dict(compared: Comparison) -> dict[str, Any]:
    """All figures, for each seed and over seeds."""

    def described(values: Sequence[float] | None) -> dict[str, Any] | None:
        if values is None:
            return None
        mean, half = estimate(values)
        ends = None if half is None else [round(mean - half, 6), round(mean + half, 6)]
        per_seed = {str(seed): round(value, 6) for seed, value in zip(compared.seeds, values, strict=True)}
        return {"mean": round(mean, 6), "ci95": ends, "per_seed": per_seed}

    methods = [
        {
            "name": method.name,
            "scores": {answer: described(method.score(answer)) for answer in compared.answers},
            "differences": {answer: described(compared.differences(method, answer)) for answer in compared.answers},
            "cost": {name: described([costs[name] for costs in method.costs]) for name in COSTS},
        }
        for method in compared.methods
    ]
    head = {"seeds": compared.seeds, "against": compared.against, "interval": "Student t over seeds, 95 %"}
    return {**head, "methods": methods, "versions": compared.versions}


def chart(compared: Comparison) -> str:
    """A row for each method, with a mark and its interval for each answer; an SVG file that needs nothing else."""
    found = [(method, answer, estimate(values)) for method, answer, values in _marks(compared)]
    ends = [mean + side * (half or 0) for _, _, (mean, half) in found for side in (-1, 1)]
    x = Axis(*padded(min(ends), max(ends)), NAMES, WIDTH - MARGIN)
    height = len(compared.answers) * MARK + ROW
    bottom = MARGIN + height * len(compared.methods)
    svg = canvas(WIDTH, bottom + 36, "scores of the methods, with 95 % intervals over seeds", "plot")
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    add(svg, "style", text=resources.files("sgpo_cli.report").joinpath("report.css").read_text(encoding="utf-8"))
    add(svg, "rect", x=0, y=0, width=WIDTH, height=bottom + 36, fill="var(--paper)")
    _frame(svg, compared, x, bottom)
    for method, answer, (mean, half) in found:
        order = compared.answers.index(answer)
        y = MARGIN + height * compared.methods.index(method) + ROW / 2 + MARK * (order + 0.5)
        _mark(svg, x, y, mean, half, order + 1)
    for place, method in enumerate(compared.methods):
        middle = MARGIN + height * (place + 0.5)
        add(svg, "text", "end", short(method.name, 20), x=NAMES - 14, y=middle + 4)
    return str(markup(svg)) + "\n"


def _marks(compared: Comparison) -> list[tuple[Method, str, list[float]]]:
    pairs = [(method, answer) for method in compared.methods for answer in compared.answers]
    return [(*pair, values) for pair in pairs if (values := pair[0].score(pair[1])) is not None]


def _frame(svg: Element, compared: Comparison, x: Axis, bottom: int) -> None:
    """Grid, axis, and the legend above."""
    for tick in nice_ticks(x.low, x.high, 6):
        add(svg, "line", "grid", x1=x.place(tick), x2=x.place(tick), y1=MARGIN, y2=bottom)
        add(svg, "text", "tick middle", number(tick), x=x.place(tick), y=bottom + 16)
    add(svg, "line", "axis", x1=x.start, x2=x.end, y1=bottom, y2=bottom)
    add(svg, "text", "label end", "score", x=x.end, y=bottom + 32)
    for order, answer in enumerate(compared.answers, 1):
        left = NAMES + (order - 1) * (WIDTH - NAMES) / max(len(compared.answers), 4)
        add(svg, "circle", f"dot s{order}", cx=left + 4, cy=12, r=4)
        add(svg, "text", "label", answer.replace("_", " "), x=left + 13, y=16)


def _mark(svg: Element, x: Axis, y: float, mean: float, half: float | None, order: int) -> None:
    if half is not None:
        low, high = x.place(mean - half), x.place(mean + half)
        add(svg, "line", f"curve s{order}", x1=low, x2=high, y1=y, y2=y)
        for end in (low, high):
            add(svg, "line", f"curve s{order}", x1=end, x2=end, y1=y - 3, y2=y + 3)
    add(svg, "circle", f"dot s{order}", cx=x.place(mean), cy=y, r=3.5)
