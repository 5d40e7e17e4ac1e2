"""evaluate: models answer held-out prompts in both roles, sampled and greedy; a judge scores the answers.

The improver improves the model's own sampled answer, the one it would meet in gen-pairs.
"""

import gc
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.artifacts import DATA_FILES, write_atomically
from sgpo_cli.batches import BatchResult, Row, run_batches, seeds_of
from sgpo_cli.configs import EvaluateConfig
from sgpo_cli.dataset import read_dataset, set_aside
from sgpo_cli.engines import Engine, Generation, Sampling, open_engine, token_counts
from sgpo_cli.errors import UsageError
from sgpo_cli.progress import stopwatch
from sgpo_cli.step import Step

JUDGES = {"demo": "sgpo_cli.demo.scorer:score"}
ANSWERS = [(role, decoding) for role in ("policy", "improver") for decoding in ("sampled", "greedy")]
RESAMPLES = 2000

Judge = Callable[[str, str], float]


def run(config: EvaluateConfig, step: Step) -> None:
    judge = find_judge(config.judge)
    models = named(config.models)
    requests = {name: prompts.improver_request(path, config.improver_prompt) for name, path in models.items()}
    rows = read_dataset(config, ("prompt",), config.models[0])
    for row in rows:
        _judged(judge, row, "")  # a prompt that the judge cannot read is refused before anything is generated
    tasks = [{"model": name, **row} for name in models for row in rows]

    engines: dict[str, Engine] = {}

    def engine_of(name: str) -> Engine:
        if name not in engines:
            engines.clear()  # one model in memory at a time, also while the next is loaded
            gc.collect()
            engines[name] = open_engine(
                config.engine,
                models[name],
                dtype=config.dtype,
                chat_template_kwargs=config.chat_template_kwargs,
                engine_options=config.engine_options,
            )
        return engines[name]

    def work(batch: list[Row]) -> BatchResult:
        result = BatchResult([], {})
        for name, group in groupby(batch, key=lambda row: row["model"]):
            part = answer(engine_of(name), list(group), requests[name], judge, config)
            result.outcomes += part.outcomes
            for key, value in part.stats.items():
                result.stats[key] = result.stats.get(key, 0) + value
        return result

    with step:
        outcomes, stats = run_batches(step, tasks, config.batch_size, work)
        counts = step.write_rows(chain(set_aside(rows), outcomes))
        metrics = {"models": summarise(_scores(step.directory), list(models), config.seed)}
        write_atomically(step.directory / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        facts = {**counts, **stats, "report": table(metrics["models"])}
        step.finish((*DATA_FILES, "metrics.json"), facts)


def find_judge(name: str) -> Judge:
    """The function from (prompt, response) to a score in 0..1. Raises UsageError for an unknown name."""
    if name not in JUDGES:
        raise UsageError(f"no judge '{name}'", f"judges: {', '.join(JUDGES)}")
    module, _, function = JUDGES[name].partition(":")
    judge: Judge = getattr(importlib.import_module(module), function)
    return judge


def named(paths: Sequence[str]) -> dict[str, str]:
    """Models by the last part of their path. Raises UsageError when two share it."""
    models = {Path(path).name: path for path in paths}
    if len(models) < len(paths):
        raise UsageError(f"models {', '.join(paths)}: two have the same name", "rename a directory")
    return models


def answer(engine: Engine, rows: list[Row], request: str, judge: Judge, config: EvaluateConfig) -> BatchResult:
    """Four answers per row, each with its score: columns `<role>_<decoding>` and `score_<role>_<decoding>`."""
    asked = [row["prompt"] for row in rows]
    seconds: dict[str, float] = {}
    texts: dict[str, list[Generation]] = {}
    with stopwatch(seconds, "generation_seconds"):
        for role, decoding in ANSWERS:
            if role == "improver":
                asked = [
                    prompts.improve(row["prompt"], response.text, request)
                    for row, response in zip(rows, texts["policy_sampled"], strict=True)
                ]
            temperature = config.temperature if decoding == "sampled" else 0.0
            texts[f"{role}_{decoding}"] = engine.generate(
                asked,
                Sampling(config.max_new_tokens, temperature, config.top_p),
                seeds_of(rows, config.seed, rows[0]["model"], role, decoding),
            )
    scored = [_scored(row, number, texts, judge) for number, row in enumerate(rows)]
    return BatchResult([(row, None) for row in scored], seconds | token_counts(chain.from_iterable(texts.values())))


def _scored(row: Row, number: int, texts: dict[str, list[Generation]], judge: Judge) -> Row:
    scored: Row = {name: row[name] for name in ("id", "model", "prompt")}
    for name, generations in texts.items():
        scored[name] = generations[number].text
        scored[f"score_{name}"] = _judged(judge, row, generations[number].text)
    return scored


def _judged(judge: Judge, row: Row, response: str) -> float:
    try:
        return judge(row["prompt"][-1]["content"], response)
    except ValueError as error:
        raise UsageError(f"row {row['id']}: {error}", "the judge demo only knows the demo world") from None


def _scores(directory: Path) -> Iterator[Row]:
    with (directory / DATA_FILES[0]).open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def summarise(rows: Iterator[Row], models: list[str], seed: int) -> list[dict[str, Any]]:
    """Mean score with a 95 % bootstrap interval over prompts, per model, role and decoding."""
    columns: dict[tuple[str, str, str], list[float]] = {
        (name, role, decoding): [] for name in models for role, decoding in ANSWERS
    }
    for row in rows:
        for role, decoding in ANSWERS:
            columns[row["model"], role, decoding].append(row[f"score_{role}_{decoding}"])
    return [
        {
            "name": name,
            "role": role,
            "decoding": decoding,
            "score": round(sum(scores) / len(scores), 4),
            "ci95": bootstrap_interval(scores, seed),
            "n": len(scores),
        }
        for (name, role, decoding), scores in columns.items()
    ]


def bootstrap_interval(scores: Sequence[float], seed: int) -> list[float]:
    """The percentile bootstrap's 95 % interval of the mean, resampling prompts."""
    import numpy as np

    values = np.asarray(scores)
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return [round(float(low), 4), round(float(high), 4)]


def table(models: list[dict[str, Any]]) -> list[str]:
    """The metrics as lines of text."""
    lines = [f"{'model':<16}{'role':<10}{'decoding':<10}{'score':>7}  {'95 % interval':<18}{'n':>5}"]
    for entry in models:
        low, high = entry["ci95"]
        lines.append(
            f"{entry['name']:<16}{entry['role']:<10}{entry['decoding']:<10}{entry['score']:>7.3f}"
            f"  [{low:.3f}, {high:.3f}]    {entry['n']:>5}"
        )
    return lines
