"""Each section's numbers and charts, ready for the template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sgpo_cli.report import charts
from sgpo_cli.report.collect import Run, StepFacts
from sgpo_cli.report.schema import Manifest, PairFacts, Quality, Score

CURVES: list[tuple[str, str, dict[str, str]]] = [
    ("Loss", "per token or pair; lower fits the data better", {"loss": "loss"}),
    ("Token accuracy", "share of tokens that the model would have chosen", {"mean_token_accuracy": "accuracy"}),
    (
        "Rewards",
        "β times the gain in log-probability over the reference model",
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected"},
    ),
    ("Reward margin", "chosen minus rejected", {"rewards/margins": "margin"}),
    ("Pair accuracy", "share of pairs whose chosen text has the higher reward", {"rewards/accuracies": "accuracy"}),
    (
        "Log-probabilities",
        "of the texts under the model; if both fall, the model leaves its data",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
    ),
    ("Gradient norm", "spikes are a sign of trouble", {"grad_norm": "norm"}),
    ("Learning rate", "as the schedule has it", {"learning_rate": "rate"}),
]


@dataclass(frozen=True)
class Curve:
    """A quantity over the optimizer steps; `series` are its lines, each a name and (step, value) points."""

    title: str
    note: str
    series: list[tuple[str, list[tuple[float, float]]]]


def headline(run: Run) -> str:
    """One sentence: the last model against the first, as policies; empty without scores."""
    for step in reversed(run.steps):
        entries = step.metrics.models if step.metrics else []
        policy = [entry for entry in entries if (entry.role, entry.decoding) == ("policy", "sampled")]
        if len(policy) > 1:
            first, last = policy[0], policy[-1]
            gain = f"{last.score - first.score:+.3f}".replace("-", "\u2212")
            return (
                f"{last.name} scores {last.score:.3f} where {first.name} scores {first.score:.3f}: {gain} "
                f"(sampled answers to {last.n} prompts)."
            )
    return ""


def scores(step: StepFacts) -> dict[str, Any]:
    """The table of a step's scores: a group for each role and decoding, a row for each model."""
    entries = step.metrics.models if step.metrics else []
    judge = str(step.request.config.get("judge", ""))
    low = min(0.0, *(entry.ci95[0] for entry in entries))
    high = max(1.0, *(entry.ci95[1] for entry in entries))
    names = list(dict.fromkeys(entry.name for entry in entries))
    groups: dict[str, list[tuple[Score, Any]]] = {}
    for entry in entries:
        title = ", ".join(part for part in (entry.role, entry.decoding) if part)
        order = names.index(entry.name) % 6 + 1
        drawn = charts.interval(entry.name, entry.score, entry.ci95, (low, high), order)
        groups.setdefault(title, []).append((entry, drawn))
    return {"step": step.name, "groups": groups, "scale": charts.scale((low, high)), "judge": judge}


def funnel(run: Run) -> dict[str, Any]:
    """Rows in and out of each step, and why rows were dropped."""
    counted = [(step, step.manifest) for step in run.steps if step.manifest and step.manifest.rows_in is not None]
    most = max((manifest.rows_in or 0 for _, manifest in counted), default=0)
    rows = []
    for step, manifest in counted:
        kept, dropped = manifest.rows_out or 0, sum(manifest.rejected.values())
        label = f"{step.name}: {kept} kept, {dropped} dropped"
        rows.append(
            {
                "name": step.name,
                "stage": step.stage,
                "manifest": manifest,
                "dropped": dropped,
                "bar": charts.bar(label, [kept, dropped], most),
                "reasons": sorted(manifest.rejected.items(), key=lambda item: (-item[1], item[0])),
            }
        )
    return {"rows": rows}


def data(step: StepFacts) -> dict[str, Any]:
    """A data step's texts: tables and histograms."""
    quality = step.quality
    assert quality is not None
    return {"step": step.name, "stage": step.stage, "quality": quality, "charts": _data_charts(step, quality)}


def _data_charts(step: StepFacts, quality: Quality) -> list[dict[str, Any]]:
    found = [_perplexity(step, quality)] if quality.log_ppl and quality.log_ppl.kept else []
    if pair := quality.pair:
        found.append(_lengths(step, pair))
        found.append(_edits(step, pair))
        if not quality.log_ppl:  # a filter leaves the ratios as they were
            found.append(_ratios(step, pair))
    return found


def _lengths(step: StepFacts, pair: PairFacts) -> dict[str, Any]:
    old, new = pair.old_words, pair.new_words
    series = [(pair.new, new.counts), (pair.old, old.counts)]
    return {
        "title": "Lengths",
        "legend": [pair.new, pair.old],
        "note": "of the texts, in words",
        "svg": charts.histogram(f"{step.name}: lengths", series, old.low, old.high, "words"),
    }


