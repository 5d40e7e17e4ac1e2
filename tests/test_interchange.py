"""The files of the public benchmarks: what we write they read, what they write we read."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Sgpo, read_lines, write_lines

from sgpo_cli import interchange
from sgpo_cli.annotations import win_rates
from sgpo_cli.errors import UsageError

FIXTURE = json.loads((Path(__file__).parent / "data" / "winrates.json").read_text())
EXPECTED = FIXTURE["expected"]
BASELINE = "o3-mini-2025-01-31"


@pytest.fixture
def judged(world: Path, sgpo: Sgpo) -> Path:
    """A finished evaluation of two files of answers against a third."""
    texts = {
        "mine": lambda n: "good " * (n % 3) + f"- item {n}",
        "worse": lambda n: "x",
        "base": lambda n: "## Base\ngood answer",
    }
    for name, text in texts.items():
        rows = [{"id": f"p{n}", "response": text(n)} for n in range(60)]
        write_lines(world / f"{name}.jsonl", rows)
    (world / "rule.py").write_text("def goods(prompt, response):\n    return response.count('good')\n")
    command = "evaluate --models mine.jsonl --models worse.jsonl --baseline base.jsonl --dataset prompts.jsonl"
    result = sgpo(*command.split(), "--judge", "rule:goods", "--output-dir", "scores")
    assert result.returncode == 0, result.stderr
    return world


def write_official(directory: Path) -> None:
    """The fixture in the public tools' formats, as `data/make_winrates.py` writes it for them."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("make", Path(__file__).parent / "data" / "make_winrates.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    make.write_official(directory, FIXTURE["alpaca"], FIXTURE["arena"])


