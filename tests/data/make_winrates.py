"""Makes `winrates.json`: fixed annotations, and what the public tools say of them.

    python tests/data/make_winrates.py --official-files DIR    # in an environment with alpaca_eval and statsmodels
    python tests/data/make_winrates.py --arena-hard NUMBERS.json

The first command draws the annotations from a fixed seed, writes them to DIR in the formats of the public tools,
and runs alpaca_eval 0.6.6 (`setuptools<81`) and statsmodels on them. The numbers of Arena-Hard come from its
repository at commit 196f6b8, run by hand in DIR: `show_result.py -f length markdown` and `show_result.py`, and
from `fit_pairwise_model` on all battles at once; the second command adds them.
"""

import argparse
import json
import math
import random
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "winrates.json"
PROMPTS, GAMED = 400, 2
BASELINE, CATEGORY = "o3-mini-2025-01-31", "hard_prompt"
LABELS = ("A>>B", "A>B", "A=B", "B>A", "B>>A")


def chance(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def alpaca_inputs(dice: random.Random) -> dict[str, Any]:
    """Preferences that depend on length and difficulty; some are ties, some graded."""
    rows, gamed = [], []
    for _ in range(PROMPTS):
        length_1, length_2 = dice.randint(5, 160), dice.randint(20, 220)
        difficulty = round(dice.gauss(0, 1), 6)
        p = chance(0.3 + 1.2 * math.tanh((length_2 - length_1) / 80) + 0.5 * difficulty)
        kind = dice.random()
        preference = 1.5 if kind < 0.1 else round(1 + p, 6) if kind < 0.4 else 1 + int(dice.random() < p)
        rows.append([preference, length_1, length_2, difficulty])
    for sign in (1, -1):
        for _, _, _, difficulty in rows:
            delta = round(sign * abs(dice.gauss(1, 0.5)), 6)
            gamed.append([round(chance(0.9 * math.tanh(delta) + dice.gauss(0, 0.3)), 6), delta, difficulty])
    return {"rows": rows, "gamed": gamed}


def arena_inputs(dice: random.Random) -> dict[str, Any]:
    """Two models against the baseline, with styles that the judge likes."""

    def style() -> list[int]:
        return [dice.randint(20, 900), dice.randint(0, 6), dice.randint(0, 20), dice.randint(0, 12)]

    styles = {name: [style() for _ in range(PROMPTS)] for name in ("one", "two", BASELINE)}
    games: dict[str, list[list[str | None]]] = {}
    for name, strength in (("one", 0.5), ("two", -0.7)):
        games[name] = []
        for own, other in zip(styles[name], styles[BASELINE], strict=True):
            taste = strength + 1.5 * (own[0] - other[0]) / (own[0] + other[0]) + 0.02 * (own[2] - other[2])
            pair: list[str | None] = []
            for model_first in (False, True):
                value = (taste if model_first else -taste) + 0.3 + dice.gauss(0, 1.2)
                place = sum(value < bound for bound in (1.8, 0.25, -0.25, -1.8))
                pair.append(None if dice.random() < 0.02 else LABELS[place])
            games[name].append(pair)
    return {"styles": styles, "games": games}


def write_official(directory: Path, alpaca: dict[str, Any], arena: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    annotations = [
        {
            "instruction": f"Instruction {index}",
            "output_1": "b" * length_1,
            "generator_1": "baseline",
            "output_2": "m" * length_2,
            "generator_2": "model",
            "annotator": "fixture",
            "preference": preference,
            "index": index,
        }
        for index, (preference, length_1, length_2, _) in enumerate(alpaca["rows"])
    ]
    (directory / "annotations.json").write_text(json.dumps(annotations))
    lines = ["model,preference,index,std_delta_len,instruction_difficulty,not_gamed_baseline"]
    for number, (preference, delta, difficulty) in enumerate(alpaca["gamed"]):
        lines.append(f"gamed{number // PROMPTS},{preference},{number % PROMPTS},{delta},{difficulty},False")
    (directory / "df_gamed.csv").write_text("\n".join(lines) + "\n")
    data = directory / "data" / "arena-hard-v2.0"
    for name, styles in arena["styles"].items():
        rows = [
            {"uid": f"u{number}", "model": name, "metadata": _metadata(style)} for number, style in enumerate(styles)
        ]
        _write_lines(data / "model_answer" / f"{name}.jsonl", rows)
    for name, pairs in arena["games"].items():
        head = {"category": CATEGORY, "judge": "gpt-4.1", "model": name, "baseline": BASELINE}
        judged = [{"uid": f"u{n}", **head, "games": [{"score": s} for s in pair]} for n, pair in enumerate(pairs)]
        _write_lines(data / "model_judgment" / "gpt-4.1" / f"{name}.jsonl", judged)


def _metadata(style: list[int]) -> dict[str, Any]:
    length, headers, lists, bold = style
    return {
        "token_len": length,
        "header_count": {"h1": 0, "h2": headers, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 0, "unordered": lists},
        "bold_count": {"**": bold, "__": 0},
    }


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def alpaca_expected(directory: Path) -> dict[str, Any]:
    """What alpaca_eval and statsmodels say; its download of df_gamed.csv is replaced by ours."""
    import numpy as np
    import pandas as pd
    import statsmodels.api as sm
    from alpaca_eval.metrics import glm_winrate

    glm_winrate.hf_hub_download = lambda *_, filename, **__: str(directory / filename)
    annotations = pd.read_json(directory / "annotations.json")
    expected: dict[str, Any] = {}
    for name in ("length_controlled_minimal", "length_controlled_noreg", "length_controlled_v1"):
        found = glm_winrate.get_length_controlled_winrate(annotations.copy(), glm_name=name, save_weights_dir=None)
        expected[name] = found["length_controlled_winrate"]
        expected["win_rate"] = found["win_rate"]
    length_1, length_2 = annotations.output_1.str.len(), annotations.output_2.str.len()
    delta = np.tanh((length_1 - length_2) / (length_1 - length_2).std())
    features = np.stack([np.ones(len(delta)), delta], axis=1)
    fit = sm.GLM(annotations.preference - 1, features, family=sm.families.Binomial()).fit(tol=1e-12)
    expected["statsmodels_minimal"] = float(100 / (1 + np.exp(-fit.params.iloc[0])))
    expected["statsmodels_coefficients"] = list(map(float, fit.params))
    difficulty = pd.read_csv(directory / "df_gamed.csv").drop_duplicates("index").instruction_difficulty.to_numpy()
    fit = sm.GLM(annotations.preference - 1, np.column_stack([features, difficulty]), family=sm.families.Binomial())
    theta, _, psi = fit.fit(tol=1e-12).params
    expected["statsmodels_noreg"] = float((100 / (1 + np.exp(-theta - psi * difficulty))).mean())
    return {name: np.asarray(value).tolist() for name, value in expected.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official-files", type=Path)
    parser.add_argument("--arena-hard", type=Path)
    arguments = parser.parse_args()
    dice = random.Random(20260)
    alpaca, arena = alpaca_inputs(dice), arena_inputs(dice)
    expected = json.loads(HERE.read_text())["expected"] if HERE.exists() else {}
    if arguments.official_files:
        write_official(arguments.official_files, alpaca, arena)
        expected["alpaca_eval"] = alpaca_expected(arguments.official_files)
    if arguments.arena_hard:
        expected["arena_hard"] = json.loads(arguments.arena_hard.read_text())
    text = json.dumps({"made_by": "make_winrates.py", "expected": expected, "alpaca": alpaca, "arena": arena})
    HERE.write_text(text.replace('"expected"', '\n"expected"').replace('"alpaca":', '\n"alpaca":') + "\n")


if __name__ == "__main__":
    main()
