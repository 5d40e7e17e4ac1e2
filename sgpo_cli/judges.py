"""Judges: answers in, scores or verdicts out.

A rule, a function of the user's own and a reward model score one answer. A language model does that too, or
compares two answers, in both orders; what it says counts only as a verdict in the one form it was asked for,
with the marker of its own request. Anything else is invalid: counted, never a win, never a default.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, Literal, Protocol

from sgpo_cli import prompts
from sgpo_cli.batches import Batches, Row
from sgpo_cli.configs import EvaluateConfig
from sgpo_cli.control_tokens import defused
from sgpo_cli.dataset import model_tokens
from sgpo_cli.engines import Engine, Generation, LazyEngine, Sampling, open_engine
from sgpo_cli.engines.base import AsksServer
from sgpo_cli.errors import UsageError
from sgpo_cli.generation import Lazy, Passes, seeds_for
from sgpo_cli.options import GenerateConfig
from sgpo_cli.score_functions import ScoreFunction, open_function
from sgpo_cli.step import Step

KINDS = "demo, hf:PATH_OR_NAME, openai:MODEL, reward:PATH_OR_NAME, MODULE:FUNCTION"
LANGUAGE_MODELS = ("hf", "openai")
SCORES = tuple(map(str, range(1, 11)))

Verdict = Literal["A", "B", "tie", "invalid"]
Scores = Sequence[float | None]
WORDS: dict[str | None, Verdict] = {"A": "A", "B": "B", "TIE": "tie", None: "invalid"}


class PointJudge(Protocol):
    """Scores answers one by one."""

    def score(self, passes: Passes, name: str, rows: Sequence[Row]) -> Scores:
        """A number per row with `id`, `prompt` and `response`, None for no valid verdict; `name` is the pass's."""
        ...


