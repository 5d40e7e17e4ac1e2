"""make-targets: the policy answers, the teacher improves its answers. Rows (prompt, response, reference, target)."""

from itertools import chain
from typing import Any

from sgpo_cli import prompts
from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.batches import BatchResult, Row, run_batches, seeds_of
from sgpo_cli.configs import MakeTargetsConfig
from sgpo_cli.dataset import forbidden_tokens, read_dataset, set_aside
from sgpo_cli.engines import Generation, Sampling, open_engine, token_counts
from sgpo_cli.pairing import text_problem
from sgpo_cli.progress import stopwatch
from sgpo_cli.step import Outcome, Step
from sgpo_cli.teachers import check_teacher, open_teacher


def run(config: MakeTargetsConfig, step: Step) -> None:
    check_teacher(config.teacher)
    rows = read_dataset(config, ("prompt", "reference"), config.policy)
    settings: dict[str, Any] = {"dtype": config.dtype, "chat_template_kwargs": config.chat_template_kwargs}
    policy = open_engine(config.engine, config.policy, **settings)
    teacher = open_teacher(
        config.teacher,
        policy,
        prompts.load(config.teacher_prompt),
        Sampling(config.teacher_max_new_tokens, config.teacher_temperature),
        **settings,
    )
    forbidden = forbidden_tokens(config, config.policy)

    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)

    def work(batch: list[Row]) -> BatchResult:
        seconds: dict[str, float] = {}
        with stopwatch(seconds, "generation_seconds"):
            responses = policy.generate(
                [row["prompt"] for row in batch], sampling, seeds_of(batch, config.seed, "policy")
            )
        answered = [
            {**_identity(row), "response": response.text, "reference": row["reference"]}
            for row, response in zip(batch, responses, strict=True)
        ]
        with stopwatch(seconds, "generation_seconds"):
            targets = teacher.improve(answered, seeds_of(batch, config.seed, "teacher"))
        outcomes = [
            _outcome(row, response, target, forbidden)
            for row, response, target in zip(answered, responses, targets, strict=True)
        ]
        return BatchResult(outcomes, seconds | token_counts([*responses, *targets]))

    with step:
        outcomes, stats = run_batches(step, rows, config.batch_size, work)
        counts = step.write_rows(chain(set_aside(rows), outcomes))
        step.finish(DATA_FILES, {**counts, **stats})


def _identity(row: Row) -> Row:
    return {"id": row["id"], "prompt": row["prompt"]}


def _outcome(row: Row, response: Generation, target: Generation, forbidden: list[str]) -> Outcome:
    """The row with its target, or the reason why it is none."""
    kept = {**row, "target": target.text}
    if problem := text_problem(response, forbidden):
        return kept, f"{problem}_response"
    problem = text_problem(target, forbidden)
    return kept, f"{problem}_target" if problem else None
