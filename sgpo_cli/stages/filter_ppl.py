"""filter-ppl: drop targets that the policy finds implausible; every kept row carries its score."""

import math
from array import array
from collections.abc import Callable, Iterable
from itertools import chain
from typing import TYPE_CHECKING

from sgpo_cli import quality
from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.batches import BatchResult, Row, run_batches
from sgpo_cli.configs import FilterPplConfig
from sgpo_cli.dataset import read_dataset, set_aside
from sgpo_cli.step import Step

if TYPE_CHECKING:
    from sgpo_cli.scoring import Scorer

MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation is this many median absolute deviations
LEAST_SIGMA = 0.01  # nats; when more than half of the targets are alike, their MAD is 0


def run(config: FilterPplConfig, step: Step) -> None:
    gap = config.method == "gap"
    rows = read_dataset(config, ("prompt", "target", *(["response"] if gap else [])), config.policy)
    from sgpo_cli.scoring import Scorer  # imports torch; bad rows are refused before

    scorer = Scorer(config.policy, config.dtype, config.chat_template_kwargs)
    columns = {"target": "log_ppl"} | ({"response": "response_log_ppl"} if gap else {})
    with step:
        outcomes, stats = run_batches(step, rows, config.batch_size, lambda batch: _score(scorer, batch, columns))
        # A number for each row is all that memory holds: journal and rows are read again below.
        values = array("d", (scores["log_ppl"] for scores, _ in outcomes if scores["log_ppl"] is not None))
        too_high, threshold = rule(config, values)
        scored: Iterable[Row] = ({**row, **scores} for row, (scores, _) in zip(rows, outcomes, strict=True))
        counts = step.write_rows(chain(set_aside(rows), ((row, _reason(row, too_high)) for row in scored)))
        median = round(_median(values), 6) if values else None
        facts = {**counts, **stats, "log_ppl_median": median, "log_ppl_threshold": threshold}
        step.finish(DATA_FILES, facts | quality.facts(step.directory))


def _score(scorer: "Scorer", batch: list[Row], columns: dict[str, str]) -> BatchResult:
    """The scores of a batch, without the rows themselves: the journal need not hold them a second time.

    Args:
        columns: where the score of each text goes.
    """
    before = scorer.out_of_memory
    prompts = [row["prompt"] for row in batch]
    scored: list[Row] = [{} for _ in batch]
    for text, column in columns.items():
        scores = scorer.score(prompts, [row[text] for row in batch])
        for row, score in zip(scored, scores, strict=True):
            row[column] = round(score.log_ppl, 6) if math.isfinite(score.log_ppl) else None
            row[f"{text}_tokens"] = score.tokens
    found = BatchResult([(row, None) for row in scored])
    if scorer.out_of_memory > before:  # in the manifest, all ranks and runs together
        found.stats["out_of_memory"] = scorer.out_of_memory - before
    return found


def rule(config: FilterPplConfig, values: Iterable[float]) -> tuple[Callable[[Row], bool], float]:
    """Which rows are implausible, and the threshold that says so.

    Args:
        values: the log-perplexities of all targets.

    Returns:
        a test of a scored row, and its threshold: a log-perplexity, for `gap` a difference of two.
    """
    if config.method == "gap":
        return lambda row: row["log_ppl"] - row["response_log_ppl"] > config.max_gap, config.max_gap
    import numpy as np

    ordered = np.sort(np.fromiter(values, float))
    if config.method == "max":
        threshold = math.log(config.max_ppl)
    elif not len(ordered):
        threshold = 0.0
    elif config.method == "quantile":
        threshold = float(ordered[min(math.ceil(config.quantile * len(ordered)), len(ordered)) - 1])
    else:
        threshold = mad_threshold(ordered, config.k)
    return lambda row: row["log_ppl"] > threshold, round(threshold, 6)


def mad_threshold(values: Iterable[float], k: float) -> float:
    """Median plus k robust standard deviations: junk moves neither until it is half of the data."""
    import numpy as np

    numbers = np.fromiter(values, float)
    median = _median(numbers)
    sigma = MAD_TO_SIGMA * _median(np.abs(numbers - median))
    return median + k * max(sigma, LEAST_SIGMA)


def _median(values: Iterable[float]) -> float:
    import numpy as np

    return float(np.median(np.fromiter(values, float)))


def _reason(row: Row, too_high: Callable[[Row], bool]) -> str | None:
    if row["log_ppl"] is None or row.get("response_log_ppl", 0.0) is None:
        return "ppl_not_finite"
    return "implausible" if too_high(row) else None
