"""gen-pairs: the model answers each prompt and improves its answer. Rows (prompt, chosen, rejected)."""

from itertools import chain
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.batches import BatchResult, Row, run_batches, seeds_of
from sgpo_cli.configs import GenPairsConfig
from sgpo_cli.dataset import forbidden_tokens, read_dataset, set_aside
from sgpo_cli.engines import Generation, Sampling, open_engine, token_counts
from sgpo_cli.pairing import find_pairing, pair_problem
from sgpo_cli.progress import stopwatch
from sgpo_cli.step import Outcome, Step


def run(config: GenPairsConfig, step: Step) -> None:
    pairing = find_pairing(config.pairing)
    request = prompts.improver_request(config.policy, config.improver_prompt)
    rows = read_dataset(config, ("prompt",), config.policy)
    engine = open_engine(
        config.engine, config.policy, dtype=config.dtype, chat_template_kwargs=config.chat_template_kwargs
    )
    forbidden = forbidden_tokens(config, config.policy)

    answer = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    improve = Sampling(config.max_new_tokens, config.improver_temperature, config.improver_top_p)

    def work(batch: list[Row]) -> BatchResult:
        asked = [row["prompt"] for row in batch]
        seconds: dict[str, float] = {}
        with stopwatch(seconds, "generation_seconds"):
            responses = engine.generate(asked, answer, seeds_of(batch, config.seed, "policy"))
            better = engine.generate(
                [
                    prompts.improve(prompt, response.text, request)
                    for prompt, response in zip(asked, responses, strict=True)
                ],
                improve,
                seeds_of(batch, config.seed, "improver"),
            )
        pairs = [
            pairing.choose({"policy": response, "improver": improved})
            for response, improved in zip(responses, better, strict=True)
        ]
        outcomes = [_outcome(row, *pair, config, forbidden) for row, pair in zip(batch, pairs, strict=True)]
        return BatchResult(outcomes, seconds | token_counts([*responses, *better]))

    with step:
        outcomes, stats = run_batches(step, rows, config.batch_size, work)
        counts = step.write_rows(chain(set_aside(rows), outcomes))
        step.finish(DATA_FILES, {**counts, **stats, "improver_prompt": request})


def _outcome(
    row: Row, chosen: Generation, rejected: Generation, config: GenPairsConfig, forbidden: list[str]
) -> Outcome:
    """A row that TRL's DPOTrainer takes as it is, and why it is dropped, if it is."""
    pair: dict[str, Any] = {"id": row["id"], "prompt": row["prompt"]}
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        pair[name] = [{"role": "assistant", "content": text.text}]
    return pair, pair_problem(chosen, rejected, config.max_length_ratio, forbidden)