def _edits(step: StepFacts, pair: PairFacts) -> dict[str, Any]:
    drawn = pair.edit_histogram
    return {
        "title": "Words changed",
        "legend": [],
        "note": f"edit distance over the words of the longer text; {pair.new} against {pair.old}",
        "svg": charts.histogram(f"{step.name}: words changed", [("rows", drawn.counts)], 0, 1, "share of words"),
    }


def _ratios(step: StepFacts, pair: PairFacts) -> dict[str, Any]:
    drawn = pair.ratio_histogram
    return {
        "title": "Length ratio",
        "legend": [],
        "note": f"characters of {pair.new} for each of {pair.old}",
        "svg": charts.histogram(
            f"{step.name}: length ratio",
            [("rows", drawn.counts)],
            drawn.low,
            drawn.high,
            f"{pair.new} : {pair.old}",
            mark=(0.0, "as long"),
            log2=True,
        ),
    }


def _perplexity(step: StepFacts, quality: Quality) -> dict[str, Any]:
    found, manifest = quality.log_ppl, step.manifest
    assert found is not None
    assert found.kept is not None
    assert manifest is not None
    series = [("kept", found.kept.counts)] + ([("dropped", found.dropped.counts)] if found.dropped else [])
    cut = manifest.log_ppl_threshold
    limit = "" if cut is None else f", cut {cut:.3g}"
    if step.request.config.get("method") == "gap":  # its threshold is a difference, no place on this axis
        cut, limit = None, f"; cut by the distance to the response's, {cut}"
    return {
        "title": "Log-perplexity of the targets",
        "legend": [name for name, _ in series],
        "note": f"in nats a token, under the policy{limit}; the last bar holds what lies beyond",
        "svg": charts.histogram(
            f"{step.name}: perplexity",
            series,
            found.kept.low,
            found.kept.high,
            "log-perplexity",
            mark=None if cut is None else (cut, f"cut {cut:.3g}"),
        ),
    }


def curves(step: StepFacts) -> dict[str, Any]:
    """The learning curves of a training step."""
    training = _training(step.manifest)
    return {
        "step": step.name,
        "stage": step.stage,
        "charts": [_drawn(step.name, curve) for curve in logged_curves(step.log)],
        "training": training,
    }


def logged_curves(log: Sequence[Mapping[str, float]]) -> list[Curve]:
    """What a trainer has logged, by step; of a preference loss without the token accuracy, which is of one side."""
    paired = any("rewards/margins" in entry for entry in log)
    found = []
    for title, note, keys in CURVES:
        series = [
            (label, [(entry["step"], entry[key]) for entry in log if key in entry]) for key, label in keys.items()
        ]
        series = [(label, points) for label, points in series if points]
        if series and not (title == "Token accuracy" and paired):
            found.append(Curve(title, note, series))
    return found


def _drawn(name: str, curve: Curve) -> dict[str, Any]:
    legend = [label for label, _ in curve.series] if len(curve.series) > 1 else []
    svg = charts.lines(f"{name}: {curve.title}", curve.series, "optimizer step")
    return {"title": curve.title, "note": curve.note, "legend": legend, "svg": svg}


def _training(manifest: Manifest | None) -> str:
    if manifest is None or manifest.training is None:
        return "not finished"
    facts = manifest.training
    text = f"{facts.steps} optimizer steps, {facts.tokens} tokens"
    if facts.first_loss is not None:
        text += f"; first loss {facts.first_loss:.4f}"
    return text + ("" if facts.last_loss is None else f"; last loss {facts.last_loss:.4f}")


def costs(run: Run) -> dict[str, Any]:
    """Time, tokens, memory and money of each step."""
    done = [(step, step.manifest) for step in run.steps if step.manifest]
    most = max((manifest.seconds for _, manifest in done), default=0.0)
    rows = [_cost(step, manifest, most) for step, manifest in done]
    spent = [row["cost"] for row in rows if row["cost"] is not None]
    return {"rows": rows, "cost": sum(spent) if spent else None}


def _cost(step: StepFacts, manifest: Manifest, most: float) -> dict[str, Any]:
    written = manifest.total("completion_tokens")
    trained = manifest.training.tokens if manifest.training else None
    tokens = trained if written is None else written
    seconds = manifest.seconds if written is None else manifest.generation_seconds or manifest.seconds
    return {
        "name": step.name,
        "stage": step.stage,
        "manifest": manifest,
        "read": manifest.total("prompt_tokens"),
        "written": written,
        "trained": trained,
        "rate": tokens / seconds if tokens and seconds else None,
        "cost": manifest.total("cost"),
        "bar": charts.bar(f"{step.name}: {manifest.seconds:.1f} s", [manifest.seconds], most),
    }
