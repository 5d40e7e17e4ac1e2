"""check-policy: did policy or improver fall in a DPO? Its manifest holds the verdict; `sgpo run` stops on a bad one.

Both models answer held-out prompts as policy, and improve their sampled answers as gen-pairs would, greedily.
"""

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from itertools import chain
from statistics import fmean, median
from typing import Any

from sgpo_cli import guard, prompts
from sgpo_cli.artifacts import write_atomically
from sgpo_cli.batches import Batches, Row
from sgpo_cli.dataset import read_dataset
from sgpo_cli.engines import Generation, LazyEngine, Sampling
from sgpo_cli.errors import UsageError
from sgpo_cli.gates import META_TALK, text_problem
from sgpo_cli.generation import Lazy, Passes, seeds_for
from sgpo_cli.guard_configs import CheckPolicyConfig
from sgpo_cli.measures import REPETITIVE, length_ratio, repetition, script
from sgpo_cli.preference import margins, preferred
from sgpo_cli.ranks import SharedWorkDone
from sgpo_cli.remote.connect import open_generation
from sgpo_cli.score_functions import open_function
from sgpo_cli.step import Step

Answers = dict[str, Sequence[Generation]]
Scores = dict[str, dict[str, Sequence[float | None]]]
MIN_PROMPTS = 16
COLUMNS = ("policy_sampled", "policy_greedy", "improver_greedy")


def run(config: CheckPolicyConfig, step: Step) -> None:
    rows = read_dataset(config, ("prompt",), config.model)
    if len(rows) < MIN_PROMPTS:
        raise UsageError(f"{len(rows)} prompts say too little of a model", f"give at least {MIN_PROMPTS}")
    settings: dict[str, Any] = {"dtype": config.dtype, "chat_template_kwargs": config.chat_template_kwargs}
    judge = open_function(config.judge, rows, settings) if config.judge else None
    with step, Passes(step, config.batch_size) as passes:
        said = {name: _answer(name, getattr(config, name), rows, passes, config) for name in ("previous", "model")}
        if not step.rank.is_main:
            raise SharedWorkDone
        measures: dict[str, Any] = {
            "prompts": len(rows),
            "by": "judge" if judge else "improver",
            "bad": {column: _bad(rows, said, column) for column in COLUMNS},
            "length_ratio": _length_ratio(said, "policy_greedy"),
        }
        if judge is None:
            measures |= _preference(rows, said, config, step)
        else:
            scores: Scores = {who: {c: judge()(_rows(rows, said[who][c])) for c in COLUMNS} for who in said}
            measures |= compared(scores, config.seed)
        verdict = guard.of_policy(measures, config)
        best = config.previous if verdict.health == "broken" else config.model
        facts: dict[str, Any] = {"verdict": verdict.health, "reasons": verdict.reasons, "remedy": verdict.remedy}
        facts |= {"best": best, "measures": measures}
        write_atomically(step.directory / "verdict.json", json.dumps(facts, indent=2) + "\n")
        step.finish(["verdict.json"], facts | passes.stats)


def _answer(name: str, model: str, rows: Sequence[Row], passes: Passes, config: CheckPolicyConfig) -> Answers:
    engine, request = open_generation(config, model), prompts.improver_request(model, None)
    asked = Lazy(len(rows), lambda place: rows[place]["prompt"])

    def made(column: str, conversations: Sequence[list[dict[str, str]]]) -> Sequence[Generation]:
        sampling = Sampling(
            config.max_new_tokens, config.temperature if column.endswith("sampled") else 0.0, config.top_p
        )
        seeds = seeds_for(rows, config.seed, column)
        return passes.generate(f"{name}.{column}", engine, conversations, sampling, seeds)

    said = {column: made(column, asked) for column in COLUMNS[:2]}
    own = said["policy_sampled"]
    improved = Lazy(len(rows), lambda place: prompts.improve(asked[place], own[place].text, request))
    said["improver_greedy"] = made("improver_greedy", improved)
    if isinstance(engine, LazyEngine):
        engine.unload()  # one model in memory at a time
    return said


def _rows(rows: Sequence[Row], answers: Sequence[Generation]) -> list[Row]:
    pairs = zip(rows, answers, strict=True)
    return [{"id": row["id"], "prompt": row["prompt"], "response": answer.text} for row, answer in pairs]


