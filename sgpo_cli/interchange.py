"""The files of the public benchmarks: AlpacaEval's outputs and annotations, Arena-Hard's answers and judgments.

AlpacaEval keeps lists in JSON files: outputs {instruction, output, generator, dataset}, and annotations
{instruction, output_1, generator_1, output_2, generator_2, annotator, preference, index}, where output_1 is
the baseline's and a preference of 2 says that the model won. Arena-Hard keeps JSON lines: answers
{uid, model, messages, metadata}, judgments {uid, category, judge, model, baseline, games}, where the model is
B in the first game and A in the second.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.errors import UsageError
from sgpo_cli.readers.strict import Fault, printable, strict_json

Message = dict[str, str]
Row = Mapping[str, Any]
BASELINE_IS_A, BASELINE_IS_B = 0, 1  # the games of a judgment
LABELS = {"A": "A>B", "B": "B>A", "tie": "A=B", "invalid": None, None: None}
ORDERS = ("model_second", "model_first")  # of the games in a judgment


@dataclass
class AnswerFile:
    """One model's answers, by what a row can be found with."""

    path: Path
    name: str
    by_id: dict[str, str] = field(default_factory=dict)
    by_prompt: dict[str, list[str]] = field(default_factory=dict)

    def answers(self, rows: Iterable[Row]) -> list[str]:
        """An answer per row; the second row with the same prompt gets the second answer to it, if there are two.

        Raises:
            UsageError: there are rows without an answer.
        """
        asked = Counter[str]()
        found: list[str] = []
        missing = []
        for row in rows:
            prompt = instruction(row["prompt"])
            texts = self.by_prompt.get(prompt, [])
            place = min(asked[prompt], len(texts) - 1)
            asked[prompt] += 1
            if row["id"] in self.by_id:
                found.append(self.by_id[row["id"]])
            elif texts:
                found.append(texts[place])
            else:
                missing.append(row["id"])
        if missing:
            raise UsageError(
                f"{self.path}: no answer to {len(missing)} rows, such as {missing[0]}",
                "rows are found by id (uid), or by the text of the prompt (instruction)",
            )
        return found


def instruction(prompt: list[Message]) -> str:
    """A prompt as AlpacaEval has it, one text: the user's own words where there is nothing else."""
    return prompt[0]["content"] if len(prompt) == 1 else prompts.as_text(prompt)


def is_answer_file(source: str) -> bool:
    """Whether a model is given as a file of its answers."""
    return Path(source).is_file()


def read_answers(path: Path) -> AnswerFile:
    """The answers in a file: AlpacaEval's outputs, Arena-Hard's answers, or JSON lines {id or prompt, response}.

    Raises:
        UsageError: the file is none of these, or holds two answers to one prompt, or those of two models.
    """
    rows = read_records(path)
    names = {str(row[key]) for row in rows for key in ("generator", "model") if row.get(key)}
    if len(names) > 1:
        raise UsageError(f"{path}: answers of {len(names)} models", "one file holds the answers of one model")
    file = AnswerFile(path, names.pop() if names else path.stem)
    for number, row in enumerate(rows, start=1):
        _add_answer(file, row, f"{path}: entry {number}")
    return file


