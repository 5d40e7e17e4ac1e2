"""make-targets: the policy answers, the teacher improves its answers. Rows (prompt, response, reference, target)."""

import logging
from collections.abc import Sequence
from itertools import chain

from sgpo_cli import quality
from sgpo_cli.artifacts import DATA_FILES
from sgpo_cli.batches import Row
from sgpo_cli.configs import MakeTargetsConfig
from sgpo_cli.dataset import forbidden_tokens, read_dataset, set_aside
from sgpo_cli.engines import Generation, LazyEngine, Sampling, open_engine
from sgpo_cli.errors import UsageError
from sgpo_cli.gates import check_gates, target_problem, text_problem
from sgpo_cli.generation import Lazy, Passes, seeds_for
from sgpo_cli.remote import batch_files
from sgpo_cli.remote.connect import open_generation
from sgpo_cli.remote.estimate import estimate
from sgpo_cli.step import Outcome, Step
from sgpo_cli.teachers import PromptedTeacher, check_teacher, open_teacher

logger = logging.getLogger(__name__)


def run(config: MakeTargetsConfig, step: Step) -> None:
    kind, _ = check_teacher(config.teacher)
    gates = [name for name in check_gates(config.gates) if (kind, name) != ("reference", "copy")]
    rows = read_dataset(config, ("prompt", "reference"), config.policy)
    policy = open_generation(config, config.policy)
    teacher = open_teacher(config, policy, rows[0])
    forbidden = forbidden_tokens(config, config.policy)
    by_file = _by_file(config, kind)
    with step, Passes(step, config.batch_size) as passes:
        responses = passes.generate(
            "policy",
            policy,
            Lazy(len(rows), lambda place: rows[place]["prompt"]),
            Sampling(config.max_new_tokens, config.temperature, config.top_p),
            seeds_for(rows, config.seed, "policy"),
        )
        answered = Lazy(len(rows), lambda place: _row(rows[place], responses[place].text))
        if kind != "self" and isinstance(policy, LazyEngine):
            policy.unload()
        if by_file and isinstance(teacher, PromptedTeacher) and not _exchange(config, teacher, passes, answered):
            return
        targets = teacher.improve(passes, answered)
        outcomes = (
            _outcome(config, row, response, target, forbidden, gates)
            for row, response, target in zip(answered, responses, targets, strict=True)
        )
        counts = step.write_rows(chain(set_aside(rows), outcomes))
        step.finish(DATA_FILES, {**counts, **passes.stats, **quality.facts(step.directory)})


def dry_run(config: MakeTargetsConfig) -> list[str]:
    """What the teacher would be asked and what that would cost; nothing is sent, loaded or written."""
    kind, model = check_teacher(config.teacher)
    check_gates(config.gates)
    rows = read_dataset(config, ("prompt", "reference"), config.policy)
    if kind != "openai":
        return [f"{len(rows)} rows; the teacher {config.teacher} asks no server, so nothing is to be paid"]
    # What the policy will answer is not known yet; a reference is about as long.
    answered = Lazy(len(rows), lambda place: _row(rows[place], rows[place]["reference"]))
    teacher = PromptedTeacher(LazyEngine(lambda: open_engine("echo", model)), config)
    conversations = teacher.conversations(answered)
    return estimate(config, conversations, (row["reference"] for row in rows), teacher.sampling.max_new_tokens)


def _by_file(config: MakeTargetsConfig, kind: str) -> bool:
    if not (config.batch_out or config.batch_in):
        return False
    if kind != "openai":
        raise UsageError("--batch-out and --batch-in are for the teacher openai:MODEL", f"it is {config.teacher}")
    if config.batch_out and config.batch_in:
        raise UsageError("--batch-out and --batch-in exclude each other", "write, run the batch, then read")
    return True


def _exchange(config: MakeTargetsConfig, teacher: PromptedTeacher, passes: Passes, answered: Sequence[Row]) -> bool:
    """Write the requests to a file, or read the answers from one; whether all answers are there now."""
    from sgpo_cli.engines.openai import OpenAIEngine

    engine = teacher.engine
    assert isinstance(engine, OpenAIEngine)
    questions = engine.form.questions(teacher.conversations(answered), teacher.sampling, teacher.seeds(answered))
    if config.batch_out:
        count = batch_files.write_requests(config.batch_out, questions, passes.paid())
        logger.info("%s: %d requests; have them run, then pass the answers with --batch-in", config.batch_out, count)
        return False
    assert config.batch_in
    batch_files.read_answers(config.batch_in, questions, passes.paid(), engine.terms)
    return True


def _row(row: Row, response: str) -> Row:
    return {"id": row["id"], "prompt": row["prompt"], "response": response, "reference": row["reference"]}


def _outcome(
    config: MakeTargetsConfig,
    row: Row,
    response: Generation,
    target: Generation,
    forbidden: list[str],
    gates: list[str],
) -> Outcome:
    """The row with its target, or the reason why it is none."""
    kept = {**row, "target": target.text}
    if problem := text_problem(response, forbidden):
        return kept, f"{problem}_response"
    if problem := text_problem(target, forbidden):
        return kept, f"{problem}_target"
    problem = target_problem(kept, gates, config.max_length_ratio)
    return kept, f"{problem}_target" if problem else None
