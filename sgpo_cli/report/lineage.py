"""The drawing of what was built from what: steps from top to bottom, an arc from each source to each user."""

from xml.etree.ElementTree import Element

from markupsafe import Markup

from sgpo_cli.report.charts import add, canvas, markup
from sgpo_cli.report.collect import StepFacts

ROW, TOP = 46, 24
REACH = 76  # of the widest arc
TEXT = REACH + 23
WIDTH = 384
LETTERS = 46  # of a line of sources


def draw(steps: list[StepFacts]) -> Markup:
    """Models solid, data dashed."""
    svg = canvas(WIDTH, TOP + ROW * len(steps) - 8, "lineage of the steps", "chart lineage")
    rows = {step.name: number for number, step in enumerate(steps)}
    for step in steps:
        for source in step.sources:
            if source.step in rows:
                _arc(
                    svg,
                    rows[source.step or ""],
                    rows[step.name],
                    source.kind,
                    f"{source.label} → {step.name}",
                    len(steps),
                )
    for number, step in enumerate(steps):
        _step(svg, number, step)
    return markup(svg)


def _arc(svg: Element, start: int, end: int, kind: str, title: str, steps: int) -> None:
    """Wider the further it goes; data a little inside of models, so that no two arcs lie on each other."""
    top, bottom, x = TOP + ROW * start, TOP + ROW * end, REACH + 8
    reach = REACH * ((end - start) / max(steps - 1, 1)) ** 0.6 * 1.28 + (0 if kind == "model" else -7)
    path = f"M{x} {top}C{x - reach:g} {top} {x - reach:g} {bottom} {x} {bottom}"
    add(add(svg, "path", f"arc {kind}", d=path), "title", text=title)


def _step(svg: Element, number: int, step: StepFacts) -> None:
    y = TOP + ROW * number
    trained = step.stage in ("sft", "train-improver", "dpo")
    add(svg, "circle", "node model" if trained else "node data", cx=REACH + 8, cy=y, r=5)
    line = add(svg, "text", "", x=TEXT, y=y + 1)
    add(line, "tspan", "name", short(step.name, 28))
    add(line, "tspan", "stage", f"  {step.stage}" + ("" if step.manifest else " · not finished"))
    text = "from " + " + ".join(source.label for source in step.sources) if step.sources else "reads nothing"
    below = add(svg, "text", "stage", short(text, LETTERS), x=TEXT, y=y + 16)
    add(below, "title", text=text)


def short(text: str, letters: int) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"
