"""evaluate: models answer held-out prompts in both roles, sampled and greedy; a judge scores or compares the answers.

All answers are made first, then they are judged. With a baseline, win rates follow.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.artifacts import DATA_FILES, sha256_json, write_atomically, write_lines
from sgpo_cli.batches import Row, derive_seed
from sgpo_cli.configs import EvaluateConfig
from sgpo_cli.contestants import Contestant, baseline_column, contestants
from sgpo_cli.dataset import read_dataset, set_aside
from sgpo_cli.generation import Lazy, Passes
from sgpo_cli.judges import LanguageModelJudge, RuleJudge, Scores, check_judge, open_judge
from sgpo_cli.remote.connect import open_generation
from sgpo_cli.step import Outcome, Step

CARRIED = ("category", "dataset")  # columns of the prompts that the public formats know
Entry = dict[str, Any]


@dataclass
class Judged:
    """One contestant's answers and what the judge said of them, by column."""

    who: Contestant
    texts: dict[str, Sequence[str]]
    scores: dict[str, Scores] = field(default_factory=dict)
    verdicts: dict[str, dict[str, list[str | None]]] = field(default_factory=dict)


def run(config: EvaluateConfig, step: Step) -> None:
    open_generation(config, config.models[0])  # a wrong engine is refused before any work
    check_judge(config)
    entrants = contestants(config)
    models = [each.source for each in entrants if not each.is_file]
    rows = read_dataset(config, ("prompt",), models[0] if models else "")
    for each in entrants:
        if each.is_file:
            each.given(rows)  # refused before anything is generated
    official = _official(config, len(rows))
    judge = open_judge(config, step, rows)
    with step, Passes(step, config.batch_size) as passes:
        lineup = [Judged(each, each.answer(passes, rows, config)) for each in entrants]
        if config.judge_mode == "pairwise":
            assert isinstance(judge, LanguageModelJudge)
            _compare(lineup, rows, judge, passes, config)
        else:
            _score(lineup, rows, judge, passes)
        counts = step.write_rows(chain(set_aside(rows), _outcomes(lineup, rows)))
        metrics, report = _metrics(lineup, config, official)
        write_atomically(step.directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        outputs = [*DATA_FILES, "metrics.json"]
        if isinstance(judge, LanguageModelJudge):
            write_lines(step.directory / "judgments.jsonl", chain.from_iterable(judge.judgments))
            outputs.append("judgments.jsonl")
        local, served = _bills(passes.stats)
        facts = {"judge": {**_judge_facts(lineup, config), **served.pop("judge", {})}, **served}
        report += _capability_lines(entrants, config)
        step.finish(outputs, {**counts, **local, **facts, "report": report})


def _official(config: EvaluateConfig, prompts: int) -> Any:
    from sgpo_cli.contests import read_official

    return read_official(config.lc_official, prompts) if config.lc_official else None


def _score(lineup: list[Judged], rows: Sequence[Row], judge: RuleJudge | LanguageModelJudge, passes: Passes) -> None:
    """A score for every answer that is judged, and for those of the baseline that they are compared with."""
    for each in lineup:
        for column in each.who.judged:
            answered = _joined(rows, response=each.texts[column])
            each.scores[column] = judge.score(passes, each.who.pass_name("judge", column), answered)


def _joined(rows: Sequence[Row], **texts: Sequence[str]) -> Sequence[Row]:
    """The prompts, each with the texts of its place."""

    def row(place: int) -> Row:
        named = {name: column[place] for name, column in texts.items()}
        return {"id": rows[place]["id"], "prompt": rows[place]["prompt"], **named}

    return Lazy(len(rows), row)


def _compare(
    lineup: list[Judged], rows: Sequence[Row], judge: LanguageModelJudge, passes: Passes, config: EvaluateConfig
) -> None:
    """A verdict in each order for every answer, except where it is the baseline's very words."""
    baseline = next(each for each in lineup if each.who.source == config.baseline)
    for each, column, other in _contests(lineup, baseline):
        own, theirs = each.texts[column], baseline.texts[other]
        pairs = {
            "model_first": _joined(rows, first=own, second=theirs),
            "model_second": _joined(rows, first=theirs, second=own),
        }
        differ = [place for place in range(len(rows)) if own[place] != theirs[place]]
        found: dict[str, list[str | None]] = {order: [None] * len(rows) for order in pairs}
        for order, pair in pairs.items():
            places = [place for place in differ if order in _orders(rows[place], config)]
            verdicts = judge.compare(passes, each.who.pass_name("judge", column, order), _only(pair, places))
            for place, verdict in zip(places, verdicts, strict=True):
                found[order][place] = verdict
        each.verdicts[column] = found


def _only(pairs: Sequence[Row], places: list[int]) -> Sequence[Row]:
    return Lazy(len(places), lambda number: pairs[places[number]])


def _orders(row: Row, config: EvaluateConfig) -> tuple[str, ...]:
    both = ("model_first", "model_second")
    if config.judge_orders == "both":
        return both
    return (both[derive_seed(config.seed, "order", row["id"]) % 2],)


def _contests(lineup: list[Judged], baseline: Judged) -> Iterator[tuple[Judged, str, str]]:
    """Who meets which of the baseline's answers; none meets itself."""
    for each in lineup:
        for column in each.who.columns:
            other = baseline_column(column, baseline.who.judged)
            if each is not baseline or column != other:
                yield each, column, other


def _outcomes(lineup: list[Judged], rows: Sequence[Row]) -> Iterator[Outcome]:
    """A row per contestant and prompt: answers, then scores, or verdicts with the preference they make.

    Every row has the columns of all, so that readers find one schema.
    """
    columns = dict.fromkeys(chain.from_iterable(_columns(each) for each in lineup))
    for each in lineup:
        values = _columns(each)
        for place, row in enumerate(rows):
            made: Row = {"id": row["id"], "model": each.who.name, "prompt": row["prompt"]}
            made |= {name: row[name] for name in CARRIED if isinstance(row.get(name), str)}
            yield made | {name: values[name][place] if name in values else None for name in columns}, None


def _columns(each: Judged) -> dict[str, Sequence[Any]]:
    """What a contestant's rows hold besides the prompt, by column."""
    from sgpo_cli.contests import preferences_of_verdicts

    values: dict[str, Sequence[Any]] = {}
    for column, texts in each.texts.items():
        values[column] = texts
        if column in each.scores:
            values[f"score_{column}"] = each.scores[column]
        if column in each.verdicts:
            found = each.verdicts[column]
            known = [None if math.isnan(value) else value for value in preferences_of_verdicts(found).tolist()]
            values[f"preference_{column}"] = known
            games = [dict(zip(found, pair, strict=True)) for pair in zip(*found.values(), strict=True)]
            values[f"verdicts_{column}"] = games
    return values


def _metrics(lineup: list[Judged], config: EvaluateConfig, official: Any) -> tuple[dict[str, Any], list[str]]:
    """What metrics.json holds, and the same as lines of text."""
    scores = summarise(lineup, config.seed)
    metrics: dict[str, Any] = {"models": scores}
    report = table(scores) if scores else []
    if config.baseline:
        from sgpo_cli import contests

        entries = contests.results(_against_baseline(lineup, config), config.seed, official)
        metrics["win_rates"] = entries
        name = next(each.who.name for each in lineup if each.who.source == config.baseline)
        how = f", {config.judge_orders} orders" if config.judge_mode == "pairwise" else ""
        head = f"answers against those of {name} (judge {config.judge}, {config.judge_mode}{how})"
        report += [*([""] if report else []), head, *contests.table(entries)]
    return metrics, report


def _against_baseline(lineup: list[Judged], config: EvaluateConfig) -> list[Any]:
    from sgpo_cli.contests import Contest, preferences_of_scores, preferences_of_verdicts

    baseline = next(each for each in lineup if each.who.source == config.baseline)
    contests = []
    for each, column, other in _contests(lineup, baseline):
        verdicts = each.verdicts.get(column)
        preferences = (
            preferences_of_scores(each.scores[column], baseline.scores[other])
            if verdicts is None
            else preferences_of_verdicts(verdicts)
        )
        role, decoding = column.split("_")
        texts = each.texts[column], baseline.texts[other]
        contests.append(Contest(each.who.name, role, decoding, baseline.who.name, *texts, preferences, verdicts))
    return contests


def _bills(stats: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What local passes took, and what servers were asked: for the answers, and for the judgments.

    The cost that a pass tells is that of the whole step so far, so it is told once.
    """
    local = {name: value for name, value in stats.items() if not isinstance(value, dict) or "url" not in value}
    served: dict[str, dict[str, Any]] = {}
    for name, facts in stats.items():
        if name in local:
            continue
        side = served.setdefault("judge" if ".judge." in name else "answers", {"url": facts["url"]})
        for count in ("prompt_tokens", "completion_tokens", "requests", "reused", "failed"):
            side[count] = side.get(count, 0) + facts[count]
    if costs := [facts["cost"] for facts in stats.values() if isinstance(facts, dict) and "cost" in facts]:
        list(served.values())[-1]["cost"] = max(costs)
    return local, served


def _judge_facts(lineup: list[Judged], config: EvaluateConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {"judge": config.judge, "mode": config.judge_mode}
    if baseline := next((each.who.name for each in lineup if each.who.source == config.baseline), None):
        facts["baseline"] = baseline
    if config.judge_prompt:
        facts |= {"prompt_sha256": sha256_json(prompts.load(config.judge_prompt))}
    return facts | ({"orders": config.judge_orders} if config.judge_mode == "pairwise" else {})


def summarise(lineup: list[Judged], seed: int) -> list[Entry]:
    """Mean score with a 95 % bootstrap interval over prompts, per model, role and decoding."""
    import numpy as np

    from sgpo_cli.winrates import mean_interval

    entries = []
    for each in lineup:
        for column in each.scores:
            role, decoding = column.split("_")
            valid = np.array([score for score in each.scores[column] if score is not None])
            entry: Entry = {"name": each.who.name, "role": role, "decoding": decoding, "score": None, "ci95": None}
            if len(valid):
                entry["score"] = round(sum(valid.tolist()) / len(valid), 4)
                entry["ci95"] = [round(end, 4) for end in mean_interval(valid, seed)]
            entry["n"] = len(valid)
            if missing := len(each.scores[column]) - len(valid):
                entry["invalid"] = missing
            entries.append(entry)
    return entries


def table(models: list[Entry]) -> list[str]:
    """The scores as lines of text."""
    lines = [f"{'model':<16}{'role':<10}{'decoding':<10}{'score':>7}  {'95 % interval':<18}{'n':>5}"]
    for entry in models:
        head = f"{entry['name']:<16}{entry['role']:<10}{entry['decoding']:<10}"
        if entry["score"] is None:
            lines.append(f"{head}{'-':>7}  {'no valid score':<18}{0:>5}")
            continue
        low, high = entry["ci95"]
        invalid = f"  {entry['invalid']} invalid" if "invalid" in entry else ""
        lines.append(f"{head}{entry['score']:>7.3f}  [{low:.3f}, {high:.3f}]    {entry['n']:>5}{invalid}")
    return lines


def _capability_lines(entrants: list[Contestant], config: EvaluateConfig) -> list[str]:
    """How to see whether a model has lost what no judge here looks at; not for the demo's model."""
    if config.engine != "transformers" or config.judge == "demo":
        return []
    commands = [
        f"lm_eval --model hf --model_args pretrained={each.source} --tasks ifeval,gsm8k,mmlu "
        "--apply_chat_template --batch_size auto"
        for each in entrants
        if not each.is_file
    ]
    return ["", "capabilities, with lm-evaluation-harness:", *commands] if commands else []
