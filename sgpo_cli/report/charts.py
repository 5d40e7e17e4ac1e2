"""Charts as inline SVG. Colours are classes of report.css: s1, s2 ... are series, readable light and dark.

Every text goes through ElementTree, which escapes it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

WIDTH, HEIGHT = 310, 190
LEFT, RIGHT, TOP, BOTTOM = 42, 10, 10, 38
MOST_POINTS = 300

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """From values to places; `log2` labels powers of two."""

    low: float
    high: float
    start: float
    end: float
    log2: bool = False

    def place(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 2)

    def ticks(self, count: int = 4) -> list[float]:
        ticks = nice_ticks(self.low, self.high, count)
        return [tick for tick in ticks if tick == int(tick)] if self.log2 else ticks

    def label(self, value: float) -> str:
        if self.log2:
            return f"\u00d7{2**value:g}" if value >= 0 else f"\u00d71/{2**-value:g}"
        return number(value)


def number(value: float) -> str:
    """A short number: 1.2k, 0.05, 3M, 5e-4."""
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(power)}".replace("-", "\u2212")
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            unit = 1e3 if letter == "k" else size
            return f"{value / unit:.3g}{letter}"
    return f"{value:.4g}".replace("-", "\u2212")


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """At most about `count` round values from `low` to `high`, 1, 2, 2.5 or 5 times a power of ten apart."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(tick * step, 12) for tick in range(first, last + 1)]


def canvas(width: float, height: float, label: str, kind: str = "chart") -> Element:
    return Element(
        "svg", {"viewBox": f"0 0 {width:g} {height:g}", "class": kind, "role": "img", "aria-label": clean(label)}
    )


def markup(svg: Element) -> Markup:
    return Markup(tostring(svg, encoding="unicode"))


def clean(text: str) -> str:
    """Without the control characters that neither XML nor HTML can hold."""
    return "".join(" " if letter < " " or "\ud800" <= letter <= "\udfff" else letter for letter in text)


def add(parent: Element, tag: str, kind: str = "", text: str = "", **attributes: float | str) -> Element:
    """An element below `parent`; underscores of attribute names stand for hyphens."""
    values = {
        name.replace("_", "-"): f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in attributes.items()
    }
    element = SubElement(parent, tag, ({"class": kind} if kind else {}) | values)
    element.text = clean(text) or None
    return element


def axes(svg: Element, x: Axis, y: Axis, x_label: str, y_label: str = "") -> None:
    """Horizontal grid lines, ticks, the names of both axes."""
    for tick in y.ticks(4):
        add(svg, "line", "grid", x1=x.start, x2=x.end, y1=y.place(tick), y2=y.place(tick))
        add(svg, "text", "tick end", y.label(tick), x=LEFT - 6.0, y=y.place(tick) + 3.5)
    for tick in x.ticks():
        add(svg, "line", "axis", x1=x.place(tick), x2=x.place(tick), y1=y.start, y2=y.start + 4)
        side = "end" if x.place(tick) > WIDTH - 16 and len(x.label(tick)) > 2 else "middle"
        add(
            svg,
            "text",
            f"tick {side}",
            x.label(tick),
            x=x.place(tick) + (RIGHT if side == "end" else 0),
            y=y.start + 16,
        )
    add(svg, "line", "axis", x1=x.start, x2=x.end, y1=y.start, y2=y.start)
    add(svg, "text", "label end", x_label, x=x.end, y=HEIGHT - 3)
    if y_label:
        add(svg, "text", "label", y_label, x=2, y=HEIGHT - 3)


def lines(title: str, series: Sequence[tuple[str, Points]], x_label: str) -> Markup:
    """One curve for each of `series`, (name, points); a second and third one are dashed as well as coloured."""
    curves = [(name, thinned(points)) for name, points in series if points]
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    x = Axis(min(xs), max(max(xs), min(xs) + 1), LEFT, WIDTH - RIGHT)
    y = Axis(*padded(min(ys), max(ys)), HEIGHT - BOTTOM, TOP)
    svg = canvas(WIDTH, HEIGHT, title)
    axes(svg, x, y, x_label)
    for number_, (name, points) in enumerate(curves, 1):
        path = "M" + "L".join(f"{x.place(a):g} {y.place(b):g}" for a, b in points)
        add(add(svg, "path", f"curve s{number_}", d=path), "title", text=name)
        if len(points) == 1:
            add(svg, "circle", f"dot s{number_}", cx=x.place(points[0][0]), cy=y.place(points[0][1]), r=3)
    return markup(svg)


