"""How much memory and time a training will take, from the model's config and the data; nothing is loaded.

Weights, gradients and Adam's two moments are counted exactly, activations by a formula for decoders without
attention matrices in memory (sdpa, flash attention). Sources: ZeRO, arXiv 1910.02054, section 3 (16 bytes per
parameter with fp32 weights); QLoRA, arXiv 2305.14314, section 3 (4 bits and one fp32 constant per 64 weights);
Korthikanti et al., arXiv 2205.05198, section 4 (activations per layer).
"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sgpo_cli.loading import refusals

GIB = 2**30
NF4_BYTES = 0.5 + 4 / 64
RUNTIME = 1.2 * GIB  # CUDA context, kernels and the tiles of the output head
SPARE = 1.05  # fragmentation


@dataclass(frozen=True)
class Shape:
    """A model's size: parameters in all and in linear layers, widths and depth."""

    parameters: int
    linear: int
    """Parameters of the linear layers below the output head: what is quantised, and what LoRA is put on."""
    linear_widths: int
    """Inputs plus outputs of those layers, added up: LoRA of rank 1 has so many parameters."""
    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def of(cls, model: str, revision: str = "main") -> "Shape":
        """Of a directory or Hub name, from its config.json.

        Raises:
            UsageError: it has none, or of an unknown architecture.
        """
        with refusals(model):
            return cls.from_config(AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False))

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "Shape":
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
        text = config.get_text_config()
        return cls(
            parameters=sum(weights.numel() for weights in model.parameters()),
            linear=sum(module.weight.numel() for module in linear),
            linear_widths=sum(module.in_features + module.out_features for module in linear),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        )


@dataclass(frozen=True)
class Load:
    """What a training puts on a device.

    `sequences` are those of one batch: two per pair in DPO. `reference`: a frozen copy of the model is kept.
    """

    sequences: int
    tokens: int
    checkpointing: bool
    reference: bool
    half_weights: bool
    rank: int = 16


def state_bytes(shape: Shape, method: str, load: Load) -> float:
    """Weights, gradients and optimizer of one replica, in bytes.

    Args:
        method: "full", "lora" or "qlora".
    """
    lora = load.rank * shape.linear_widths
    if method == "full":
        # fp32 weights, gradients, two moments; bf16 copies that autocast keeps for the backward pass.
        return 16 * shape.parameters + 2 * shape.linear + (4 * shape.parameters if load.reference else 0)
    frozen_copy = 4 * lora if load.reference else 0
    if method == "lora":
        return (2 if load.half_weights else 4) * shape.parameters + 16 * lora + frozen_copy
    other = shape.parameters - shape.linear
    return NF4_BYTES * shape.linear + 2 * other + 8 * lora + frozen_copy  # TRL keeps such an adapter in bf16


def activation_bytes(shape: Shape, load: Load) -> float:
    """What the forward pass keeps for the backward pass, in bytes, in bf16.

    Per token and layer about ten vectors of the hidden width and four of the intermediate one; with checkpointing
    only the layer's input, and one whole layer while it is computed again.
    """
    tokens = load.sequences * load.tokens
    layer = 2 * (10 * shape.hidden + 4 * shape.intermediate)
    kept = 2 * shape.hidden * shape.layers + layer if load.checkpointing else layer * shape.layers
    return tokens * kept


def total_bytes(shape: Shape, method: str, load: Load, shards: int = 1) -> float:
    """Peak memory of one device.

    Args:
        shards: devices that the weights are spread over; each gathers a layer at a time.
    """
    state = state_bytes(shape, method, load) / shards
    gathered = 4 * shape.linear / shape.layers if shards > 1 else 0
    return SPARE * (state + gathered + activation_bytes(shape, load)) + RUNTIME


def training_flops(shape: Shape, method: str, load: Load, tokens: float, epochs: float, *, once: bool) -> float:
    """Floating-point operations of a training.

    Two per parameter and token forwards, four backwards, or two if the weights are frozen (Kaplan et al., arXiv
    2001.08361, section 2.1), again two if activations are computed again, and two for a reference.

    Args:
        tokens: of one epoch, both answers of a pair counted.
        once: the reference is computed in one epoch only.
    """
    per_token = (2 + (4 if method == "full" else 2) + (2 if load.checkpointing else 0)) * shape.parameters
    reference = 2 * shape.parameters * (1 if once else epochs) if load.sequences % 2 == 0 and load.reference else 0
    return tokens * (per_token * epochs + reference)
