"""Do the intervals of win rates cover the truth when the judge has faults?

    python benchmarks/winrate_coverage.py

Simulated judges with known truth: for one prompt the model's answer is better with a probability that depends
on the prompt; the judge sees through to it but also likes length, decides 20 % of games by place alone, and
gives no valid verdict in 10 % of games. The truth of the raw rate is the mean of the judge's two orders over
the population of prompts, that of the length-controlled rate is the same with equal lengths. Writes
`benchmarks/winrate_coverage.json`.
"""

import argparse
from typing import Any

import machine
import numpy as np

from sgpo_cli import winrates

PLACE, INVALID = 0.2, 0.1  # shares of games
QUALITY, SPREAD, LENGTH = 0.3, 0.4, 0.8  # of the logit: mean, standard deviation over prompts, effect of tanh(delta)
LONGER = 150.0  # characters that the model writes more than the baseline
PROMPTS, SIMULATIONS, POPULATION = 400, 400, 400_000


def draw_prompts(dice: np.random.Generator, size: int) -> tuple[Any, Any, Any]:
    """Quality logits, and lengths of the model's and the baseline's answers."""
    baseline = dice.gamma(4, 200, size)
    return dice.normal(QUALITY, SPREAD, size), baseline * dice.lognormal(0, 0.4, size) + LONGER, baseline


def judged(dice: np.random.Generator, chance: Any) -> tuple[Any, Any]:
    """Games with the model shown first and second: whether the answer shown first won, and who that was."""
    model_first = np.tile([[True, False]], (len(chance), 1))
    better = dice.random((len(chance), 2)) < chance[:, None]
    honest = np.where(model_first, better, ~better)
    by_place = dice.random(honest.shape) < PLACE
    first_won = np.where(by_place, True, honest).astype(float)
    return np.where(dice.random(honest.shape) < INVALID, np.nan, first_won), model_first


def chances(quality: Any, lengths: Any, baseline: Any, spread: float) -> Any:
    return winrates.logistic(quality + LENGTH * np.tanh((lengths - baseline) / spread))


def neutral(chance: Any) -> float:
    """The mean of the two orders: a game decided by place is won in one order and lost in the other."""
    return float((PLACE / 2 + (1 - PLACE) * chance).mean())


def truths(dice: np.random.Generator) -> tuple[float, float, float]:
    """The raw and the length-controlled rate of the population, and its spread of length differences."""
    quality, lengths, baseline = draw_prompts(dice, POPULATION)
    spread = float((baseline - lengths).std(ddof=1))
    equal = neutral(chances(quality, baseline, baseline, spread))
    return neutral(chances(quality, lengths, baseline, spread)), equal, spread


def measure(simulations: int, prompts: int) -> dict[str, Any]:
    """Coverage of the 95 % intervals and mean errors, of the rates and of a judge that is asked in one order."""
    dice = np.random.default_rng(1)
    raw, controlled, spread = truths(dice)
    found: dict[str, list[tuple[float, tuple[float, float]]]] = {"raw": [], "length_controlled": [], "one": []}
    bias = []
    for seed in range(simulations):
        quality, lengths, baseline = draw_prompts(dice, prompts)
        first_won, model_first = judged(dice, chances(quality, lengths, baseline, spread))
        both = winrates.preferences_of(first_won, model_first)
        facts = winrates.summary(both, lengths, baseline, seed)
        found["raw"].append((facts["win_rate"], facts["ci95"]))
        found["length_controlled"].append((facts["lc_win_rate"], facts["lc_ci95"]))
        one = winrates.summary(first_won[:, 0], lengths, baseline, seed)
        found["one"].append((one["win_rate"], one["ci95"]))
        bias.append(winrates.position_bias(first_won, model_first))
    return {
        "simulations": simulations,
        "prompts": prompts,
        "judge": {"by_place": PLACE, "invalid": INVALID, "length_effect": LENGTH},
        "raw": _covered(found["raw"], raw),
        "length_controlled": _covered(found["length_controlled"], controlled),
        "one_order_always": _covered(found["one"], raw),
        "first_position_wins": round(float(np.mean([each["first_position_wins"] for each in bias])), 4),
        "consistency": round(float(np.mean([each["consistency"] for each in bias])), 4),
    }


def _covered(found: list[tuple[float, tuple[float, float]]], truth: float) -> dict[str, float]:
    inside = [low <= truth <= high for _, (low, high) in found]
    error = np.mean([rate for rate, _ in found]) - truth
    return {
        "truth": round(truth, 4),
        "coverage": round(float(np.mean(inside)), 4),
        "mean_error_points": round(100 * float(error), 3),
        "mean_width_points": round(100 * float(np.mean([high - low for _, (low, high) in found])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=SIMULATIONS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    arguments = parser.parse_args()
    figures = measure(arguments.simulations, arguments.prompts)
    machine.write("winrate_coverage", figures)
    for name in ("raw", "length_controlled", "one_order_always"):
        print(name, figures[name])


if __name__ == "__main__":
    main()