def _bad(rows: Sequence[Row], said: dict[str, Answers], column: str) -> dict[str, float]:
    return {who: round(fmean(map(_is_bad, rows, said[who][column])), 4) for who in said}


def _is_bad(row: Row, answer: Generation) -> bool:
    """Empty, cut, repetitive, meta talk, or in another script than its prompt."""
    asked, own = script(row["prompt"][-1]["content"]), script(answer.text)
    switched = bool(asked and own and asked != own)
    repetitive = repetition(answer.text.split()) > REPETITIVE
    return bool(text_problem(answer)) or repetitive or bool(META_TALK.match(answer.text)) or switched


def _length_ratio(said: dict[str, Answers], column: str) -> float:
    pairs = zip(said["previous"][column], said["model"][column], strict=True)
    return round(median(length_ratio(before.text, after.text) for before, after in pairs), 4)


def _preference(
    rows: Sequence[Row], said: dict[str, Answers], config: CheckPolicyConfig, step: Step
) -> dict[str, Any]:
    """What the last good model prefers as improver, and how implausible the new answers are to it as policy."""
    from sgpo_cli.scoring import Scorer  # imports torch; bad rows are refused before

    scorer = Scorer(config.previous, config.dtype, config.chat_template_kwargs)
    request, size = prompts.improver_request(config.previous, None), config.batch_size
    new, old = (said[who]["policy_sampled"] for who in ("model", "previous"))
    improved = said["model"]["improver_greedy"]

    def do(number: int) -> dict[str, Any]:
        part = slice(number * size, (number + 1) * size)
        asked = [row["prompt"] for row in rows[part]]
        better, after, before = ([answer.text for answer in answers[part]] for answers in (improved, new, old))
        ours, theirs = scorer.score(asked, after), scorer.score(asked, before)
        surprises = [own.log_ppl - other.log_ppl for own, other in zip(ours, theirs, strict=True)]
        contests = [(after, before), (better, after)]
        found = [[preferred(*pair) for pair in margins(scorer, request, asked, *texts)] for texts in contests]
        return {"rows": list(zip(*found, surprises, strict=True)), "stats": {}}

    with closing(Batches(step, "preference", len(rows), size, do)) as batches:
        batches.work("check-policy, preference")
        found = list(chain.from_iterable(batches.record(number)["rows"] for number in range(-(-len(rows) // size))))
    new_old, improved_new, surprises = zip(*found, strict=True)
    surprise = {"surprise": round(median(surprises), 4)}
    return _contest(new_old) | surprise | {"improved": _contest(improved_new)}


def _contest(won: Sequence[int]) -> dict[str, Any]:
    counts = Counter(won)
    return {"wins": counts[1], "ties": counts[0], "losses": counts[-1]}


def compared(scores: Scores, seed: int) -> dict[str, Any]:
    """Mean scores, paired differences with 95 % bootstrap intervals over prompts, and how many scores are invalid.

    `improver_over_policy` is that of the new model's improvements and the answers they improve.

    Raises:
        UsageError: the judge has scored too few of them to say.
    """
    new, old = scores["model"], scores["previous"]
    pairs = {column: (new[column], old[column]) for column in COLUMNS[:2]}
    pairs["improver_over_policy"] = new["improver_greedy"], new["policy_sampled"]
    means = {who: {column: _mean(values) for column, values in columns.items()} for who, columns in scores.items()}
    invalid = sum(value is None for columns in scores.values() for values in columns.values() for value in values)
    differences = {name: _difference(*pair, seed) for name, pair in pairs.items()}
    return {"scores": means, "differences": differences, "invalid": invalid}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 4) if known else None


def _difference(new: Sequence[float | None], old: Sequence[float | None], seed: int) -> list[float]:
    """Mean, low and high of the differences where both are known."""
    import numpy as np

    from sgpo_cli.winrates import mean_interval

    found = [one - other for one, other in zip(new, old, strict=True) if one is not None and other is not None]
    guard.refuse_silence(len(found), len(new), "pairs of answers")
    return [round(float(value), 4) for value in (fmean(found), *mean_interval(np.array(found), seed))]
