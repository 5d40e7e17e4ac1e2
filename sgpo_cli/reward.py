"""Reward models: sequence classification with one label on a rendered conversation."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from sgpo_cli.errors import UsageError
from sgpo_cli.loading import load_tokenizer, refusals, template_ids

Message = dict[str, str]


class RewardModel:
    """A model that gives a conversation one number; higher is better.

    Args:
        model: a directory or Hub name, read from safetensors, without code of its own.

    Raises:
        UsageError: it cannot be loaded, has more than one label, or no trained head.
    """

    def __init__(self, model: str, dtype: str = "auto", chat_template_kwargs: dict[str, Any] | None = None) -> None:
        self._template = chat_template_kwargs or {}
        self._tokenizer = load_tokenizer(model)
        self._model = _load(model, dtype)
        self._model.config.pad_token_id = self._tokenizer.pad_token_id  # where the last token is looked for
        self._context = getattr(self._model.config, "max_position_embeddings", None) or math.inf

    @torch.inference_mode()
    def score(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> list[float | None]:
        """A number per answer; None for a conversation that does not fit in the model's context."""
        conversations = [
            [*prompt, {"role": "assistant", "content": response}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        ids = [template_ids(self._tokenizer, turns, prompt=False, **self._template) for turns in conversations]
        fitting = [place for place, tokens in enumerate(ids) if len(tokens) <= self._context]
        scores: list[float | None] = [None] * len(ids)
        if fitting:
            batch = self._tokenizer.pad(
                {"input_ids": [ids[place] for place in fitting]}, padding_side="right", return_tensors="pt"
            ).to(self._model.device)
            logits = self._model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for place, score in zip(fitting, logits[:, 0].float().tolist(), strict=True):
                scores[place] = score
        return scores


def _load(model: str, dtype: str) -> PreTrainedModel:
    with refusals(model):
        loaded, found = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    # transformers fills what is missing with random numbers and goes on.
    if missing := sorted(found["missing_keys"]):
        raise UsageError(
            f"{model}: no reward model, its weights lack {', '.join(missing[:3])}",
            "a reward model is saved by TRL's RewardTrainer, or has one label for sequence classification",
        )
    if loaded.config.num_labels != 1:
        raise UsageError(f"{model}: has {loaded.config.num_labels} labels; a reward model has one")
    loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    return loaded.eval()  # type: ignore[no-any-return]
