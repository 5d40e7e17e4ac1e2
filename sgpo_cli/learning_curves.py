"""The learning curves of a training as one picture beside the model, for its card and the Hub."""

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from sgpo_cli.report import figures

NAME = "learning_curves.png"
COLUMNS = 2
PANEL = (4.2, 2.6)  # inches
STYLES = ("-", "--")  # a second line is told apart by more than its colour


def picture(name: str, history: Sequence[Mapping[str, Any]]) -> bytes:
    """The curves of `name` from a trainer's log history as PNG, the same bytes each time; empty if it holds none."""
    log = [
        {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
        for entry in history
    ]
    panels = figures.logged_curves([entry for entry in log if "step" in entry])
    if not panels:
        return b""
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure((COLUMNS * PANEL[0], rows * PANEL[1] + 0.4), layout="constrained")
    figure.suptitle(f"Learning curves of {name}", parse_math=False)
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, COLUMNS, place)
        axes.set_title(panel.title, fontsize=10, loc="left")
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        if place > len(panels) - COLUMNS:
            axes.set_xlabel("optimizer step", fontsize=8)
        for (label, points), style in zip(panel.series, itertools.cycle(STYLES), strict=False):
            axes.plot(*zip(*points, strict=True), style, label=label, marker="." if len(points) == 1 else "")
        if len(panel.series) > 1:
            axes.legend(fontsize=8)
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=120, metadata={"Software": None})
    return made.getvalue()
