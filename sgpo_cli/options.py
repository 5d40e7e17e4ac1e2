"""What an option is, and the options that stages share; those of each stage are in `configs.py`."""

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt

Count = Annotated[int, Gt(0)]
WorldSize = Annotated[int, Gt(0), Le(100_000)]  # the world has about a million different letters
Seed = Annotated[int, Ge(0), Lt(2**32)]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Share = Annotated[float, Ge(0), Le(1)]
Temperature = Annotated[float, Ge(0), Le(10)]
TopP = Annotated[float, Gt(0), Le(1)]
Rate = Annotated[float, Gt(0)]

TRAINER_KEY = "trainer"  # the field that holds options for TRL


def option(help: str, default: Any = MISSING, *, kind: str = "value") -> Any:
    """A field with its help text.

    Args:
        kind: how it enters the request of a step. "value": as it is. "data", "model": the digest of what
            it names. "answers": the same, of a model or a file of its answers. "teacher", "judge": the digest of
            the model or file it names, if any. "prompt": the prompt's text.
            "url": the address without credentials and query.
            "guard": not at all, because it can stop a run but never change its output.
    """
    metadata = {"help": help, "kind": kind}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class StageConfig:
    """What every stage has."""

    VERSION: ClassVar[int] = 1  # raised by hand when the same request would give another output
    TRAINER: ClassVar[str] = ""  # which of TRL's trainers takes further options: "sft", "dpo" or none
    POSITIONAL: ClassVar[str] = ""  # the option that may also be given without its flag
    DRY_RUN: ClassVar[bool] = False  # whether the stage's module can say beforehand what it would do and cost

    output_dir: str = option("Directory to write; a step has exactly one.", kind="guard")
    seed: Seed = option("Seed of everything random in this step.", 42)


@dataclass(kw_only=True)
class DataConfig(StageConfig):
    """A stage that reads rows."""

    dataset: str | list[str] = option(
        "A step's directory, a JSONL, JSON, CSV or Parquet file, or a Hub name; several are read one after another "
        "(on the command line, repeat the flag), and their ids then end with @ and the data set's number.",
        kind="data",
    )
    split: str = option("Split to read when the dataset comes from the Hub.", "train")
    prompt_column: str | None = option("Your name for the column `prompt`.", None)
    completion_column: str | None = option("Your name for the column with the reference answer.", None)
    messages_column: str | None = option("Your name for the column `messages`.", None)
    id_column: str | None = option("Your name for the column `id`.", None)
    max_rows: Count | None = option("Use only the first rows of each dataset.", None)
    part: str | None = option(
        "Use only one of several equal parts of each dataset: 2/4 is the second quarter, in the order of the rows; "
        "max_rows then counts within it.",
        None,
    )
    on_bad_row: Literal["stop", "reject"] = option(
        "What a malformed row does: stop everything, or be set aside in rejects.jsonl.", "stop"
    )
    control_tokens: Literal["reject", "keep"] = option(
        "Text that holds a control token of the model, such as <|im_end|>: a bad row, or kept.", "reject"
    )
    max_reject_share: Share = option(
        "With --on-bad-row reject: stop when more than this share is bad.", 0.01, kind="guard"
    )

    def __post_init__(self) -> None:
        """One data set in a list is that data set: the same request."""
        if isinstance(self.dataset, list) and len(self.dataset) == 1:
            self.dataset = self.dataset[0]
        if not self.dataset:
            raise ValueError("option 'dataset': names nothing")
        part_of(self.part)

    @property
    def datasets(self) -> list[str]:
        return [self.dataset] if isinstance(self.dataset, str) else self.dataset