def _add_answer(file: AnswerFile, row: Row, where: str) -> None:
    prompt, text = row.get("instruction", row.get("prompt")), row.get("output", row.get("response"))
    if isinstance(row.get("messages"), list) and row["messages"]:
        *turns, last = row["messages"]
        text = last["content"]["answer"] if isinstance(last.get("content"), dict) else last.get("content")
        prompt = turns
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: no answer in it",
            "expected {instruction, output}, {uid, messages} or {id or prompt, response}",
        )
    if (identity := row.get("uid", row.get("id"))) is not None and file.by_id.setdefault(str(identity), text) != text:
        raise UsageError(f"{where}: another answer with the id {str(identity)[:60]!r} came before")
    if prompt is not None:
        key = instruction(prompt) if isinstance(prompt, list) else str(prompt)
        file.by_prompt.setdefault(key, []).append(text)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON list or of JSON lines.

    Raises:
        UsageError: naming file and line of what is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{printable(str(path))}: {error}", "name a JSON or JSONL file") from None
    listed = text.lstrip().startswith("[")
    parts = [(1, text)] if listed else [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    found: list[Any] = []
    for number, part in parts:
        try:
            value = strict_json(part)
        except Fault as fault:
            raise UsageError(f"{printable(str(path))}:{number}: {fault.message}") from None
        found += value if listed else [value]
    if not found or not all(isinstance(row, dict) for row in found):
        raise UsageError(f"{printable(str(path))}: expected a list of JSON objects")
    return found


def alpaca_outputs(rows: Iterable[tuple[Row, str]], generator: str) -> list[dict[str, Any]]:
    """`model_outputs.json` of one model, from its rows and answers."""
    return [
        {
            "dataset": row.get("dataset", "sgpo"),
            "instruction": instruction(row["prompt"]),
            "output": text,
            "generator": generator,
        }
        for row, text in rows
    ]


def alpaca_annotations(
    rows: Iterable[tuple[Row, str, str, float | None]], generator: str, baseline: str, annotator: str
) -> list[dict[str, Any]]:
    """`annotations.json` of one model: row, its answer, the baseline's, and its preference in 0..1 or None."""
    return [
        {
            "instruction": instruction(row["prompt"]),
            "output_1": other,
            "generator_1": baseline,
            "output_2": own,
            "generator_2": generator,
            "annotator": annotator,
            "preference": None if preference is None else preference + 1,
            "index": index,
        }
        for index, (row, own, other, preference) in enumerate(rows)
    ]


def arena_question(row: Row, category: str) -> dict[str, Any]:
    """A line of `question.jsonl`."""
    return {"uid": row["id"], "category": row.get("category", category), "prompt": instruction(row["prompt"])}


def arena_answer(row: Row, model: str, text: str, style: Mapping[str, Any]) -> dict[str, Any]:
    """A line of `model_answer/<model>.jsonl`."""
    turns = [*row["prompt"], {"role": "assistant", "content": {"answer": text}}]
    return {"uid": row["id"], "ans_id": row["id"], "model": model, "messages": turns, "metadata": dict(style)}


def arena_judgment(
    row: Row, model: str, baseline: str, judge: str, category: str, verdicts: Mapping[str, str | None]
) -> dict[str, Any]:
    """A line of `model_judgment/<judge>/<model>.jsonl`; `verdicts` by order, A being the answer shown first."""
    games: list[dict[str, Any]] = [
        {"score": LABELS[verdicts[order]], "judgment": "", "prompt": []} for order in ORDERS
    ]
    head = {"uid": row["id"], "category": row.get("category", category), "judge": judge}
    return {**head, "model": model, "baseline": baseline, "games": games}


def read_alpaca_annotations(path: Path) -> list[dict[str, Any]]:
    """Checked annotations of one model against one baseline, `preference` in 0..1 or None for none.

    Raises:
        UsageError: naming what is missing or wrong.
    """
    rows = read_records(path)
    for number, row in enumerate(rows, start=1):
        if missing := [name for name in ("output_1", "output_2", "preference") if name not in row]:
            raise UsageError(f"{path}: annotation {number} has no {missing[0]}", "these are no AlpacaEval annotations")
        row["preference"] = _preference(row["preference"], f"{path}: annotation {number}")
    for name in ("generator_1", "generator_2"):
        if len(names := {str(row.get(name)) for row in rows}) > 1:
            raise UsageError(f"{path}: {len(names)} different {name}", "one file compares one model with one baseline")
    return rows


def _preference(value: Any, where: str) -> float | None:
    """Theirs is 1 (baseline) to 2 (model), and 0 or 1.5 for a draw."""
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        if value == 0:
            return 0.5
        if 1 <= value <= 2:
            return float(value) - 1
    raise UsageError(f"{where}: preference {value!r}", "expected a number from 1 (baseline) to 2 (model), or null")


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_json_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
