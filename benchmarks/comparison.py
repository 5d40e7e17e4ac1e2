"""Takes a finished comparison into the documentation: figures, chart and tables.

    sgpo compare recipes/demo.yaml --seeds 5 --run-dir runs/rivals
    python benchmarks/comparison.py runs/rivals --name rivals

Writes `benchmarks/comparison_<name>.json` and `docs/comparison_<name>.svg`, and puts the tables into the page in
`docs/` that has `<!-- rivals -->` and `<!-- end -->`, between them; without such a page, it prints them.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import machine

DOCS = Path(__file__).parents[1] / "docs"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] + ["--:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def estimated(figure: dict[str, Any] | None, sign: str = "") -> str:
    if figure is None:
        return ""
    interval = figure["ci95"]
    return f"{figure['mean']:{sign}.3f}" + (f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else "")


def tables(figures: dict[str, Any]) -> str:
    """Scores, differences, costs."""
    methods, against = figures["methods"], figures["against"]
    answers, costs = list(methods[0]["scores"]), list(methods[0]["cost"])
    names = [name.replace("_", " ") for name in answers]
    scores = [[each["name"], *(estimated(each["scores"][answer]) for answer in answers)] for each in methods]
    apart = [
        [each["name"], *(estimated(each["differences"][answer], "+") for answer in answers)]
        for each in methods
        if each["name"] != against
    ]
    spent = [[each["name"], *(f"{each['cost'][name]['mean']:,.0f}" for name in costs)] for each in methods]
    seeds = len(figures["seeds"])
    return "\n\n".join(
        [
            f"Scores, mean over {seeds} seeds, ± half of the 95 % interval over seeds:",
            table(["method", *names], scores),
            f"More than {against}, seed by seed:",
            table(["method", *names], apart),
            "Cost of all steps behind a method, mean over seeds:",
            table(["method", *(name.replace("_", " ") for name in costs)], spent),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--name", required=True)
    arguments = parser.parse_args()
    figures = json.loads((arguments.run_dir / "comparison.json").read_text(encoding="utf-8"))
    machine.write(f"comparison_{arguments.name}", figures)
    shutil.copyfile(arguments.run_dir / "comparison.svg", DOCS / f"comparison_{arguments.name}.svg")
    made = tables(figures)
    place = re.compile(rf"(<!-- {re.escape(arguments.name)} -->\n).*?(<!-- end -->)", re.S)
    for page in DOCS.glob("*.md"):
        text = page.read_text(encoding="utf-8")
        if place.search(text):
            page.write_text(place.sub(lambda found: f"{found[1]}\n{made}\n\n{found[2]}", text), encoding="utf-8")
            return
    print(made)


if __name__ == "__main__":
    main()
