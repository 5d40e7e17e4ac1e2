"""The seam that every engine fits, and the table that finds one by name."""

import gc
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from sgpo_cli.errors import UsageError

Message = dict[str, str]


@dataclass(frozen=True)
class Sampling:
    """How to decode. A temperature of 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0


# Why a text ended. "length": cut at the token limit. "too_long": the conversation does not fit in the model's
# context. Only of servers: "filtered" and "refused" (the model will not say it), "empty", "too_large",
# "bad_request" (the server takes no such request), "secret" (the text held the API key), "broken" (the text is no
# Unicode), "failed" (given up).
FinishReason = Literal[
    "stop",
    "length",
    "too_long",
    "filtered",
    "refused",
    "empty",
    "too_large",
    "bad_request",
    "secret",
    "broken",
    "failed",
]


@dataclass(frozen=True)
class Generation:
    """One text; only with "stop" is it a whole one."""

    text: str
    finish_reason: FinishReason
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


@runtime_checkable
class FitsMemory(Protocol):
    """An engine that makes smaller batches, for the rest of its life, when memory runs out."""

    batch_tokens: int
    """Rows times the longest prompt with the longest text, of one batch."""
    out_of_memory: int
    """How often it ran out so far."""


@dataclass(frozen=True)
class Asked:
    """What a server was asked for: the texts, read from disk, and what to record of it."""

    texts: Sequence[Generation]
    facts: dict[str, Any]


@runtime_checkable
class AsksServer(Protocol):
    """An engine that keeps its answers itself, one by one, because each of them was paid for."""

    def ask_all(
        self,
        paid: Any,
        conversations: Sequence[list[Message]],
        sampling: Sampling,
        seeds: Sequence[int],
        label: str,
    ) -> Asked:
        """A text per conversation; `paid` (remote.paid.Paid) holds what earlier runs got, and takes the rest."""
        ...


class LazyEngine:
    """An engine that is loaded when it is first used, and can be put away again."""

    def __init__(self, load: Callable[[], Engine]) -> None:
        self._load = load
        self._engine: Engine | None = None

    def generate(
        self, conversations: Sequence[list[Message]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Generation]:
        return self.load().generate(conversations, sampling, seeds)

    def load(self) -> Engine:
        if self._engine is None:
            self._engine = self._load()
        return self._engine

    def unload(self) -> None:
        """Give its memory back."""
        self._engine = None
        gc.collect()


def token_counts(generations: Iterable[Generation]) -> dict[str, float]:
    """Tokens in and out, to add up."""
    pairs = [(text.prompt_tokens, text.completion_tokens) for text in generations]
    return {
        "prompt_tokens": sum(prompt for prompt, _ in pairs),
        "completion_tokens": sum(completion for _, completion in pairs),
    }


ENGINES = {
    "transformers": "sgpo_cli.engines.transformers:TransformersEngine",
    "vllm": "sgpo_cli.engines.vllm:VllmEngine",
    "echo": "sgpo_cli.engines.echo:EchoEngine",
}

INSTALL = {"vllm": "pip install 'sgpo[vllm]', in an environment of its own: see docs/vllm.md"}


def check_engine(name: str) -> str:
    """The place of the engine's class.

    Raises:
        UsageError: no such engine.
    """
    if name not in ENGINES:
        raise UsageError(f"no engine '{name}'", f"engines: {', '.join(ENGINES)}, openai")
    return ENGINES[name]


def open_engine(name: str, model: str, **settings: Any) -> Engine:
    """The engine `name` with `model` loaded.

    Args:
        settings: `dtype`, `chat_template_kwargs` and `engine_options`.

    Raises:
        UsageError: no such engine, or its package is not installed.
    """
    module_name, _, class_name = check_engine(name).partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        install = INSTALL.get(package, f"pip install {package}")
        raise UsageError(f"engine '{name}' needs the package {package}", install) from None
    engine: Engine = getattr(module, class_name)(model, **settings)
    return engine
