"""The guard's rules: from what was measured to healthy, spent or broken. Pure; the stages measure.

A repetition that nobody watches destroys a model: an improver that has nothing more to teach, or damages good
answers, makes pairs that teach the wrong thing. `spent`: no harm is seen, but going on as before would do some.
`broken`: harm is seen. Ties are no harm; of the pairs that are none, the better must be many more than the worse.
benchmarks/guard.py tries the limits' defaults on hostile and healthy rounds.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sgpo_cli.artifacts import read_manifest
from sgpo_cli.errors import StoppedError, UsageError
from sgpo_cli.guard_configs import CheckPairsConfig, CheckPolicyConfig

Health = Literal["healthy", "spent", "broken"]
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
LOOK = "look at some pairs: chosen and rejected may be exchanged; if they are not, "
MORE = "give more prompts, or --min-pairs"


class Rule(NamedTuple):
    """What speaks against health when it `is_so`; `remedy` where it is not that of its health."""

    health: Health
    is_so: bool
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the guard says, a sentence for each rule that speaks against health, and what to do about the worst."""

    health: Health
    reasons: list[str]
    remedy: str = ""


def _verdict(rules: Iterable[Rule]) -> Verdict:
    found = sorted((rule for rule in rules if rule.is_so), key=lambda rule: WORST.index(rule.health))
    if not found:
        return Verdict("healthy", [])
    worst = found[0].health
    remedies = [rule.remedy or REMEDIES[worst] for rule in found if rule.health == worst]
    first = [each for each in remedies if each.startswith(LOOK)]  # it ends with the usual one
    return Verdict(worst, [rule.text for rule in found], "; or ".join(dict.fromkeys(first or remedies)))


def of_pairs(found: Measures, limits: CheckPairsConfig) -> Verdict:
    """The verdict on pairs, from `wins`, `ties` and `losses` (counts of a sample; chosen against rejected),
    `pairs`, `prompts`, `identical` and `unusable` (counts of all), the size of the `sample`, its texts' `repetitive`
    and `length_ratio`, and without a judge `log_prob_gap` (nats per token under the policy, of chosen above rejected).
    """
    return _verdict([*_contest_rules(found, limits), *_text_rules(found, limits)])


def _share_of(share: float, count: int) -> str:
    """`3 of 60 (5.0%)`: of a few, a percentage says too much."""
    return f"{round(share * count)} of {count} ({share:.1%})"


def _contest_rules(found: Measures, limits: CheckPairsConfig) -> Iterator[Rule]:
    wins, losses, who = found["wins"], found["losses"], found["by"]
    compared = wins + found["ties"] + losses
    decided = max(wins + losses, 1)
    said = f"by the {who}, the chosen text is better in {wins} and worse in {losses} of {compared} pairs"
    harm = losses > 0 and wins <= losses
    exchanged = LOOK + REMEDIES["broken"] if losses > EXCHANGED * decided else ""
    yield Rule("broken", harm, said, exchanged)
    rarely = not harm and wins < limits.min_win_share * decided
    yield Rule("spent", rarely, f"{said}: under {limits.min_win_share:.0%}")
    better = wins / max(compared, 1) * found["pairs"] / max(found["prompts"], 1)
    yield Rule(
        "spent",
        better < limits.min_better_share,
        f"{_share_of(better, found['prompts'])} answers were improved, {found['identical']} came back unchanged",
    )
    few = f"{found['pairs']} pairs, at least {limits.min_pairs} are needed"
    yield Rule("spent", found["pairs"] < limits.min_pairs, few, MORE)


def _text_rules(found: Measures, limits: CheckPairsConfig) -> Iterator[Rule]:
    unusable = found["unusable"] / max(found["prompts"], 1)
    yield Rule(
        "broken",
        unusable > limits.max_bad_share,
        f"{_share_of(unusable, found['prompts'])} pairs were cut, empty or the like",
    )
    gap = found.get("log_prob_gap", 0.0)  # a damaged improver may prefer its own texts; as policy it finds them odd
    text = f"to the policy the chosen texts are implausible, by {-gap:.2f} nats a token"
    yield Rule("broken", gap < limits.min_log_prob_gap, text)
    chosen, rejected = (_share_of(found["repetitive"][name], found["sample"]) for name in ("chosen", "rejected"))
    worse = found["repetitive"]["chosen"] - found["repetitive"]["rejected"] > limits.max_bad_share
    yield Rule("broken", worse, f"{chosen} chosen texts repeat themselves, {rejected} rejected ones")
    ratio = found["length_ratio"]
    runaway = not 1 / limits.max_length_ratio <= ratio <= limits.max_length_ratio
    yield Rule("broken", runaway, f"chosen is typically {ratio:.1f} times as long as rejected")


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
            yield Rule("spent", fell, text)
        else:
            text = f"the {name.replace('_', ' ')} answers fell below the last good model's ({interval})"
            yield Rule("broken", fell, text)


def _unjudged_rules(found: Measures, limits: CheckPolicyConfig) -> Iterator[Rule]:
    said = "the last good model prefers the {} in {} and the {} in {} cases"
    text = said.format("new answer", found["wins"], "previous one", found["losses"])
    yield Rule("broken", _lost(found, limits), text)
    improved = found["improved"]
    text = said.format("improvement", improved["wins"], "new answer before it", improved["losses"])
    yield Rule("spent", _lost(improved, limits), text)
    surprise = found["surprise"]
    text = f"the new answers are implausible to the last good model, by {surprise:.2f} nats a token"
    yield Rule("broken", surprise > limits.max_surprise, text)


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
        yield Rule(health, rose, f"{what}, {before} before")
    ratio = found["length_ratio"]
    runaway = not 1 / limits.max_length_ratio <= ratio <= limits.max_length_ratio
    yield Rule("broken", runaway, f"the new answers are typically {ratio:.1f} times as long as the previous ones")


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
    remedy = manifest.get("remedy", REMEDIES[verdict])  # checks made before had none of their own
    raise StoppedError("\n  ".join(lines), f"{remedy}; {manifest['best']} is untouched")
