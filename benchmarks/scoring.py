"""Perplexities by filter-ppl's scorer, against the way the `evaluate` package's metric computes them.

    python benchmarks/scoring.py --model runs/demo/m0 --dataset runs/demo/targets/train.jsonl

The baseline is a plain equivalent of that metric (its code is loaded from the Hub): texts in the order of the input,
all of them padded on the right to the longest of the whole input, fixed batches of 16, logits of all positions in
fp32, cross-entropy. The metric scores whole texts; here it gets the rendered conversations and a mask of the
positions that ours scores, made off the clock, so that the values can be compared. Both start from conversations
and one loaded model; runs alternate, and the median of the ratios counts. On a busy machine the seconds of the
processor say more than those of the clock; both are written.

A second part has the same model but an output head of 151,936 tokens (Qwen's) with random weights: the demo's own
vocabulary of 720 hides what logits cost. Writes `benchmarks/scoring.json`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sgpo_cli.configs import FilterPplConfig
from sgpo_cli.scoring import Scorer

BATCH = 16
Row = dict[str, Any]
Run = Callable[[list[Row]], list[float]]


def ours(scorer: Scorer) -> Run:
    """As filter-ppl calls it, a batch of rows at a time."""
    size = FilterPplConfig.batch_size

    def run(rows: list[Row]) -> list[float]:
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        made = [scorer.score([row["prompt"] for row in part], [row["target"] for row in part]) for part in parts]
        return [score.log_ppl for part in made for score in part]

    return run


def metric(model: Any, tokenizer: Any, counts: torch.Tensor) -> Run:
    """As the metric does it.

    Args:
        counts: (rows, longest - 1), 1 where a token is scored.
    """

    @torch.no_grad()
    def run(rows: list[Row]) -> list[float]:
        encoded = tokenizer(_texts(tokenizer, rows), add_special_tokens=False, padding=True, return_tensors="pt")
        found: list[float] = []
        for start in range(0, len(rows), BATCH):
            part = slice(start, start + BATCH)
            ids = encoded["input_ids"][part]
            logits = model(ids, attention_mask=encoded["attention_mask"][part]).logits.float()
            before = logits[:, :-1].contiguous().transpose(1, 2)
            losses = torch.nn.functional.cross_entropy(before, ids[:, 1:].contiguous(), reduction="none")
            found += ((losses * counts[part]).sum(1) / counts[part].sum(1)).tolist()
        return found

    return run


def _texts(tokenizer: Any, rows: list[Row]) -> list[str]:
    whole = [[*row["prompt"], {"role": "assistant", "content": row["target"]}] for row in rows]
    return tokenizer.apply_chat_template(whole, tokenize=False)  # type: ignore[no-any-return]


def scored_positions(tokenizer: Any, rows: list[Row], scorer: Scorer) -> torch.Tensor:
    """(rows, longest - 1): where a completion's token is predicted; ours counts them from the end."""
    encoded = tokenizer(_texts(tokenizer, rows), add_special_tokens=False, padding=True, return_tensors="pt")
    ends = encoded["attention_mask"].sum(1, keepdim=True)
    tokens = [score.tokens for score in scorer.score([row["prompt"] for row in rows], [row["target"] for row in rows])]
    places = torch.arange(1, encoded["input_ids"].shape[1])[None]
    return ((places < ends) & (places >= ends - torch.tensor(tokens)[:, None])).float()


def compare(model: str, rows: list[Row], rounds: int) -> dict[str, Any]:
    scorer, tokenizer = Scorer(model), AutoTokenizer.from_pretrained(model)
    counts = scored_positions(tokenizer, rows, scorer)
    runs = {"ours": ours(scorer), "metric": metric(AutoModelForCausalLM.from_pretrained(model), tokenizer, counts)}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    values: dict[str, list[float]] = {}
    for number in range(rounds + 1):
        for name in sorted(runs, reverse=bool(number % 2)):
            clock, processor = time.perf_counter(), time.process_time()
            values[name] = runs[name](rows)
            took = time.perf_counter() - clock, time.process_time() - processor
            print(f"round {number}: {name}: {took[0]:.2f} s, of the processor {took[1]:.2f} s", flush=True)
            if number:  # the first warms up
                seconds[name].append(took)
    apart = max(abs(a - b) for a, b in zip(values["ours"], values["metric"], strict=True))
    return {
        "rows": len(rows),
        "tokens_scored": int(counts.sum()),
        "clock": _figures(seconds, 0, len(rows)),
        "processor": _figures(seconds, 1, len(rows)),
        "largest_difference_of_log_perplexities": apart,
    }


def _figures(seconds: dict[str, list[tuple[float, float]]], kind: int, rows: int) -> dict[str, Any]:
    taken = {name: [pair[kind] for pair in pairs] for name, pairs in seconds.items()}
    ratios = [slow / fast for slow, fast in zip(taken["metric"], taken["ours"], strict=True)]
    rates = {f"{name}_rows_per_second": round(rows / statistics.median(took), 1) for name, took in taken.items()}
    return {**rates, "ratio": round(statistics.median(ratios), 2), "ratios": [round(ratio, 2) for ratio in ratios]}


def with_wide_head(model: str, size: int, directory: str) -> str:
    """The model with so many tokens, the further ones at random and never used."""
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = size
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(model).save_pretrained(directory)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/m0")
    parser.add_argument("--dataset", type=Path, default=Path("runs/demo/targets/train.jsonl"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wide-head", type=int, default=151_936)
    parser.add_argument("--wide-rows", type=int, default=96)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [json.loads(line) for line in arguments.dataset.read_text(encoding="utf-8").splitlines()]
    results = {"demo": compare(arguments.model, rows[: arguments.rows], arguments.rounds)}
    machine.write("scoring", {"threads": arguments.threads, "results": results})
    with tempfile.TemporaryDirectory() as directory:
        wide = with_wide_head(arguments.model, arguments.wide_head, directory)
        results["wide_head"] = compare(wide, rows[: arguments.wide_rows], arguments.rounds)
    machine.write("scoring", {"threads": arguments.threads, "results": results})
    for name, result in results.items():
        print(
            f"{name}: {result['clock']['ratio']}x by the clock, {result['processor']['ratio']}x by the processor, "
            f"values {result['largest_difference_of_log_perplexities']:.1e} apart"
        )


if __name__ == "__main__":
    main()
