"""Checks while a model is trained: reference model, NaN, progress. Each answers a way to fail silently."""

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sgpo_cli.errors import DivergedError

logger = logging.getLogger(__name__)

LN2 = math.log(2)
# How far apart a model's log-probabilities of an answer may lie, in nats, when it computes them in batches of other
# sizes. In 16 bits a token's are rounded differently by about 0.03, and roundings add up like a random walk: to 1.3
# over 2 048 tokens. Another model is further off: 4.5 where a base model was taken for its merged adapter.
ROUNDING = {"float32": 0.01, "16 bits": 2.0}
LINE_SECONDS = 10.0


class StopOnNan(TrainerCallback):
    """Ends training at the first loss or gradient norm that is not finite.

    TRL logs a NaN loss as 0.0 unless `logging_nan_inf_filter` is off, and finishes with success.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in ("loss", "grad_norm"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise DivergedError(
                    f"step {state.global_step}: {name} is {value}; no model was saved",
                    "lower learning_rate, or look for broken rows in the data",
                )


class CheckReference(TrainerCallback):
    """The reference is the frozen start model: the first rewards are 0, and the sigmoid loss is ln 2.

    Another first loss means that the reference is not the model that training starts from, which TRL does
    not notice (https://github.com/huggingface/trl/issues/2423 and the like).

    Args:
        beta: of the loss; a reward is so many times a difference of log-probabilities.
        rounded: the reference is computed in batches of another size, and in 16 bits or TF32.
        other: the reference is another model on purpose; the first loss is then only remembered.
    """

    def __init__(self, loss_type: Sequence[str], beta: float, *, rounded: bool = False, other: bool = False) -> None:
        self._plain = list(loss_type) == ["sigmoid"]
        self._tolerance = beta * ROUNDING["16 bits" if rounded else "float32"]
        self._other = other
        self.first_loss: float | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.global_step != 1 or logs is None or "rewards/chosen" not in logs:
            return
        self.first_loss = float(logs["loss"])
        if self._other:
            return
        rewards = max(abs(float(logs[f"rewards/{side}"])) for side in ("chosen", "rejected"))
        if rewards > self._tolerance or (self._plain and abs(self.first_loss - LN2) > self._tolerance):
            raise DivergedError(
                f"the first loss is {self.first_loss:.4f} (ln 2 = {LN2:.4f} expected) and the first reward "
                f"{rewards:.4f} (0 expected): the reference is not the model that training starts from",
                "pass a complete model directory as --model-name-or-path",
            )


class LogProgress(TrainerCallback):
    """A line now and then: step, loss, time left."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._printed = time.monotonic()
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._started = self._printed = time.monotonic()
        self._first_step = state.global_step
        where = f"continues at step {state.global_step} of" if state.global_step else "trains for"
        logger.info("%s: %s %d steps", self._what, where, state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if logs is None or "loss" not in logs or not (last or now - self._printed > LINE_SECONDS):
            return
        self._printed = now
        steps = max(state.global_step - self._first_step, 1)
        left = (state.max_steps - state.global_step) * (now - self._started) / steps
        accuracy = logs.get("rewards/accuracies")
        more = f", accuracy {accuracy:.2f}" if accuracy is not None else ""
        logger.info(
            "%s: step %d/%d, loss %.4f%s, %.0f s left",
            self._what,
            state.global_step,
            state.max_steps,
            float(logs["loss"]),
            more,
            left,
        )
