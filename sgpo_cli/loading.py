"""Loads tokenizers and models for inference, the same way for every part that needs one."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from sgpo_cli.errors import UsageError

logger = logging.getLogger(__name__)


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turn what libraries raise for options and files they cannot use into a user's error.

    Raises:
        UsageError: with the first line of what the library said.
    """
    try:
        yield
    except RuntimeError as error:  # such as a tracker that is not installed
        if "memory" in str(error):
            raise
        raise UsageError(f"{what}: {_first_line(error)}") from error
    except (ValueError, TypeError, KeyError, ImportError, SafetensorError) as error:
        raise UsageError(f"{what}: {_first_line(error)}") from error
    except OSError as error:
        if error.errno is not None:  # the system's own: disk full, no permission
            raise
        raise UsageError(f"{what}: {_first_line(error)}") from error


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or Hub name, with a chat template and a pad token.

    Raises:
        UsageError: it cannot be loaded, or has no chat template or no token to pad with.
    """
    with refusals(model):
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    if tokenizer.chat_template is None:
        raise UsageError(
            f"{model}: its tokenizer has no chat template",
            "save one as chat_template.jinja beside the tokenizer, or for training pass --chat-template-path",
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"{model}: its tokenizer has neither a pad token nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(model: str, dtype: str = "auto") -> PreTrainedModel:
    """A causal language model for inference, on the accelerator if there is one; adapters are followed.

    Only safetensors weights are read and no code from a repository is run.

    Raises:
        UsageError: it cannot be loaded.
    """
    with refusals(model):
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    loaded.config.use_cache = True  # trainers save it as false, and generation would recompute every prefix
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logger.debug("%s: %s on %s, %s attention", model, loaded.dtype, device, loaded.config._attn_implementation)
    loaded.to(device)  # type: ignore[arg-type]  # transformers wraps it without its signature
    return loaded.eval()  # type: ignore[no-any-return]


def generation_config(model: str) -> GenerationConfig:
    """The generation config that a model is loaded with, without loading it: its file's, or its config's."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # it has none
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model, trust_remote_code=False))


def end_tokens(configured: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a turn: the generation config's and the tokenizer's."""
    ends = configured.eos_token_id if configured else None
    tokens = ends if isinstance(ends, list) else [ends]
    return sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None})


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def template_ids(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], prompt: bool, **kwargs: Any
) -> list[int]:
    """Token ids of a conversation; `prompt` adds the header that asks for the assistant's turn."""
    return tokenizer.apply_chat_template(  # type: ignore[return-value]  # the type depends on the arguments
        messages, tokenize=True, add_generation_prompt=prompt, return_dict=False, **kwargs
    )


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[dict[str, str]]], **kwargs: Any
) -> list[list[int]]:
    """Token ids of many conversations, each with the header that asks for the assistant's turn."""
    texts = tokenizer.apply_chat_template(list(conversations), tokenize=False, add_generation_prompt=True, **kwargs)
    return tokenizer(texts, add_special_tokens=False).input_ids  # type: ignore[no-any-return]
