"""The learning curves of a training as one SVG beside the model, for its card, the Hub and a browser."""

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, fromstring, tostring

from sgpo_cli.report import charts, figures

NAME = "learning_curves.svg"
COLUMNS, GAP, HEAD = 2, 24, 40
# Its own colours: the page that shows it has no say in a picture. The first three are those of report.css.
STYLE = """
.paper { fill: #fdfdfc } text { font: 11px system-ui, sans-serif; fill: #5f6368 }
.title { font-size: 14px; fill: #1c1d1f }
.end { text-anchor: end } .middle { text-anchor: middle } .grid { stroke: #dcdcd8 } .axis { stroke: #5f6368 }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round } .curve.s2 { stroke-dasharray: 6 4 }
.curve.s1 { stroke: #1f6fb4 } .curve.s2 { stroke: #cf5a00 } .dot.s1, .key.s1 { fill: #1f6fb4 }
.dot.s2, .key.s2 { fill: #cf5a00 }
@media (prefers-color-scheme: dark) {
  .paper { fill: #15171a } text { fill: #9aa0a8 } .title { fill: #e3e4e6 } .grid { stroke: #33373d }
  .axis { stroke: #9aa0a8 } .curve.s1 { stroke: #63adea } .curve.s2 { stroke: #f29a52 }
  .dot.s1, .key.s1 { fill: #63adea } .dot.s2, .key.s2 { fill: #f29a52 }
}
"""


def picture(name: str, history: Sequence[Mapping[str, Any]]) -> str:
    """The curves of `name` from a trainer's log history; empty if it holds none."""
    log = [
        {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
        for entry in history
    ]
    panels = figures.learning_curves(name, [entry for entry in log if "step" in entry])
    if not panels:
        return ""
    width, height = charts.WIDTH + GAP, charts.HEIGHT + HEAD + GAP
    rows = math.ceil(len(panels) / COLUMNS)
    svg = charts.canvas(COLUMNS * width + GAP, rows * height + GAP, f"Learning curves of {name}")
    svg.set("xmlns", "http://www.w3.org/2000/svg")
    svg.set("width", f"{COLUMNS * width + GAP}")
    charts.add(svg, "style", text="").text = STYLE
    charts.add(svg, "rect", "paper", width="100%", height="100%")
    for order, panel in enumerate(panels):
        _place(svg, panel, GAP + order % COLUMNS * width, GAP + order // COLUMNS * height)
    return tostring(svg, encoding="unicode") + "\n"


def _place(svg: Element, panel: Mapping[str, Any], x: int, y: int) -> None:
    """One chart below its title, its note or the names of its lines."""
    charts.add(svg, "text", "title", panel["title"], x=x, y=y + 12)
    names = panel["legend"] or [panel["note"]]
    place = x
    for order, name in enumerate(names, 1):
        charts.add(svg, "text", f"key s{order}" if panel["legend"] else "", name, x=place, y=y + 30)
        place += 8 * len(name)
    chart = fromstring(str(panel["svg"]))
    for key, value in (("x", x), ("y", y + HEAD), ("width", charts.WIDTH), ("height", charts.HEIGHT)):
        chart.set(key, str(value))
    svg.append(chart)