def thinned(points: Points) -> Points:
    """At most MOST_POINTS points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MOST_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def padded(low: float, high: float) -> tuple[float, float]:
    """The range with room; 0 is in it when it is near."""
    if low >= 0 and low < 0.5 * high:
        low = 0.0
    room = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    return (low if low == 0 else low - room), high + room


def histogram(
    title: str,
    series: Sequence[tuple[str, Sequence[int]]],
    low: float,
    high: float,
    x_label: str,
    *,
    mark: tuple[float, str] | None = None,
    log2: bool = False,
) -> Markup:
    """Counts in equal bins from `low` to `high`; two series lie over each other, both translucent.

    Args:
        mark: a value with its name, drawn as a vertical line.
    """
    most = max((count for _, counts in series for count in counts), default=0)
    x = Axis(low, high, LEFT, WIDTH - RIGHT, log2)
    y = Axis(0, max(most, 1) * (1.2 if mark else 1.06), HEIGHT - BOTTOM, TOP)
    svg = canvas(WIDTH, HEIGHT, title)
    axes(svg, x, y, x_label)
    for order, (name, counts) in enumerate(series, 1):
        add(add(svg, "path", f"area s{order}", d=outline(counts, x, y)), "title", text=name)
    if mark and low <= mark[0] <= high:
        place = x.place(mark[0])
        add(svg, "line", "mark", x1=place, x2=place, y1=TOP, y2=y.start)
        right = place < WIDTH * 0.6
        add(svg, "text", "label" if right else "label end", mark[1], x=place + (5 if right else -5), y=TOP + 10)
    return markup(svg)


def outline(counts: Sequence[int], x: Axis, y: Axis) -> str:
    """The path around the bars."""
    width = (x.high - x.low) / len(counts)
    steps = [f"V{y.place(count):g}H{x.place(x.low + (bin_ + 1) * width):g}" for bin_, count in enumerate(counts)]
    return f"M{x.start:g} {y.start:g}{''.join(steps)}V{y.start:g}Z"


def percent(value: float, low: float, high: float) -> str:
    """A place in a table cell's drawing, which is as wide as its cell."""
    return f"{round(3 + 94 * (value - low) / (high - low), 2):g}%"


def cell(height: int, label: str) -> Element:
    return Element(
        "svg", {"class": "cell", "width": "100%", "height": str(height), "role": "img", "aria-label": clean(label)}
    )


def interval(name: str, value: float, ends: Sequence[float], axis: tuple[float, float], order: int) -> Markup:
    """A point with its interval, for a table cell; every row has the same axis."""
    low, high = ends
    svg = cell(22, f"{name}: {value:.3f}, {low:.3f} to {high:.3f}")
    for tick in nice_ticks(*axis):
        add(svg, "line", "grid", x1=percent(tick, *axis), x2=percent(tick, *axis), y1=0, y2=22)
    add(svg, "line", f"curve s{order}", x1=percent(low, *axis), x2=percent(high, *axis), y1=11, y2=11)
    for end in ends:
        add(svg, "line", f"curve s{order}", x1=percent(end, *axis), x2=percent(end, *axis), y1=7, y2=15)
    add(svg, "circle", f"dot s{order}", cx=percent(value, *axis), cy=11, r=3.5)
    return markup(svg)


def scale(axis: tuple[float, float]) -> Markup:
    """The axis below a column of `interval`s."""
    svg = cell(20, f"from {axis[0]:g} to {axis[1]:g}")
    add(svg, "line", "axis", x1=percent(axis[0], *axis), x2=percent(axis[1], *axis), y1=0.5, y2=0.5)
    ticks = nice_ticks(*axis)
    for order, tick in enumerate(ticks):
        between = "" if order in (0, len(ticks) - 1) else " less"  # on a phone there is room for the ends
        add(svg, "line", "axis", x1=percent(tick, *axis), x2=percent(tick, *axis), y1=0, y2=4)
        add(svg, "text", f"tick middle{between}", number(tick), x=percent(tick, *axis), y=16)
    return markup(svg)


def bar(label: str, parts: Sequence[float], most: float) -> Markup:
    """A bar of several parts, for a table cell, in the scale of the longest one."""
    svg = cell(14, label)
    start = 0.0
    for order, part in enumerate(parts, 1):
        share = 100 * part / most if most else 0.0
        if part:
            add(svg, "rect", f"fill s{order}", x=f"{start:.2f}%", y=2, width=f"{max(share, 0.5):.2f}%", height=10)
        start += share
    return markup(svg)
