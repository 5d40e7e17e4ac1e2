"""The guard's rules: from what was measured to healthy, spent or broken. Pure; the stages measure.

A repetition that nobody watches destroys a model: an improver that has nothing more to teach, or damages good
answers, makes pairs that teach the wrong thing. `spent`: no harm is seen, but going on as before would do some.
`broken`: harm is seen. Ties are no harm; of the pairs that are none, the better must be many more than the worse.
benchmarks/guard.py tries the limits' defaults on hostile and healthy rounds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sgpo_cli.artifacts import read_manifest
from sgpo_cli.errors import StoppedError, UsageError
from sgpo_cli.guard_configs import CheckPairsConfig, CheckPolicyConfig

Health = Literal["healthy", "spent", "broken"]
Rule = tuple[Health, bool, str]
Measures = Mapping[str, Any]

EXCHANGED = 0.9  # of the pairs that are better or worse: more of them worse is no improver's doing
FEW = 3  # answers that may go wrong by chance, however few there are
WORST: tuple[Health, ...] = ("broken", "spent", "healthy")
REMEDIES = {
    "spent": "train the improver anew on targets for the newest policy's answers, those that need no change included, "
    "and give it fresh prompts",
    "broken": "lower the learning rate or the sampling temperature, or train the improver anew from the last good "
    "model",
}


@dataclass(frozen=True)
class Verdict:
    """What the guard says, and a sentence for each rule that speaks against health."""

    health: Health
    reasons: list[str]


def _verdict(rules: Iterable[Rule]) -> Verdict:
    found = [(health, text) for health, is_so, text in rules if is_so]
    health: Health = next((each for each in WORST if any(each == said for said, _ in found)), "healthy")
    return Verdict(health, [text for _, text in sorted(found, key=lambda each: WORST.index(each[0]))])


def of_pairs(found: Measures, limits: CheckPairsConfig) -> Verdict:
    """The verdict on pairs, from `wins`, `ties` and `losses` (counts of a sample; chosen against rejected),
    `pairs`, `prompts` and `unusable` (counts of all), the texts' `repetitive` and `length_ratio`, and without a
    judge `log_prob_gap` (nats per token under the policy, of chosen above rejected).
    """
    return _verdict([*_contest_rules(found, limits), *_text_rules(found, limits)])


def _contest_rules(found: Measures, limits: CheckPairsConfig) -> Iterator[Rule]:
    wins, losses, who = found["wins"], found["losses"], found["by"]
    compared = wins + found["ties"] + losses
    decided = max(wins + losses, 1)
    said = f"by the {who}, the chosen text is better in {wins} and worse in {losses} of {compared} pairs"
    harm = losses > 0 and wins <= losses
    exchanged = "; are chosen and rejected exchanged?" if losses > EXCHANGED * decided else ""
    yield "broken", harm, said + exchanged
    yield "spent", not harm and wins < limits.min_win_share * decided, f"{said}: under {limits.min_win_share:.0%}"
    better = wins / max(compared, 1) * found["pairs"] / max(found["prompts"], 1)
    yield (
        "spent",
        better < limits.min_better_share,
        f"{better:.1%} of {found['prompts']} answers were improved, {found['identical']} came back unchanged",
    )
    few = f"{found['pairs']} pairs, at least {limits.min_pairs} are needed: give more prompts, or --min-pairs"
    yield "spent", found["pairs"] < limits.min_pairs, few


def _text_rules(found: Measures, limits: CheckPairsConfig) -> Iterator[Rule]:
    unusable = found["unusable"] / max(found["prompts"], 1)
    yield (
        "broken",
        unusable > limits.max_bad_share,
        f"{unusable:.1%} of the pairs were cut, empty or the like",
    )
    gap = found.get("log_prob_gap", 0.0)  # a damaged improver may prefer its own texts; as policy it finds them odd
    text = f"to the policy the chosen texts are implausible, by {-gap:.2f} nats a token"
    yield "broken", gap < limits.min_log_prob_gap, text
    worse = found["repetitive"]["chosen"] - found["repetitive"]["rejected"]
    yield "broken", worse > limits.max_bad_share, f"{worse:.1%} more of the chosen texts repeat themselves"
    ratio = found["length_ratio"]
    runaway = not 1 / limits.max_length_ratio <= ratio <= limits.max_length_ratio
    yield "broken", runaway, f"chosen is typically {ratio:.1f} times as long as rejected"


def of_policy(found: Measures, limits: CheckPolicyConfig) -> Verdict:
    """The verdict on a new model, from its answers and those of the last good one.

    Args:
        found: `bad` shares by answers and model, `length_ratio`; with a judge `differences`: name -> (mean, low,
            high) of new minus previous; without one `wins`, `ties`, `losses` of the new answers, the same in
            `improved` of the new model's improvements of them, and `surprise` (nats per token, of the new answers
            more than of the previous ones).
    """
    contest = _judged_rules(found, limits) if "differences" in found else _unjudged_rules(found, limits)
    return _verdict([*contest, *_answer_rules(found, limits)])


def _judged_rules(found: Measures, limits: CheckPolicyConfig) -> Iterator[Rule]:
    for name, (mean, low, high) in found["differences"].items():
        fell = high < 0 and mean < -limits.tolerance
        interval = f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"
        if name == "improver_over_policy":
            text = f"the new model's improvements are worse than its answers ({interval}): it would teach itself harm"
            yield "spent", fell, text
        else:
            yield "broken", fell, f"the {name.replace('_', ' ')} answers fell below the last good model's ({interval})"


def _unjudged_rules(found: Measures, limits: CheckPolicyConfig) -> Iterator[Rule]:
    said = "the last good model prefers the {} in {} and the {} in {} cases"
    wins, losses = found["wins"], found["losses"]
    yield "broken", _lost(found, limits), said.format("new answer", wins, "previous one", losses)
    wins, losses = found["improved"]["wins"], found["improved"]["losses"]
    yield "spent", _lost(found["improved"], limits), said.format("improvement", wins, "new answer before it", losses)
    surprise = found["surprise"]
    text = f"the new answers are implausible to the last good model, by {surprise:.2f} nats a token"
    yield "broken", surprise > limits.max_surprise, text


def _lost(found: Measures, limits: CheckPolicyConfig) -> bool:
    compared = found["wins"] + found["ties"] + found["losses"]
    return bool(found["losses"] > max(limits.max_lost_share * compared, found["wins"]))


def _answer_rules(found: Measures, limits: CheckPolicyConfig) -> Iterator[Rule]:
    prompts = found["prompts"]
    for name, shares in found["bad"].items():
        now, before = (round(shares[who] * prompts) for who in ("model", "previous"))
        what = f"{now} of {prompts} {name.replace('_', ' ')} answers are empty, cut, repetitive or the like"
        health: Health = "spent" if name.startswith("improver") else "broken"
        rose = shares["model"] - shares["previous"] > limits.max_bad_rise and now - before >= FEW
        yield health, rose, f"{what}, {before} before"
    ratio = found["length_ratio"]
    runaway = not 1 / limits.max_length_ratio <= ratio <= limits.max_length_ratio
    yield "broken", runaway, f"the new answers are typically {ratio:.1f} times as long as the previous ones"


def refuse_silence(scored: int, asked: int, what: str) -> None:
    """Raises UsageError when a judge has scored less than half of what it was asked: that is no verdict."""
    if 2 * scored < asked:
        raise UsageError(f"the judge scored {scored} of {asked} {what}: too few for a verdict", "look at the judge")


def refuse(directory: Path) -> None:
    """Stop if the check in `directory` says so; other steps say nothing.

    Raises:
        StoppedError: its verdict is not healthy.
    """
    manifest = read_manifest(directory) or {}
    verdict = manifest.get("verdict", "healthy")
    if verdict == "healthy":
        return
    lines = [f"{directory}: the guard says {verdict}; the result is {manifest['best']}", *manifest["reasons"]]
    raise StoppedError("\n  ".join(lines), f"{REMEDIES[verdict]}; {manifest['best']} is untouched")