def part_of(text: str | None) -> tuple[int, int]:
    """The option `part`: "2/4" is (2, 4), None all rows, (1, 1).

    Raises:
        ValueError: it is no part.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text or "1/1")
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise ValueError(f"option 'part': expected one of several, such as 2/4, got {text!r}")
    return number, count


@dataclass(kw_only=True)
class GenerateConfig(DataConfig):
    """A stage that generates texts."""

    VERSION: ClassVar[int] = 2  # 2: a seed per row instead of one per batch

    engine: str = option(
        "What generates: transformers, vllm (in an environment of its own), openai (servers, see --base-url), or "
        "echo (no model; for tests).",
        "transformers",
    )
    engine_options: dict[str, Any] = option(
        "For vllm: arguments of its engine, such as {tensor_parallel_size: 2, gpu_memory_utilization: 0.8}.", {}
    )
    batch_size: Count = option(
        "Rows that are handed to the engine together; what a stop can cost. The engine cuts them to fit into memory.",
        512,
    )
    max_new_tokens: Count = option("Longest text to generate, in tokens; a text cut there is rejected.", 1024)
    temperature: Temperature = option("Sampling temperature of the policy; 0 is greedy.", 1.0)
    top_p: TopP = option("Nucleus sampling of the policy.", 1.0)
    dtype: Dtype = option("Number format of a local model: auto (the checkpoint's), float32, bfloat16 ...", "auto")
    chat_template_kwargs: dict[str, Any] = option(
        "Settings for the chat template, such as {enable_thinking: false}; keep them the same in every step.",
        {},
    )

    def __post_init__(self) -> None:
        """An unknown engine is refused with the recipe, not when the step's turn comes."""
        from sgpo_cli.engines.base import check_engine

        super().__post_init__()
        if self.engine != "openai":
            check_engine(self.engine)


@dataclass(kw_only=True)
class RemoteConfig(GenerateConfig):
    """A stage that can ask servers."""

    base_url: str | None = option(
        "For --engine openai: address of the server, or of several with commas between.", None, kind="guard"
    )
    api_key_env: str = option("Environment variable with its API key; '' for none.", "OPENAI_API_KEY", kind="guard")
    api_key_file: str | None = option("File that holds its API key, instead.", None, kind="guard")
    allow_insecure: bool = option("Send an API key over plain http, also to other machines.", False, kind="guard")
    concurrency: Count = option(
        "Requests at a time, to each server; fewer while the server says it is too many.", 32, kind="guard"
    )
    requests_per_minute: Rate | None = option("Send no more requests than this.", None, kind="guard")
    tokens_per_minute: Rate | None = option("Use no more tokens than this, in and out.", None, kind="guard")
    request_timeout: Rate = option("Seconds for one call, all in all.", 300.0, kind="guard")
    max_attempts: Count = option("Tries for one row; then it counts as failed.", 8, kind="guard")
    max_wait: Rate = option("Longest wait, in seconds, that a server may ask for.", 600.0, kind="guard")
    max_outage: Rate = option("Stop when nothing has worked for so many seconds.", 60.0, kind="guard")
    max_failed: Annotated[int, Ge(0)] = option(
        "Failed rows to accept; with more, the step stays open and another run asks for them again.",
        0,
        kind="guard",
    )
    price: dict[str, Any] = option(
        'Price per million tokens, such as {"input": 2.5, "output": 10}; also cached_input, and batch (a factor).',
        {},
        kind="guard",
    )
    max_cost: Rate | None = option("Stop before the step costs more, over all its runs.", None, kind="guard")
    max_tokens: Count | None = option("Stop before the step uses more tokens, over all its runs.", None, kind="guard")
    max_tokens_field: str = option("What the server calls the limit on new tokens.", "max_tokens")
    reasoning_effort: str | None = option("For reasoning models: low, medium, high ...", None)
    thinking: Literal["strip", "keep"] = option("What to do with <think>...</think> in an answer.", "strip")
    extra_body: dict[str, Any] = option("Further fields for the request's body.", {})
    drop_params: list[str] = option("Fields that the server does not take, such as temperature; repeat the flag.", [])

    def is_served(self, model: str) -> bool:
        """Whether a model is a name that a server knows, rather than something that can be read here."""
        return self.engine == "openai" and not Path(model).exists()


@dataclass(kw_only=True)
class TrainConfig(DataConfig):
    """A stage that trains through TRL; any field of TRL's configs is an option too."""

    DRY_RUN: ClassVar[bool] = True

    model_name_or_path: str = option("The model to start from: a step, a model directory or a Hub name.", kind="model")
    chat_template_kwargs: dict[str, Any] = option(
        "Settings for the chat template, such as {enable_thinking: false}; keep them the same in every step.",
        {},
    )
    max_truncated_share: Share = option(
        "Refuse to train when more than this share of rows is cut or dropped at max_length.",
        0.05,
        kind="guard",
    )
    global_batch_size: Count | None = option(
        "Rows per optimizer step, over all processes: the same optimisation on 1, 8 or 32 GPUs.", None
    )
    trainer: dict[str, Any] = option("Options for TRL's trainer.", {})


def own_options(config: type[StageConfig]) -> dict[str, Any]:
    """The fields of a stage's config that are flags, by name."""
    return {entry.name: entry for entry in fields(config) if entry.name != TRAINER_KEY}
