"""A look at what was trained: does the model stop by itself, and does it repeat itself?"""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PROMPTS = 8
MOST_TOKENS = 512
SPARE = 4
REPEATED = 4  # an n-gram of so many tokens; repetitive is a text in which fewer than half of them differ


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Any],
    longest: int,
    ends: Sequence[int],
    template: dict[str, Any],
) -> dict[str, Any]:
    """Greedy answers to the first prompts, counted.

    Args:
        longest: tokens of the longest answer trained on; half as many again are allowed.
        ends: tokens that end a turn.
        template: settings of the chat template.

    Returns:
        `prompts`, `stopped`, `repetitive` (counts) and `max_new_tokens`, for the manifest.
    """
    texts: Any = tokenizer.apply_chat_template(
        list(prompts[:PROMPTS]), tokenize=False, add_generation_prompt=True, **template
    )
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt")
    limit = min(longest + longest // 2 + SPARE, MOST_TOKENS)
    config = GenerationConfig(
        max_new_tokens=limit, do_sample=False, eos_token_id=list(ends), pad_token_id=tokenizer.pad_token_id
    )
    was_training, before = model.training, model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()  # nothing of the checkpoint's own may leak in
    output = model.generate(  # type: ignore[operator]
        input_ids=inputs.input_ids.to(model.device),
        attention_mask=inputs.attention_mask.to(model.device),
        generation_config=config,
    )
    model.generation_config = before
    model.train(was_training)
    made = [_until_end(ids, ends) for ids in output[:, inputs.input_ids.shape[1] :].tolist()]
    found = {
        "prompts": len(made),
        "stopped": sum(len(ids) < limit for ids in made),
        "repetitive": sum(map(is_repetitive, made)),
        "max_new_tokens": limit,
    }
    logger.debug("smoke generation: %r", tokenizer.decode(made[0]))
    if found["stopped"] < len(made) / 2 or found["repetitive"] > len(made) / 2:
        logger.warning(
            "of %d greedy answers, %d stop by themselves within %d tokens and %d are repetitive",
            *(found[name] for name in ("prompts", "stopped", "max_new_tokens", "repetitive")),
        )
    return found


def _until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def is_repetitive(ids: Sequence[int]) -> bool:
    """Whether fewer than half of a text's n-grams differ from each other."""
    grams = [tuple(ids[place : place + REPEATED]) for place in range(len(ids) - REPEATED + 1)]
    return len(grams) > 2 * REPEATED and len(set(grams)) < len(grams) / 2
