"""check-pairs: are the pairs of a round healthy? Its manifest holds the verdict; `sgpo run` stops on a bad one."""

import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from sgpo_cli import guard, prompts
from sgpo_cli.artifacts import read_manifest, step_of, write_atomically
from sgpo_cli.batches import BatchResult, Row, run_batches
from sgpo_cli.comparison import plain
from sgpo_cli.dataset import read_dataset
from sgpo_cli.generation import Lazy
from sgpo_cli.guard_configs import CheckPairsConfig
from sgpo_cli.measures import REPETITIVE, edit_share, length_ratio, repetition
from sgpo_cli.preference import margins, preferred
from sgpo_cli.score_functions import ScoreFunction, open_function
from sgpo_cli.step import Step

# Why gen-pairs drops a pair of which one text is no answer, or no match for the other.
UNUSABLE = ("cut", "empty", "length_ratio", "meta_talk", "control_character", "control_token")
Compare = Callable[[list[Row]], list[Row]]


def run(config: CheckPairsConfig, step: Step) -> None:
    rows = read_dataset(config, ("prompt", "chosen", "rejected"), config.policy)
    picked = sorted(random.Random(config.seed).sample(range(len(rows)), min(config.sample, len(rows))))
    sample = Lazy(len(picked), lambda place: rows[picked[place]])
    settings: dict[str, Any] = {"dtype": config.dtype, "chat_template_kwargs": config.chat_template_kwargs}
    judge = open_function(config.judge, _answers(sample, "chosen"), settings) if config.judge else None
    compare = _by_judge(judge()) if judge else _by_improver(config.policy, settings)

    def work(batch: list[Row]) -> BatchResult:
        return BatchResult([(found, None) for found in compare(batch)])

    with step:
        outcomes, stats = run_batches(step, sample, config.batch_size, work)
        compared = [dict(found) for row, (found, _) in zip(sample, outcomes, strict=True) if not _is_same(row)]
        contest, same = _contest(compared), len(sample) - len(compared)
        guard.refuse_silence(len(compared) - contest["invalid"], len(compared), "pairs")
        measures = {
            "by": "judge" if judge else "improver",
            "sample": len(sample),
            **_counts(config.datasets, len(rows), same / len(sample)),
            **contest,
            **_texts(sample),
        }
        verdict = guard.of_pairs(measures, config)
        facts: dict[str, Any] = {
            "verdict": verdict.health,
            "reasons": verdict.reasons,
            "remedy": verdict.remedy,
            "best": config.previous or config.policy,
            "measures": measures,
        }
        write_atomically(step.directory / "verdict.json", json.dumps(facts, indent=2) + "\n")
        step.finish(["verdict.json"], facts | stats)


def _answers(rows: Sequence[Row], column: str) -> list[Row]:
    return [{"id": row["id"], "prompt": row["prompt"], "response": plain(row[column])} for row in rows]


def _by_judge(judge: ScoreFunction) -> Compare:
    """The better score wins; None where there is no valid one."""

    def compare(batch: list[Row]) -> list[Row]:
        found = zip(judge(_answers(batch, "chosen")), judge(_answers(batch, "rejected")), strict=True)
        return [{"won": None if a is None or b is None else (a > b) - (a < b)} for a, b in found]

    return compare


def _by_improver(policy: str, settings: dict[str, Any]) -> Compare:
    """What the policy as improver prefers, and what it would rather say as policy."""
    from sgpo_cli.scoring import Scorer  # imports torch; bad rows are refused before

    scorer, request = Scorer(policy, **settings), prompts.improver_request(policy, None)

    def compare(batch: list[Row]) -> list[Row]:
        asked = [row["prompt"] for row in batch]
        chosen, rejected = ([plain(row[name]) for row in batch] for name in ("chosen", "rejected"))
        said = zip(scorer.score(asked, chosen), scorer.score(asked, rejected), strict=True)
        gaps = [round(worse.log_ppl - better.log_ppl, 4) for better, worse in said]
        found = margins(scorer, request, asked, chosen, rejected)
        return [{"won": preferred(*pair), "gap": gap} for pair, gap in zip(found, gaps, strict=True)]

    return compare


def _is_same(row: Row) -> bool:
    """Whether DPO would drop the pair; what white space does to log-probabilities is no preference."""
    return plain(row["chosen"]).strip() == plain(row["rejected"]).strip()


def _contest(compared: Sequence[Row]) -> dict[str, Any]:
    """Wins, ties and losses of the chosen texts, and by how much likelier the policy finds them, in nats a token."""
    counts = Counter(row["won"] for row in compared)
    gaps = [row["gap"] for row in compared if "gap" in row]
    found = {"wins": counts[1], "ties": counts[0], "losses": counts[-1], "invalid": counts[None]}
    return found | ({"log_prob_gap": round(median(gaps), 4)} if gaps else {})


def _counts(datasets: Sequence[str], rows: int, same: float) -> dict[str, int]:
    """Pairs that DPO would use and what they were made from, where that is known.

    Args:
        rows: how many were read. Where that is a part of the sources, their counts are taken in proportion.
        same: share of pairs whose texts are the same; DPO drops them.
    """
    prompts, made, dropped = 0, 0, Counter[str]()
    for source in datasets:
        directory = step_of(Path(source)) if Path(source).exists() else None
        manifest = (read_manifest(directory) or {}) if directory else {}
        prompts += manifest.get("rows_in", 0)
        made += manifest.get("rows_out", 0)
        dropped.update(manifest.get("rejected", {}))
    read = min(rows / made, 1.0) if made else 1.0
    identical = round(same * rows)
    return {
        "prompts": max(round(read * prompts), rows),
        "pairs": rows - identical,
        "identical": round(read * dropped["identical"]) + identical,
        "unusable": round(read * sum(dropped[reason] for reason in UNUSABLE)),
    }


def _texts(sample: Sequence[Row]) -> dict[str, Any]:
    """What can be seen without a model."""
    pairs = [(plain(row["rejected"]), plain(row["chosen"])) for row in sample]
    repetitive = [[repetition(text.split()) > REPETITIVE for text in texts] for texts in zip(*pairs, strict=True)]
    shares = [round(sum(flags) / len(flags), 4) for flags in repetitive]
    return {
        "edit_share": median(edit_share(*pair) for pair in pairs),
        "length_ratio": round(median(length_ratio(*pair) for pair in pairs), 4),
        "repetitive": dict(zip(("rejected", "chosen"), shares, strict=True)),
    }
