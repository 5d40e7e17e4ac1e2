"""gen-pairs: the model answers each prompt and improves its answer. Rows (prompt, chosen, rejected)."""

from itertools import chain
from typing import Any

from sgpo_cli import prompts, quality
from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.batches import Row
from sgpo_cli.configs import GenPairsConfig
from sgpo_cli.dataset import forbidden_tokens, read_dataset, set_aside
from sgpo_cli.engines import Generation, Sampling
from sgpo_cli.generation import Lazy, Passes, seeds_for
from sgpo_cli.pairing import find_pairing, pair_problem
from sgpo_cli.remote.connect import open_generation
from sgpo_cli.step import Outcome, Step


def run(config: GenPairsConfig, step: Step) -> None:
    pairing = find_pairing(config.pairing)
    request = prompts.improver_request(config.policy, config.improver_prompt)
    rows = read_dataset(config, ("prompt",), config.policy)
    forbidden = forbidden_tokens(config, config.policy)
    engine = open_generation(config, config.policy)
    with step, Passes(step, config.batch_size) as passes:
        responses = passes.generate(
            "policy",
            engine,
            Lazy(len(rows), lambda place: rows[place]["prompt"]),
            Sampling(config.max_new_tokens, config.temperature, config.top_p),
            seeds_for(rows, config.seed, "policy"),
        )
        better = passes.generate(
            "improver",
            engine,
            Lazy(len(rows), lambda place: prompts.improve(rows[place]["prompt"], responses[place].text, request)),
            Sampling(config.max_new_tokens, config.improver_temperature, config.improver_top_p),
            seeds_for(rows, config.seed, "improver"),
        )
        pairs = (
            pairing.choose({"policy": response, "improver": improved})
            for response, improved in zip(responses, better, strict=True)
        )
        outcomes = (_outcome(row, *pair, config, forbidden) for row, pair in zip(rows, pairs, strict=True))
        counts = step.write_rows(chain(set_aside(rows), outcomes))
        step.finish(
            DATA_FILES, {**counts, **passes.stats, **quality.facts(step.directory), "improver_prompt": request}
        )


def _outcome(
    row: Row, chosen: Generation, rejected: Generation, config: GenPairsConfig, forbidden: list[str]
) -> Outcome:
    """A row that TRL's DPOTrainer takes as it is, and why it is dropped, if it is."""
    pair: dict[str, Any] = {"id": row["id"], "prompt": row["prompt"]}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        pair[name] = [{"role": "assistant", "content": text.text}]
    return pair, pair_problem(chosen, rejected, config.max_length_ratio, forbidden)
