"""Win rates against a baseline: pure functions on arrays. Knows nothing of judges, models or files.

A preference says how the model's answer to one prompt did: 1 it won, 0 the baseline's won, 0.5 a tie, NaN when
there is no valid verdict. Rates are shares of the valid verdicts, ties counted half; intervals are 95 %
percentile bootstrap intervals, resampling prompts (Efron and Tibshirani 1993, chapter 13).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RESAMPLES = 2000
RIDGE = 1e-8  # keeps a separated fit finite; moves no other by more than 1e-9
STEPS = 200
LARGEST_STEP = 3.0
CLOSE_ENOUGH = 1e-7  # of a step; the next one is its square
CELLS = 4_000_000  # numbers in memory at once while resampling
GAMED_WEIGHT = 0.2  # AlpacaEval's weight of the gamed baselines' annotations ...
GAMED_BASELINES = 2  # ... shared by so many of them


def fit_logistic(features: Array, outcomes: Array, weights: Array) -> Array:
    """Logistic regression with fractional outcomes and no intercept of its own, by Newton's method.

        maximise  sum_i w_i [y_i log s(x_i b) + (1 - y_i) log s(-x_i b)] - RIDGE/2 |b|^2      (1)
        step      (X' diag(w p (1 - p)) X + RIDGE)^-1 (X' w (y - p) - RIDGE b),  p = s(X b)   (2)

    with s the logistic function: a binomial GLM with the logit link (McCullagh and Nelder 1989, section 4.4).

    Args:
        features: X, [rows, columns].
        outcomes: y in [0, 1], [rows].
        weights: w, [fits, rows]; every line is a fit of its own, as bootstrap resamples are.

    Returns:
        b, [fits, columns].
    """
    columns = features.shape[1]
    products = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    found, ridge = np.zeros((len(weights), columns)), RIDGE * np.eye(columns)
    active = np.arange(len(weights))
    for _ in range(STEPS):
        at, weight = found[active], weights[active]
        chance = logistic(at @ features.T)
        slope = (weight * (outcomes - chance)) @ features - RIDGE * at
        curvature = ((weight * chance * (1 - chance)) @ products).reshape(-1, columns, columns) + ridge
        step = np.linalg.solve(curvature, slope[:, :, None])[:, :, 0]
        size = np.abs(step).max(axis=1)
        # Newton's method overshoots where the curvature is nearly nothing.
        found[active] += step * np.minimum(1, LARGEST_STEP / np.maximum(size, LARGEST_STEP))[:, None]
        active = active[size > CLOSE_ENOUGH * (1 + np.abs(at).max(axis=1))]
        if not len(active):
            break
    return found


def logistic(values: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))


def resampled(statistic: Callable[[Array], Array], size: int, seed: int) -> Array:
    """The bootstrap distribution of `statistic`.

    Args:
        statistic: from how often each of `size` things was drawn, [resamples, size], to [resamples, ...].
    """
    dice = np.random.default_rng(seed)
    at_once = max(1, CELLS // size)
    parts = [
        statistic(dice.multinomial(size, np.full(size, 1 / size), min(at_once, RESAMPLES - start)).astype(float))
        for start in range(0, RESAMPLES, at_once)
    ]
    return np.concatenate(parts)


def interval(draws: Array) -> tuple[float, float]:
    """The middle 95 % of a bootstrap distribution; NaN where it has one."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Array, seed: int) -> tuple[float, float]:
    """The 95 % bootstrap interval of a mean."""
    dice, at_once = np.random.default_rng(seed), max(1, CELLS // len(values))
    means = [
        values[dice.integers(0, len(values), (min(at_once, RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]
    return interval(np.concatenate(means))


@dataclass(frozen=True)
class Official:
    """AlpacaEval's own files for its 805 prompts, for the model `length_controlled_v1`.

    Args:
        difficulty: g of equation (3) per row of the comparison.
        gamed: annotations of baselines that were told to be verbose or concise, [rows, 3]:
            preference in [0, 1], the standardised length difference, difficulty; None to leave them out.
    """

    difficulty: Array
    gamed: Array | None = None


@dataclass(frozen=True)
class LengthModel:
    """AlpacaEval 2's model of a preference (Dubois et al. 2024, arXiv 2404.04475, section 3):

        P(the model wins on x) = s(theta + phi tanh(delta_x) + psi g_x)                       (3)
        delta_x = (l_baseline(x) - l_model(x)) / std(l_baseline - l_model)

    with l the length in characters and g the difficulty of the instruction. Without the official files the
    last term is left out (their `length_controlled_minimal`).
    """

    features: Array  # [rows + gamed rows, columns]: theta's, phi's and, with the official files, psi's
    outcomes: Array
    weights: Array  # of the gamed rows, which no resample changes
    rows: int

    def rate(self, counts: Array) -> Array:
        """The length-controlled win rate, [resamples]: the mean of (3) over the rows with delta_x = 0."""
        gamed = np.broadcast_to(self.weights, (len(counts), len(self.weights)))
        found = fit_logistic(self.features, self.outcomes, np.hstack([counts, gamed]))
        level = self.features[: self.rows].copy()
        level[:, 1] = 0
        chance = logistic(found @ level.T)
        return np.asarray((chance * counts).sum(axis=1) / counts.sum(axis=1))


def length_model(
    preferences: Array, lengths: Array, baseline_lengths: Array, official: Official | None = None
) -> LengthModel | None:
    """The model of `length_controlled`, or None where the lengths differ by the same amount everywhere."""
    difference = baseline_lengths - lengths
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    if spread == 0 and difference.any():
        return None
    delta = np.tanh(difference / (spread or 1.0))
    columns = [np.ones(len(delta)), delta]
    if official is None:
        return LengthModel(np.stack(columns, axis=1), preferences, np.zeros(0), len(delta))
    features = np.stack([*columns, official.difficulty], axis=1)
    if official.gamed is None:
        return LengthModel(features, preferences, np.zeros(0), len(delta))
    more = np.stack([np.zeros(len(official.gamed)), np.tanh(official.gamed[:, 1]), official.gamed[:, 2]], axis=1)
    return LengthModel(
        np.vstack([features, more]),
        np.concatenate([preferences, official.gamed[:, 0]]),
        np.full(len(more), GAMED_WEIGHT / GAMED_BASELINES),
        len(delta),
    )


def length_controlled(
    preferences: Array, lengths: Array, baseline_lengths: Array, official: Official | None = None
) -> float:
    """The length-controlled win rate in 0..1, or NaN where the effect of length cannot be told; all valid."""
    model = length_model(preferences, lengths, baseline_lengths, official)
    return math.nan if model is None else float(model.rate(np.ones((1, len(preferences))))[0])


def preferences_of(first_won: Array, model_first: NDArray[np.bool_]) -> Array:
    """One preference per prompt from its games: agreeing orders decide, disagreeing ones are a tie.

    Args:
        first_won: [prompts, games]; 1 the answer shown first won, 0 the other, 0.5 a tie, NaN invalid.
        model_first: [prompts, games]; whether the model's answer was shown first.
    """
    scores = np.where(model_first, first_won, 1 - first_won)
    agreed = (scores == scores[:, :1]).all(axis=1)
    return np.where(np.isnan(scores).any(axis=1), np.nan, np.where(agreed, scores[:, 0], 0.5))


def position_bias(first_won: Array, model_first: NDArray[np.bool_]) -> dict[str, float]:
    """How often the answer shown first won, of decided games, and how often the orders agreed, of valid prompts.

    0.5 and 1 where the place plays no part. NaN where nothing was decided, or there is one game a prompt.
    """
    decided = (first_won == 0) | (first_won == 1)
    scores = np.where(model_first, first_won, 1 - first_won)
    whole = scores[~np.isnan(scores).any(axis=1)]
    agreed = (whole == whole[:, :1]).all(axis=1)
    both = first_won.shape[1] > 1 and len(whole)
    return {
        "first_position_wins": float(first_won[decided].mean()) if decided.any() else math.nan,
        "consistency": float(agreed.mean()) if both else math.nan,
    }


def sign_test(wins: int, losses: int) -> float:
    """The exact two-sided p-value that wins and losses are equally likely; ties left out (Dixon and Mood 1946)."""
    games, fewer = wins + losses, min(wins, losses)
    tail = math.fsum(
        math.exp(math.lgamma(games + 1) - math.lgamma(k + 1) - math.lgamma(games - k + 1) - games * math.log(2))
        for k in range(fewer + 1)
    )
    return min(1.0, 2 * tail)


def summary(
    preferences: Array,
    lengths: Array,
    baseline_lengths: Array,
    seed: int,
    official: Official | None = None,
) -> dict[str, Any]:
    """All that is said of one model against the baseline, as numbers in 0..1.

    Args:
        preferences: [prompts], NaN for invalid verdicts.
        lengths: of the model's answers in characters, [prompts].

    Returns:
        `win_rate`, `ci95`, `lc_win_rate`, `lc_ci95`, `wins`, `losses`, `ties`, `invalid` (counts), `n`,
        `sign_test_p`, `length`, `baseline_length` (means); None for a number that does not exist.
    """
    valid = ~np.isnan(preferences)
    scores, own, other = preferences[valid], lengths[valid], baseline_lengths[valid]
    wins, losses = int((scores > 0.5).sum()), int((scores < 0.5).sum())
    facts: dict[str, Any] = {
        "n": len(preferences),
        "wins": wins,
        "losses": losses,
        "ties": len(scores) - wins - losses,
        "invalid": int((~valid).sum()),
        "sign_test_p": sign_test(wins, losses),
        "length": float(lengths.mean()),
        "baseline_length": float(baseline_lengths.mean()),
    }
    rates: dict[str, Any] = dict.fromkeys(("win_rate", "ci95", "lc_win_rate", "lc_ci95"))
    if len(scores):
        if official is not None:
            official = Official(official.difficulty[valid], official.gamed)
        rates |= _rates(scores, length_model(scores, own, other, official), seed)
    return rates | facts


def _rates(scores: Array, model: LengthModel | None, seed: int) -> dict[str, Any]:
    everything = np.ones((1, len(scores)))
    raw = resampled(lambda counts: counts @ scores / len(scores), len(scores), seed)
    rates: dict[str, Any] = {"win_rate": float(scores.mean()), "ci95": interval(raw)}
    if model is not None:
        rates["lc_win_rate"] = float(model.rate(everything)[0])
        rates["lc_ci95"] = interval(resampled(model.rate, len(scores), seed))
    return rates
