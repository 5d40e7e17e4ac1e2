"""From a finished evaluate step to the files that the public benchmarks' own tools read."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from sgpo_cli import arena_hard, artifacts, interchange
from sgpo_cli.contestants import GIVEN
from sgpo_cli.contests import preferences_of_scores
from sgpo_cli.errors import UsageError

Format = Literal["alpaca-eval", "arena-hard"]
Row = dict[str, Any]
BENCHMARK = "sgpo"  # the name of the directory that takes the place of arena-hard-v2.0
OUTCOMES = {1.0: ("A", "B"), 0.0: ("B", "A"), 0.5: ("tie", "tie")}


class Evaluation:
    """One answer of each model in a finished evaluate step.

    Args:
        answer: which one, such as `policy_sampled`; files of answers have only their own.

    Raises:
        UsageError: no finished evaluate step, or one without these answers.
        IntegrityError: its files are not what its manifest says.
    """

    def __init__(self, directory: Path, answer: str) -> None:
        manifest = artifacts.read_manifest(directory) or {}
        if manifest.get("stage") != "evaluate":
            raise UsageError(f"{directory}: no finished evaluate step", "name the directory that evaluate wrote")
        artifacts.verify(directory)
        self.judge = str(manifest["judge"]["judge"])
        self.baseline: str | None = manifest["judge"].get("baseline")
        self.models: dict[str, list[Row]] = {}
        with (directory / artifacts.DATA_FILES[0]).open(encoding="utf-8") as file:
            for row in map(json.loads, file):
                self.models.setdefault(row["model"], []).append(row)
        self._answer = answer
        for name, rows in self.models.items():
            if rows[0].get(self.column(name)) is None:
                raise UsageError(f"{directory}: no answers {answer} of {name}", "name others with --answer")

    def column(self, name: str) -> str:
        """The answers of a model that are exported."""
        first = self.models[name][0]
        return GIVEN if first.get(GIVEN) is not None else self._answer

    def texts(self, name: str) -> list[str]:
        """A model's answers, in the order of the prompts."""
        return [str(row[self.column(name)]) for row in self.models[name]]

    def preferences(self, name: str) -> list[float | None]:
        """1 the model's answer won against the baseline's, 0 it lost, 0.5 a tie, None no valid verdict."""
        rows, column = self.models[name], self.column(name)
        if f"preference_{column}" in rows[0]:
            return [row[f"preference_{column}"] for row in rows]
        assert self.baseline is not None
        other = f"score_{self.column(self.baseline)}"
        own = [row.get(f"score_{column}") for row in rows]
        found = preferences_of_scores(own, [row.get(other) for row in self.models[self.baseline]])
        return [None if math.isnan(value) else value for value in found.tolist()]

    def verdicts(self, name: str) -> Iterator[Mapping[str, str | None]]:
        """Per prompt, by order; where scores were compared, both orders say the same."""
        column = f"verdicts_{self.column(name)}"
        for row, preference in zip(self.models[name], self.preferences(name), strict=True):
            asked = row.get(column)
            if asked is None:
                words = ("invalid", "invalid") if preference is None else OUTCOMES[preference]
                asked = dict(zip(("model_first", "model_second"), words, strict=True))
            yield asked

    @property
    def judge_file(self) -> str:
        """The judge's name, for a directory."""
        return re.sub(r"[^A-Za-z0-9.-]+", "_", self.judge)[-64:]

    @property
    def rivals(self) -> list[str]:
        """Models that have met the baseline."""
        return [name for name in self.models if self.baseline not in (None, name)]


def export(directory: Path, form: Format, output: Path, answer: str, category: str) -> list[Path]:
    """Write the files; returns them.

    Raises:
        UsageError: nothing to export, or `output` holds something already.
    """
    evaluation = Evaluation(directory, answer)
    if output.exists() and any(output.iterdir()):
        raise UsageError(f"{output}: is not empty", "choose another --output-dir")
    for name in (*evaluation.models, evaluation.judge_file):
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            raise UsageError(f"{name!r} is no name for a file", "rename the model")
    return list((_alpaca_eval if form == "alpaca-eval" else _arena_hard)(evaluation, output, category))


def _alpaca_eval(evaluation: Evaluation, output: Path, category: str) -> Iterator[Path]:
    # As alpaca_eval's own results: <model>/model_outputs.json and <model>/<annotator>/annotations.json.
    for name, rows in evaluation.models.items():
        path = output / name / "model_outputs.json"
        pairs = zip(rows, evaluation.texts(name), strict=True)
        interchange.write_json(path, interchange.alpaca_outputs(pairs, name))
        yield path
    for name in evaluation.rivals:
        assert evaluation.baseline is not None
        path = output / name / evaluation.judge_file / "annotations.json"
        columns = evaluation.texts(name), evaluation.texts(evaluation.baseline), evaluation.preferences(name)
        judged = zip(evaluation.models[name], *columns, strict=True)
        annotations = interchange.alpaca_annotations(judged, name, evaluation.baseline, evaluation.judge)
        interchange.write_json(path, annotations)
        yield path


def _arena_hard(evaluation: Evaluation, output: Path, category: str) -> Iterator[Path]:
    data = output / "data" / BENCHMARK
    questions = next(iter(evaluation.models.values()))
    path = data / "question.jsonl"
    interchange.write_json_lines(path, (interchange.arena_question(row, category) for row in questions))
    yield path
    for name, rows in evaluation.models.items():
        path = data / "model_answer" / f"{name}.jsonl"
        interchange.write_json_lines(path, _arena_answers(rows, name, evaluation.texts(name)))
        yield path
    for name in evaluation.rivals:
        assert evaluation.baseline is not None
        path = data / "model_judgment" / evaluation.judge_file / f"{name}.jsonl"
        facts = (name, evaluation.baseline, evaluation.judge_file, category)
        judged = zip(evaluation.models[name], evaluation.verdicts(name), strict=True)
        interchange.write_json_lines(
            path, (interchange.arena_judgment(row, *facts, verdicts) for row, verdicts in judged)
        )
        yield path


def _arena_answers(rows: Sequence[Row], name: str, texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    for row, text in zip(rows, texts, strict=True):
        yield interchange.arena_answer(row, name, text, arena_hard.style_of(text))
