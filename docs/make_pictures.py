"""Makes the README's pictures from a finished demo: docs/report.png (needs Chromium) and docs/inspect.svg.

make full-pipeline
.venv/bin/python docs/make_pictures.py runs/demo
"""

import io
import re
import sys
import tempfile
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import browser  # noqa: E402  (the tests' own driver)

from sgpo_cli import inspect_rows, report  # noqa: E402


def picture_of_the_report(run: Path) -> None:
    with tempfile.TemporaryDirectory() as directory:
        page = report.write(run, Path(directory) / "report.html")
        program = browser.find()
        assert program is not None, "no Chromium found"
        with browser.Browser(program, Path(directory) / "profile") as opened:
            opened.look(1080, 1700)
            opened.open(page)
            opened.screenshot(HERE / "report.png")


def picture_of_inspect(run: Path) -> None:
    console = Console(file=io.StringIO(), record=True, width=100, force_terminal=True, color_system="truecolor")
    inspect_rows.show(run / "pairs", inspect_rows.Choice(sample=3, seed=4), console)
    title = f"sgpo inspect {run}/pairs --sample 3 --seed 4"
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=title), flags=re.DOTALL)  # of another server
    (HERE / "inspect.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    picture_of_the_report(Path(sys.argv[1]))
    picture_of_inspect(Path(sys.argv[1]))