class RuleJudge:
    """A function of prompts and answers, kept batch by batch.

    Args:
        open_function: gives the function of a batch; called when the first batch is due.
    """

    def __init__(self, step: Step, size: int, open_function: Callable[[], ScoreFunction]) -> None:
        self._step, self._size, self._open = step, size, open_function
        self._function: ScoreFunction | None = None

    def score(self, passes: Passes, name: str, rows: Sequence[Row]) -> Scores:
        size = self._size

        def do(number: int) -> dict[str, Any]:
            return {"scores": self._scores(rows[number * size : (number + 1) * size]), "stats": {}}

        with closing(Batches(self._step, name, len(rows), size, do)) as batches:
            batches.work(f"{self._step.request.stage}, {name}")
            if not self._step.rank.is_main:  # it reads no scores, and the main one may end and clear up any moment
                return [None] * len(rows)
            records = [batches.record(number)["scores"] for number in range(-(-len(rows) // size))]
        return list(chain.from_iterable(records))

    def _scores(self, batch: Sequence[Row]) -> list[float | None]:
        if self._function is None:
            self._function = self._open()
        return self._function(batch)


class LanguageModelJudge:
    """A language model that is asked through an engine.

    Args:
        instructions: the judge's prompt, with `{marker}`.
        tokens: control tokens of the judge, which no text may bring along.

    `judgments` holds, per pass, all that was replied and what it counted as.
    """

    def __init__(
        self, engine: Engine | AsksServer, instructions: str, config: EvaluateConfig, tokens: Sequence[str] = ()
    ) -> None:
        self._engine, self._instructions, self._seed, self._tokens = engine, instructions, config.seed, tokens
        self._sampling = Sampling(config.judge_max_new_tokens, config.judge_temperature)
        self.judgments: list[Iterator[dict[str, str]]] = []

    def score(self, passes: Passes, name: str, rows: Sequence[Row]) -> Scores:
        """Whole numbers from 1 to 10."""
        found = self._judge(passes, name, rows, _alone, SCORES)
        return [None if each is None else float(each) for each in found]

    def compare(self, passes: Passes, name: str, rows: Sequence[Row]) -> list[Verdict]:
        """A verdict per row with `id`, `prompt`, `first` and `second`; A is the first."""
        return [WORDS[each] for each in self._judge(passes, name, rows, _pair, ("A", "B", "TIE"))]

    def _judge(
        self,
        passes: Passes,
        name: str,
        rows: Sequence[Row],
        material_of: Callable[[Row], dict[str, str]],
        allowed: Sequence[str],
    ) -> list[str | None]:
        def material(row: Row) -> dict[str, str]:
            return {name: defused(text, self._tokens) for name, text in material_of(row).items()}

        asked = Lazy(len(rows), lambda place: prompts.judge(self._instructions, material(rows[place])))
        seeds = seeds_for(rows, self._seed, name)
        replies = passes.generate(name, self._engine, asked, self._sampling, seeds)
        found = [verdict_of(reply, material(row), allowed) for row, reply in zip(rows, replies, strict=True)]
        self.judgments.append(_kept(name, rows, replies, found))
        return found


def _kept(
    name: str, rows: Sequence[Row], replies: Sequence[Generation], found: Sequence[str | None]
) -> Iterator[dict[str, str]]:
    for row, reply, verdict in zip(rows, replies, found, strict=True):
        facts = {"id": row["id"], "pass": name, "verdict": verdict or "invalid", "reply": reply.text}
        yield {**facts, "finish_reason": reply.finish_reason}


def _alone(row: Row) -> dict[str, str]:
    return {"request": prompts.as_text(row["prompt"]), "answer": row["response"]}


def _pair(row: Row) -> dict[str, str]:
    return {"request": prompts.as_text(row["prompt"]), "answer A": row["first"], "answer B": row["second"]}


def verdict_of(reply: Generation, material: dict[str, str], allowed: Sequence[str]) -> str | None:
    """What the reply's last line says, or None when it is no verdict of the form that was asked for.

    A line counts only with the marker of this request, which occurs in no text that was judged: a verdict
    that the judge quotes from an answer is none. A reply that was cut, or that gives two different
    verdicts, has none either.
    """
    if reply.finish_reason != "stop" or not reply.text.strip():
        return None
    words = "|".join(map(re.escape, allowed))
    form = re.compile(rf"VERDICT {prompts.marker_of(material)}: ({words})")
    lines = [line.strip() for line in reply.text.strip().splitlines()]
    found = {match[1] for line in lines if (match := form.fullmatch(line))}
    return found.pop() if len(found) == 1 and form.fullmatch(lines[-1]) else None


def check_judge(config: EvaluateConfig) -> tuple[str, str]:
    """Kind and argument of the judge that is asked for.

    Raises:
        UsageError: no such judge, or it does not judge that way.
    """
    kind, _, argument = config.judge.partition(":")
    if not (config.judge == "demo" or (kind and argument and kind != "demo")):
        raise UsageError(f"no judge '{config.judge}'", f"judges: {KINDS}")
    if config.judge_mode == "pairwise" and kind not in LANGUAGE_MODELS:
        raise UsageError(
            f"judge {config.judge} scores answers one by one, it does not compare them",
            "leave --judge-mode out; with --baseline, scores are compared",
        )
    if config.judge_mode == "pairwise" and not config.baseline:
        raise UsageError("--judge-mode pairwise needs a --baseline", "name one of the models, or a file of answers")
    return kind, argument


def judge_prompt(config: EvaluateConfig) -> str:
    """The instructions of a language model as judge.

    Raises:
        UsageError: the file is not there, or gives the judge no way to answer.
    """
    text = prompts.load(config.judge_prompt or "")
    if "VERDICT {marker}:" not in text:
        raise UsageError(
            f"judge prompt {config.judge_prompt}: nowhere asks for a line 'VERDICT {{marker}}: ...'",
            "without it no verdict can be told from text that the judge quotes",
        )
    return text


def open_judge(config: EvaluateConfig, step: Step, rows: Sequence[Row]) -> RuleJudge | LanguageModelJudge:
    """The judge that is asked for; loads no model and sends nothing yet.

    Args:
        rows: those to be judged about, so that a prompt which the rule cannot read is refused before any work.

    Raises:
        UsageError: no such judge, or it cannot be asked.
    """
    kind, argument = check_judge(config)
    if kind == "hf":
        local = LazyEngine(lambda: open_engine("transformers", argument, **_settings(config)))
        return LanguageModelJudge(local, judge_prompt(config), config, model_tokens(argument))
    if kind == "openai":
        from sgpo_cli.remote.connect import connect

        key = config.judge_api_key_env, config.judge_api_key_file
        return LanguageModelJudge(connect(config, argument, config.judge_base_url, *key), judge_prompt(config), config)
    return open_scorer(config.judge, config, step, rows)


def open_scorer(spec: str, config: GenerateConfig, step: Step, rows: Sequence[Row]) -> RuleJudge:
    """The judge that is a function: `reward:PATH_OR_NAME`, `MODULE:FUNCTION` or `demo`; loads no model yet.

    Raises:
        UsageError: no such judge, or it cannot read the prompts.
    """
    return RuleJudge(step, config.batch_size, open_function(spec, rows, _settings(config)))


def _settings(config: GenerateConfig) -> dict[str, Any]:
    return {"dtype": config.dtype, "chat_template_kwargs": config.chat_template_kwargs}
