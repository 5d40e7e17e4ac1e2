"""The page: what was collected, drawn and put into the template. The same run gives the same bytes."""

import base64
import hashlib
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import MISSING
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from sgpo_cli import artifacts, prompts
from sgpo_cli.configs import STAGES
from sgpo_cli.options import own_options
from sgpo_cli.report import figures, lineage
from sgpo_cli.report.collect import Run, StepFacts, collect
from sgpo_cli.report.examples import embed, example_sets

NAME = "report.html"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def write(directory: Path, output: Path | None = None) -> Path:
    """Write the report of a run directory, or of one step, and return its path.

    Raises:
        UsageError: there is no step in the directory.
        IntegrityError: a file of the run is not what sgpo wrote.
    """
    path = output or directory / NAME
    text = build(collect(directory))
    artifacts.write_atomically(path, LONE_SURROGATE.sub("\ufffd", text))
    return path


def build(run: Run) -> str:
    """The page as text."""
    script, style = _part("report.js"), _part("report.css")
    examples = example_sets(run)
    return _template().render(
        run=run,
        finished=max((step.manifest.finished for step in run.steps if step.manifest), default=""),
        total_seconds=sum(step.manifest.seconds for step in run.steps if step.manifest),
        headline=figures.headline(run),
        warnings=list(_warnings(run)),
        lineage=lineage.draw(run.steps),
        scores=[figures.scores(step) for step in run.steps if step.metrics and step.metrics.models],
        funnel=figures.funnel(run),
        data=[figures.data(step) for step in run.steps if step.quality],
        curves=[found for step in run.steps if (found := figures.curves(step))["charts"]],
        examples=examples,
        embedded=Markup(embed(examples)),
        costs=figures.costs(run),
        versions=_versions(run),
        commands=list(_commands(run)),
        script=Markup(script),
        style=Markup(style),
        policy=f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    )


@cache
def _template() -> Template:
    # autoescape is off by default in Jinja; with it, whatever a row says stays text.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"seconds": seconds, "count": count, "percent": percent}
    return environment.from_string(_part("report.html.j2"))


def _part(name: str) -> str:
    return (files("sgpo_cli.report") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What the page's own policy calls a script or style: nothing else may run."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def seconds(value: float | None) -> str:
    """Time for people: 8.0 s, 2 min 5 s, 3 h 20 min."""
    if value is None:
        return ""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def count(value: float | None) -> str:
    """An integer with narrow spaces between the thousands."""
    return "" if value is None else f"{value:,.0f}".replace(",", "\u202f")


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", "\u202f%")


def _warnings(run: Run) -> Iterator[tuple[str, str]]:
    for step in run.steps:
        if step.manifest is None:
            yield step.name, "this step has not finished"
        for text in step.quality.warnings if step.quality else ():
            yield step.name, text


def _versions(run: Run) -> list[tuple[str, str]]:
    """Each package with its version, or with all of them when steps differ."""
    found: dict[str, list[str]] = {}
    for step in run.steps:
        for name, version in step.manifest.versions.items() if step.manifest else ():
            versions = found.setdefault(name, [])
            if version not in versions:
                versions.append(version)
    return [(name, ", ".join(versions)) for name, versions in found.items()]


def _commands(run: Run) -> Iterator[str]:
    """A command for each step; needed where no recipe was recorded, exact either way."""
    for step in run.steps:
        yield shlex.join(["sgpo", step.stage, *_flags(step, run), "--output-dir", _place(run, step.name)])


def _place(run: Run, name: str) -> str:
    return f"{run.name}/{name}" if len(run.steps) > 1 or run.name != name else name


def _flags(step: StepFacts, run: Run) -> Iterator[str]:
    """The options that are not at their defaults."""
    own = own_options(STAGES[step.stage]) if step.stage in STAGES else {}
    for source in step.sources:
        yield "--" + source.option.partition(".")[0].replace("_", "-")
        prefix = "hf:" if source.option == "teacher" else ""
        yield prefix + (_place(run, source.label) if source.step else source.label)
    for name, value in step.request.config.items():
        if name == "teacher" and str(value).startswith("hf:"):
            continue
        if name in own and value == _default(own[name]):
            continue
        yield from _flag(name, value)


def _default(entry: Any) -> Any:
    """What an option is when it is not given, as the request holds it."""
    if entry.metadata["kind"] == "prompt" and entry.default:
        return prompts.load(entry.default)
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def _flag(name: str, value: Any) -> Iterator[str]:
    flag = "--" + name.replace("_", "-")
    if value is True:
        yield flag
    elif value is False:
        yield "--no-" + flag[2:]
    elif isinstance(value, list):
        yield flag
        yield from map(str, value)
    elif value is not None:
        yield flag
        yield json.dumps(value) if isinstance(value, dict) else str(value)
