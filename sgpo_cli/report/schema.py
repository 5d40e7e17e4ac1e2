"""What a report reads of a step's own JSON files, checked: a run directory may come from others, or be damaged."""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from sgpo_cli.errors import IntegrityError
from sgpo_cli.measures import finite

Rows = Annotated[int, Field(ge=0, le=2**53)]
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Name = Annotated[str, Field(max_length=4096)]
Share = Annotated[float, Field(ge=0, le=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
T = TypeVar("T")


class Part(BaseModel):
    """Values as the step wrote them: no number for a text, no text for a number, nothing infinite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="ignore")


class Histogram(Part):
    low: float
    high: float
    counts: Annotated[list[Rows], Field(min_length=1, max_length=1000)]


class TextFacts(Part):
    words: dict[str, float]
    characters: dict[str, float]
    repetitive: Share
    unfinished: Share
    scripts: dict[str, float]


class PairFacts(Part):
    old: Name
    new: Name
    unchanged: Share
    longer: Share
    old_words: Histogram
    new_words: Histogram
    edit_share: dict[str, float]
    edit_histogram: Histogram
    length_ratio: dict[str, float]
    ratio_histogram: Histogram


class LogPpl(Part):
    quantiles: dict[str, float] = {}
    kept: Histogram | None = None
    dropped: Histogram | None = None


class Quality(Part):
    """See `quality.describe`."""

    rows: Rows
    sampled: Rows
    texts: dict[str, TextFacts]
    near_duplicates: dict[str, Share]
    cut: Share
    pair: PairFacts | None = None
    script_switch: Share = 0.0
    log_ppl: LogPpl | None = None
    warnings: list[str]


class Training(Part):
    steps: Rows = 0
    rows_cut: Rows = 0
    tokens: Rows = 0
    first_loss: float | None = None
    last_loss: float | None = None


class Request(Part):
    """See `step.Request`."""

    stage: Name
    config: dict[str, Any]
    inputs: dict[str, Name]


class Manifest(Request):
    """See `Step.finish`; keys that a stage does not have stay at their defaults.

    Further keys are kept as they are: a pass with a remote model leaves its bill under its own name.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")

    rows_in: Rows | None = None
    rows_out: Rows | None = None
    rejected: dict[str, Rows] = {}
    seconds: Seconds
    generation_seconds: Seconds | None = None
    prompt_tokens: Rows | None = None
    completion_tokens: Rows | None = None
    peak_memory_mib: Rows | None = None
    finished: Name
    run_id: Name
    versions: dict[str, Name]
    outputs: dict[Name, dict[str, Any]]
    training: Training | None = None
    quality: Quality | None = None
    log_ppl_threshold: float | None = None
    report: list[str] = []

    def total(self, name: str) -> float | None:
        """`cost` or a number of tokens, of this step and its passes with remote models; None if none has it.

        Each pass tells the cost of the whole step so far, so the highest counts.
        """
        places = [vars(self), *((self.model_extra or {}).values())]
        found: list[float] = [place[name] for place in places if isinstance(place, dict) and finite(place.get(name))]
        if not found:
            return None
        return max(found) if name == "cost" else sum(found)


class Score(Part):
    name: Name
    role: Name = ""
    decoding: Name = ""
    score: float
    ci95: Interval
    n: Rows


class Metrics(Part):
    """Scores; entries without a score, such as a model whose answers could not be judged, are left out."""

    models: list[Score] = []

    @field_validator("models", mode="before")
    @classmethod
    def _scored(cls, entries: object) -> object:
        if not isinstance(entries, list):
            return entries
        return [entry for entry in entries if not isinstance(entry, dict) or entry.get("score", 0) is not None]


class Log(Part):
    """A `trainer_state.json`."""

    log_history: list[dict[str, Any]]


class RunRecord(Part):
    """How `sgpo run` was called, see `pipeline.run`."""

    command: Name
    recipe: str


def checked(kind: type[T], value: object, path: Path) -> T:
    """`value` as a `kind`.

    Raises:
        IntegrityError: it is none; `path` is named as the place.
    """
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(
            f"{path}: not what sgpo writes: {where[:200]}: {first['msg']}", "run the step again with --fresh"
        ) from None
