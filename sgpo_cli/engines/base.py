"""The seam that every engine fits, and the table that finds one by name."""

import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sgpo_cli.errors import UsageError

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How to decode. A temperature of 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Generation:
    """One text. `finish_reason` is "length" when it was cut at the token limit, and "too_long" when the
    conversation does not fit in the model's context: then there is no text."""

    text: str
    finish_reason: Literal["stop", "length", "too_long"]
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Engine(Protocol):
    """Whatever can answer conversations."""

    def generate(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        """One text per conversation, in the same order; the chat template is the engine's business.

        Args:
            seeds: one per conversation; it decides what is random in its text, whatever else is in the call.
        """
        ...


def token_counts(generations: Iterable[Generation]) -> dict[str, float]:
    """Tokens in and out, to add up."""
    pairs = [(text.prompt_tokens, text.completion_tokens) for text in generations]
    return {
        "prompt_tokens": sum(prompt for prompt, _ in pairs),
        "completion_tokens": sum(completion for _, completion in pairs),
    }


ENGINES = {
    "transformers": "sgpo_cli.engines.transformers:TransformersEngine",
    "echo": "sgpo_cli.engines.echo:EchoEngine",
}


def open_engine(name: str, model: str, **settings: Any) -> Engine:
    """The engine `name` with `model` loaded.

    Args:
        settings: `dtype` and `chat_template_kwargs`.

    Raises:
        UsageError: no such engine, or its package is not installed.
    """
    if name not in ENGINES:
        raise UsageError(f"no engine '{name}'", f"engines: {', '.join(ENGINES)}")
    module_name, _, class_name = ENGINES[name].partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"engine '{name}' needs the package {error.name}", f"pip install {error.name}") from None
    engine: Engine = getattr(module, class_name)(model, **settings)
    return engine
