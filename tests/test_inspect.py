"""`sgpo inspect`: the rows that were asked for, what differs between their texts, and nothing a terminal obeys."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Sgpo, write_lines
from rich.console import Console
from rich.text import Text

from sgpo_cli import inspect_rows
from sgpo_cli.errors import UsageError
from sgpo_cli.inspect_rows import Choice


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}",
        "prompt": [{"role": "user", "content": f"Where is thing {number}?"}],
        "chosen": [{"role": "assistant", "content": f"Thing {number} is on the upper shelf."}],
        "rejected": [{"role": "assistant", "content": f"Thing {number} is gone."}],
        **more,
    }


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    directory = tmp_path / "pairs"
    directory.mkdir()
    write_lines(directory / "train.jsonl", [pair(number) for number in range(50)])
    dropped = [pair(number, reason="cut" if number % 2 else "identical") for number in range(50, 57)]
    write_lines(directory / "rejects.jsonl", dropped)
    return directory


def shown(directory: Path, choice: Choice, width: int = 100, *, terminal: bool = False) -> str:
    console = Console(
        file=io.StringIO(), width=width, force_terminal=terminal, color_system="truecolor" if terminal else None
    )
    inspect_rows.show(directory, choice, console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def ids(text: str) -> list[str]:
    return [line.split(" ")[0] for line in text.splitlines() if line.startswith("p") and line[1:2].isdigit()]


def test_the_first_rows_with_what_differs(pairs: Path) -> None:
    text = shown(pairs, Choice(limit=2))
    assert ids(text) == ["p0", "p1"]
    assert "rejected  Thing 0 is [-gone.-]" in text
    assert "chosen    Thing 0 is {+on the upper shelf.+}" in text
    assert "57% of the words changed" in text
    assert "2 of 50 rows" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_choices(pairs: Path) -> None:
    assert ids(shown(pairs, Choice(ids=["p7", "p31"]))) == ["p7", "p31"]
    assert "p51 · cut" in shown(pairs, Choice(ids=["p51"]))
    assert ids(shown(pairs, Choice(rejects=True, limit=3))) == ["p50", "p51", "p52"]
    assert ids(shown(pairs, Choice(reason="cut"))) == ["p51", "p53", "p55"]
    assert "p51 · cut" in shown(pairs, Choice(reason="cut"))
    first = ids(shown(pairs, Choice(sample=5, seed=1)))
    assert len(first) == 5
    assert first == ids(shown(pairs, Choice(sample=5, seed=1))) != ids(shown(pairs, Choice(sample=5, seed=2)))


@pytest.mark.parametrize("width", [80, 160])
def test_a_terminal_gets_lines_that_fit_and_colours(pairs: Path, width: int) -> None:
    row = pair(99, chosen=[{"role": "assistant", "content": "word " * 200}])
    write_lines(pairs / "train.jsonl", [row])
    text = shown(pairs, Choice(), width, terminal=True)
    assert "\x1b[" in text
    assert "{+" not in text
    lines = [Text.from_ansi(line).plain for line in text.splitlines()]
    assert width - 10 < max(map(len, lines[:-1])) <= width  # the last line names the file


HOSTILE = ["\x1b]0;title\x07", "\x1b[2J", "back\rover", "\u202eright to left", "[red]markup[/red]", "[link=x]y[/link]",
           "\x9b31m", "a\u200bb", "\u2066isolate", ":smile:", "\x00", "\u2028line"]  # fmt: skip


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_in_a_row_steers_the_terminal(pairs: Path, hostile: str, terminal: bool) -> None:
    message = [{"role": "user", "content": hostile}]
    row = {"id": hostile, "reason": hostile, hostile: hostile, f"{hostile}n": 1}
    row |= dict.fromkeys(("prompt", "chosen", "rejected"), message)
    write_lines(pairs / "train.jsonl", [row])
    text = shown(pairs, Choice(), terminal=terminal)
    if terminal:
        text = Text.from_ansi(text).plain
    steers = {letter for letter in text if ord(letter) < 32 or letter in "\x7f\x9b\u202e\u200b\u2066\u2028\x00"} - {
        "\n"
    }
    assert not steers
    if hostile.isprintable():
        assert text.count(hostile) >= 5  # markup and emoji codes are shown as they are


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("nowhere", 2, "nowhere: no such directory"),
        ("pairs --id p99", 2, "no row with the id 'p99'"),
        ("pairs --reason long", 2, "the reasons are identical (4), cut (3)"),
        ("pairs --limit 0", 2, "limit"),
        ("more/model", 2, "model: no train.jsonl here"),
        (".", 2, "look into one of pairs"),
        ("more/half", 2, "half: this step has not finished"),
        ("more/bad", 4, "manifest.json: changed after the step had finished"),
        ("more/torn", 4, "train.jsonl:1: not valid JSON"),
    ],
)
def test_mistakes_are_answered(pairs: Path, sgpo: Sgpo, arguments: str, code: int, message: str) -> None:
    for name, files in {
        "model": {},
        "half": {"request.json": "{}"},
        "bad": {"request.json": "{}", "manifest.json": "{}", "train.jsonl": "{}"},
        "torn": {"train.jsonl": '{"id": 1'},
    }.items():
        (pairs.parent / "more" / name).mkdir(parents=True)
        for file, content in files.items():
            (pairs.parent / "more" / name / file).write_text(content)
    result = sgpo("inspect", *arguments.split())
    assert result.returncode == code, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_rows_that_changed_after_the_step_are_refused(echo_recipe: Path, sgpo: Sgpo) -> None:
    assert sgpo("run", echo_recipe).returncode == 0
    rows = echo_recipe.parent / "runs/echo/targets/train.jsonl"
    assert "target" in sgpo("inspect", rows.parent, "--limit", 1).stdout
    rows.write_text(json.dumps({"id": "new"}) + "\n")
    result = sgpo("inspect", rows.parent)
    assert result.returncode == 4
    assert "sha256 mismatch" in result.stderr


def test_no_rejects_is_no_mistake(pairs: Path) -> None:
    for change in (lambda path: path.write_text(""), Path.unlink):
        change(pairs / "rejects.jsonl")
        assert "0 of 0 rows" in shown(pairs, Choice(rejects=True))
        assert "0 of 0 rows" in shown(pairs, Choice(rejects=True, sample=3))
        with pytest.raises(UsageError, match="none was at all"):
            shown(pairs, Choice(reason="cut"))