class TestAlpacaEval:
    def test_the_export_has_their_columns_and_our_win_rate(self, judged: Path, sgpo: Sgpo) -> None:
        result = sgpo("export", "scores", "--format", "alpaca-eval", "--output-dir", "out")
        assert result.returncode == 0, result.stderr
        assert len(result.stdout.split()) == 5
        outputs = json.loads((judged / "out" / "mine" / "model_outputs.json").read_text())
        assert [sorted(row) for row in outputs] == [["dataset", "generator", "instruction", "output"]] * 60
        assert outputs[1]["instruction"] == "Tell me of thing number 1, please."
        annotations = json.loads((judged / "out" / "mine" / "rule_goods" / "annotations.json").read_text())
        assert {row["generator_1"] for row in annotations} == {"base"}
        assert [row["preference"] for row in annotations[:3]] == [1, 1.5, 2]
        ours = json.loads((judged / "scores" / "metrics.json").read_text())["win_rates"][0]
        assert sum(row["preference"] - 1 for row in annotations) / 60 == pytest.approx(ours["win_rate"])

    def test_annotations_that_we_wrote_give_the_same_table(self, judged: Path, sgpo: Sgpo) -> None:
        sgpo("export", "scores", "--format", "alpaca-eval", "--output-dir", "out")
        result = sgpo(
            "win-rates",
            "out/mine/rule_goods/annotations.json",
            "out/worse/rule_goods/annotations.json",
            "--output",
            "w.json",
        )
        assert result.returncode == 0, result.stderr
        ours = json.loads((judged / "scores" / "metrics.json").read_text())["win_rates"]
        read = json.loads((judged / "w.json").read_text())["win_rates"]
        for name in ("name", "baseline", "win_rate", "ci95", "lc_win_rate", "lc_ci95", "wins", "ties", "sign_test_p"):
            assert [entry[name] for entry in ours] == [entry[name] for entry in read]

    def test_their_annotations_give_their_win_rates(self, tmp_path: Path) -> None:
        write_official(tmp_path)
        entry = win_rates([tmp_path / "annotations.json"], 1, None, None)[0][0]
        expected = EXPECTED["alpaca_eval"]
        assert 100 * entry["win_rate"] == pytest.approx(expected["win_rate"], abs=0.01)
        assert 100 * entry["lc_win_rate"] == pytest.approx(expected["length_controlled_minimal"], abs=0.2)
        gamed = str(tmp_path / "df_gamed.csv")
        entry = win_rates([tmp_path / "annotations.json"], 1, gamed, None)[0][0]
        assert 100 * entry["lc_win_rate"] == pytest.approx(expected["length_controlled_v1"], abs=0.2)

    def test_outputs_of_theirs_can_be_judged_by_prompt(self, world: Path, sgpo: Sgpo) -> None:
        rows = read_lines(world / "prompts.jsonl")
        outputs = [{"instruction": row["prompt"], "output": row["id"], "generator": "theirs"} for row in rows[::-1]]
        (world / "model_outputs.json").write_text(json.dumps(outputs))
        (world / "rule.py").write_text("def right(prompt, response):\n    return response[1:] in prompt\n")
        command = "evaluate --models model_outputs.json --dataset prompts.jsonl --judge rule:right --output-dir s"
        result = sgpo(*command.split())
        assert result.returncode == 0, result.stderr
        (entry,) = json.loads((world / "s" / "metrics.json").read_text())["models"]
        assert (entry["name"], entry["score"], entry["n"]) == ("theirs", 1, 60)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[]", "expected a list of JSON objects"),
            ("{", ":1: not valid JSON"),
            ('[{"output_1": "a", "output_2": "b"}]', "annotation 1 has no preference"),
            ('[{"output_1": "a", "output_2": "b", "preference": 3}]', "annotation 1: preference 3"),
            ('[{"output_1": "a", "output_2": "b", "preference": "2"}]', "annotation 1: preference '2'"),
        ],
    )
    def test_what_is_no_annotation_is_said(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            win_rates([tmp_path / "a.json"], 1, None, None)


class TestArenaHard:
    def test_the_export_has_their_files(self, judged: Path, sgpo: Sgpo) -> None:
        result = sgpo("export", "scores", "--format", "arena-hard", "--output-dir", "out", "--category", "coding")
        assert result.returncode == 0, result.stderr
        data = judged / "out" / "data" / "sgpo"
        assert read_lines(data / "question.jsonl")[0] == {
            "uid": "p0",
            "category": "coding",
            "prompt": "Tell me of thing number 0, please.",
        }
        answers = read_lines(data / "model_answer" / "base.jsonl")
        assert answers[0]["messages"][-1] == {"role": "assistant", "content": {"answer": "## Base\ngood answer"}}
        assert list(answers[0]["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
        assert answers[0]["metadata"]["header_count"]["h2"] == 1
        games = [row["games"] for row in read_lines(data / "model_judgment" / "rule_goods" / "mine.jsonl")]
        assert [[game["score"] for game in pair] for pair in games[:3]] == [
            ["A>B", "B>A"],  # the baseline is A in the first game
            ["A=B", "A=B"],
            ["B>A", "A>B"],
        ]
        command = ["win-rates", data / "model_judgment" / "rule_goods" / "mine.jsonl"]
        result = sgpo(*command, "--model-answers", data / "model_answer")
        assert result.returncode == 0, result.stderr
        assert "50.0" in result.stdout

    def test_their_judgments_give_their_scores(self, tmp_path: Path) -> None:
        write_official(tmp_path)
        data = tmp_path / "data" / "arena-hard-v2.0"
        files = [data / "model_judgment" / "gpt-4.1" / f"{name}.jsonl" for name in ("one", "two")]
        entries, lines = win_rates(files, 1, None, data / "model_answer")
        for entry in entries:
            expected = EXPECTED["arena_hard"]
            assert 100 * entry["score"] == pytest.approx(expected["mean"][entry["name"]], abs=1e-6)
            assert 100 * entry["style_controlled"] == pytest.approx(expected["fit_converged"][entry["name"]], abs=1e-3)
        assert sum(entry["invalid"] for entry in entries) == 33  # as their script says: "null judgments found: 33"
        assert len(lines) == 3

    def test_answers_of_theirs_are_read(self, tmp_path: Path) -> None:
        row = interchange.arena_answer(
            {"id": "u1", "prompt": [{"role": "user", "content": "Who?"}]}, "them", "Me.", {"token_len": 1}
        )
        write_lines(tmp_path / "them.jsonl", [row])
        file = interchange.read_answers(tmp_path / "them.jsonl")
        asked: list[dict[str, Any]] = [
            {"id": "u1", "prompt": [{"role": "user", "content": "?"}]},
            {"id": "x", "prompt": [{"role": "user", "content": "Who?"}]},
        ]
        assert (file.name, file.answers(asked)) == ("them", ["Me.", "Me."])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("export prompts.jsonl --format alpaca-eval --output-dir out", "no finished evaluate step"),
        ("export model --format alpaca-eval --output-dir out", "no finished evaluate step"),
        ("win-rates nowhere.json", "nowhere.json"),
        ("win-rates prompts.jsonl", "has no output_1"),
    ],
)
def test_mistakes_end_with_exit_2(world: Path, sgpo: Sgpo, arguments: str, message: str) -> None:
    result = sgpo(*arguments.split())
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert not (world / "out").exists()


def test_nothing_is_written_over(judged: Path, sgpo: Sgpo) -> None:
    (judged / "out").mkdir()
    (judged / "out" / "mine.txt").touch()
    result = sgpo("export", "scores", "--format", "alpaca-eval", "--output-dir", "out")
    assert (result.returncode, "is not empty" in result.stderr) == (2, True)
