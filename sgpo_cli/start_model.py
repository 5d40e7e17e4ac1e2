"""What training starts from: a full model or an adapter, trained in full, with LoRA or with QLoRA.

Every pair works. An adapter that is trained with LoRA or QLoRA goes on as it is: the result is again one
adapter on the same base model, which everybody has. (Merging it first and training a new one would leave an
adapter on a model that lies nowhere, and in four bits a merge is not exact.) An adapter that is trained in
full is merged into its base first.
"""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file
from trl import ModelConfig, get_peft_config, get_quantization_config

from sgpo_cli.errors import UsageError
from sgpo_cli.loading import load_tokenizer, refusals

logger = logging.getLogger(__name__)

HALF = (torch.bfloat16, torch.float16)
FIXED = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")  # by the adapter that goes on


@dataclass(frozen=True)
class StartModel:
    """A full model, or an adapter and the full model below it; directories or Hub names."""

    base: str
    adapter: str | None = None
    revision: str = "main"

    @classmethod
    def find(cls, model: str, revision: str = "main") -> "StartModel":
        """Look at what `model` is; nothing is loaded.

        Raises:
            UsageError: an adapter whose base model is not there, or is an adapter itself.
        """
        if find_adapter_config_file(model, revision=revision) is None:
            return cls(model, revision=revision)
        with refusals(model):
            base = PeftConfig.from_pretrained(model, revision=revision).base_model_name_or_path
        if not base:
            raise UsageError(f"{model}: its adapter_config.json names no base model")
        if Path(base).is_absolute() and not Path(base).exists():
            raise UsageError(
                f"{model}: its base model {base} is not there",
                "correct base_model_name_or_path in adapter_config.json",
            )
        if find_adapter_config_file(base) is not None:
            raise UsageError(f"{model}: its base model {base} is an adapter too", "merge that one first: sgpo merge")
        return cls(base, model, revision)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number format of the full model's checkpoint."""
        with refusals(self.base):
            config = AutoConfig.from_pretrained(self.base, revision=self._base_revision, trust_remote_code=False)
        return config.dtype or torch.float32

    @property
    def _base_revision(self) -> str:
        return self.revision if self.adapter is None else "main"

    def load(
        self, dtype: torch.dtype, quantization: BitsAndBytesConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """The full model, without the adapter; only safetensors, no code from a repository."""
        return AutoModelForCausalLM.from_pretrained(
            self.base,
            **{"revision": self._base_revision, "use_safetensors": True, "trust_remote_code": False, **kwargs},
            dtype=dtype,
            quantization_config=quantization,
        )

    def load_adapted(self, model: PreTrainedModel, *, trainable: bool) -> PeftModel:
        return PeftModel.from_pretrained(model, str(self.adapter), revision=self.revision, is_trainable=trainable)

    def load_merged(self, dtype: torch.dtype, **kwargs: Any) -> PreTrainedModel:
        """The full model with the adapter merged into its weights, computed in fp32.

        Source: LoRA, arXiv 2106.09685, section 4.1 (W = W0 + BA).
        """
        model = self.load(torch.float32, **kwargs)
        merged: PreTrainedModel = self.load_adapted(model, trainable=False).merge_and_unload()
        merged.requires_grad_(True)  # below an adapter it was frozen
        return merged.to(dtype)  # type: ignore[arg-type, no-any-return]  # wrapped without its signature

    def load_reference(self, method: "Method", **kwargs: Any) -> PreTrainedModel:
        """The model as the frozen reference of another that is trained with `method`, in the same number format."""
        if self.adapter is None:
            return self.load(method.dtype, method.quantization, **kwargs)
        return self.load_merged(method.dtype, **kwargs)

    def refuse_as_reference(self, method: "Method", vocabulary: dict[str, int]) -> None:
        """Whether it can be the reference of a model with this vocabulary; nothing is loaded but its tokenizer.

        Raises:
            UsageError: it has other tokens, or it is an adapter beside a model in four or eight bits.
        """
        name = self.adapter or self.base
        if self.adapter is not None and method.quantization is not None:
            raise UsageError(
                f"--ref-model {name}: an adapter cannot be merged into a quantised model",
                "merge it first: sgpo merge",
            )
        if load_tokenizer(name).get_vocab() != vocabulary:
            raise UsageError(
                f"--ref-model {name}: its tokenizer has other tokens than the model that is trained",
                "the reference has to come from the same base model",
            )


@dataclass(frozen=True)
class Method:
    """How weights are trained: "full", "lora" or "qlora"."""

    name: str
    dtype: torch.dtype
    quantization: BitsAndBytesConfig | None = None
    adapter: PeftConfig | None = None

    @classmethod
    def of(cls, model_args: ModelConfig, start: StartModel, *, bf16: bool, chosen_dtype: bool) -> "Method":
        """The method that the options ask for.

        Full fine-tuning keeps fp32 master weights, since an update of a small learning rate is lost in bf16.
        Frozen weights stay in the format of their checkpoint, and quantised ones compute in bf16.

        Args:
            bf16: whether training computes in bf16.
            chosen_dtype: whether `model_args.dtype` was given by the user.
        """
        quantised = model_args.load_in_4bit or model_args.load_in_8bit
        name = "qlora" if quantised else "lora" if model_args.use_peft else "full"
        if chosen_dtype and model_args.dtype not in ("auto", None):
            dtype = getattr(torch, str(model_args.dtype))
        elif name == "full":
            dtype = torch.float32
        else:
            dtype = torch.bfloat16 if quantised and bf16 else start.dtype
        if name == "full" and dtype in HALF:
            logger.warning("--dtype %s: small updates are lost in weights of that precision", model_args.dtype)
        if name == "full":
            return cls(name, dtype)
        model_args.use_peft, model_args.dtype = True, str(dtype).removeprefix("torch.")
        if model_args.lora_target_modules is None:
            # PEFT's own default is two projections of attention.
            model_args.lora_target_modules = "all-linear"  # type: ignore[assignment]  # what TRL's command line gives
        return cls(name, dtype, get_quantization_config(model_args), get_peft_config(model_args))

    def refuse_other_shape(self, start: StartModel, given: dict[str, Any]) -> None:
        """An adapter goes on being trained in the shape that it has.

        Raises:
            UsageError: an option asks for another rank, or the like.
        """
        if start.adapter is None or self.adapter is None:
            return
        has = PeftConfig.from_pretrained(start.adapter, revision=start.revision)
        for option in FIXED:
            attribute = option.removeprefix("lora_")
            old = getattr(has, option if hasattr(has, option) else attribute, None)
            if option in given and given[option] != old:
                raise UsageError(
                    f"--{option.replace('_', '-')} {given[option]}: the adapter {start.adapter} has {old}",
                    "leave the option out, or start from the merged model: sgpo merge",
                )
