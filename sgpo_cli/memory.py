"""How much memory and time a training will take, from the model's config and the data; nothing is loaded.

Weights, gradients and Adam's two moments are counted exactly. Activations are counted tensor by tensor, as
transformers' decoders of Llama's kind (RMSNorm, rotary positions, SwiGLU, sdpa), PEFT's LoRA and TRL's output head
make them in bf16; `benchmarks/memory_estimate.json` has small trainings as measured, within 2 %. Sources: ZeRO,
arXiv 1910.02054, section 3 (16 bytes per parameter with fp32 weights); QLoRA, arXiv 2305.14314, section 3 (4 bits and
one fp32 constant per 64 weights); Korthikanti et al., arXiv 2205.05198, section 4 (what a layer keeps; dropout's mask
has one byte).
"""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sgpo_cli.loading import refusals

GIB = 2**30
NF4_BYTES = 0.5 + 4 / 64
RUNTIME = 0.8 * GIB  # CUDA context and kernels (about 0.5 GiB), cuBLAS's workspaces; not measured
SPARE = 1.05  # fragmentation
TILE_TOKENS, TILE_VOCABULARY = 4096, 32_768  # of TRL's logits that exist at a time (kernels/chunked_logprob.py)


@dataclass(frozen=True)
class Shape:
    """A model's size: parameters in all and in linear layers, widths and depth."""

    parameters: int
    linear: int
    """Parameters of the linear layers below the output head: what is quantised, and what LoRA is put on."""
    linear_widths: int
    """Inputs plus outputs of those layers, added up: LoRA of rank 1 has so many parameters."""
    head: int
    """Parameters of the output head."""
    tied: bool
    """The head's weights are the embeddings."""
    layers: int
    hidden: int
    intermediate: int
    queries: int
    """Width of all heads' queries together."""
    keys: int
    """Width of the keys, fewer with grouped queries, and of the values."""
    head_norms: bool
    """Queries and keys are normalised, as in Qwen3."""

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
        embeddings = model.get_input_embeddings()
        head = model.get_output_embeddings() or embeddings
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
        text = config.get_text_config()
        heads = getattr(text, "num_attention_heads", None) or 1
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        return cls(
            parameters=sum(weights.numel() for weights in model.parameters()),
            linear=sum(module.weight.numel() for module in linear),
            linear_widths=sum(module.in_features + module.out_features for module in linear),
            head=head.weight.numel(),
            tied=head.weight is embeddings.weight,
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            queries=heads * width,
            keys=(getattr(text, "num_key_value_heads", None) or heads) * width,
            head_norms=any(name.endswith("q_norm") for name, _ in model.named_modules()),
        )


@dataclass(frozen=True)
class Load:
    """What a training puts on a device.

    `sequences` are those of one batch: two per pair in DPO. `reference`: a frozen copy of the model is kept.
    `half_weights`: frozen weights are in bf16. `dropout`: before an adapter; TRL's DPO takes it out.
    """

    sequences: int
    tokens: int
    checkpointing: bool
    reference: bool
    half_weights: bool
    rank: int = 16
    dropout: bool = True


def state_bytes(shape: Shape, method: str, load: Load) -> float:
    """Weights, gradients and optimizer of one replica, in bytes; all at once, as where gradients are accumulated.

    Args:
        method: "full", "lora" or "qlora".
    """
    lora = load.rank * shape.linear_widths
    if method == "full":
        return 16 * shape.parameters + (4 * shape.parameters if load.reference else 0)
    frozen_copy = 4 * lora if load.reference else 0
    if method == "lora":
        return (2 if load.half_weights else 4) * shape.parameters + 16 * lora + frozen_copy
    other = shape.parameters - shape.linear
    return NF4_BYTES * shape.linear + 2 * other + 8 * lora + frozen_copy  # TRL keeps such an adapter in bf16


def layer_bytes(shape: Shape, method: str, load: Load) -> float:
    """What a layer keeps of one token for its backward pass, in bytes.

    Each norm its input in fp32, in full training also normalised. Attention queries, keys, values and result in bf16;
    if sequences are padded, sdpa wants keys and values as wide as the queries, and a mask as long as the sequence.
    Norms of queries and keys keep those in fp32, in full training also normalised in bf16. The MLP both projections
    and the activation in bf16. Then the inputs of the linear layers (`_input_bytes`).
    """
    norm, head_norm = (16, 6) if method == "full" else (8, 4)
    keys, mask = (shape.queries, 2 * load.tokens) if load.sequences > 1 else (shape.keys, 0)
    attention = 4 * shape.queries + 4 * keys + mask
    if shape.head_norms:
        attention += head_norm * (shape.queries + shape.keys)
    hidden, queries, intermediate = _input_bytes(method, load)
    attention += queries * shape.queries
    return attention + (norm + hidden) * shape.hidden + (6 + intermediate) * shape.intermediate


def _input_bytes(method: str, load: Load) -> tuple[int, int, int]:
    """What a layer's linear layers keep of their inputs, per width of hidden state, attention and MLP.

    In bf16, as autocast makes it anew for each: five take a norm's result, one the attention's, which is there in
    bf16 already, one the MLP's product. An adapter keeps what dropout left of the three, and a mask of one byte; the
    frozen layer beside it nothing. Without dropout the bf16 adapters of QLoRA share what is there.
    """
    if method == "full":
        return 10, 0, 2
    if load.dropout:
        return 15, 3, 3
    return (10, 2, 2) if method == "lora" else (4, 0, 2)


def activation_bytes(shape: Shape, method: str, load: Load, *, sharded: bool = False) -> float:
    """What forward and backward pass need beside the states at their fullest moment, in bytes.

    All layers keep their tensors, or with checkpointing their inputs. To that comes what is largest: the output head,
    or the last layer at work. That one makes its tensors again with checkpointing, and has further ones for a moment:
    gradients in full training, the input of the MLP's last adapter in fp32 before and after dropout (QLoRA: in bf16).

    Args:
        sharded: the weights are gathered in bf16; alone, autocast casts them.
    """
    tokens = load.sequences * load.tokens
    copies = 0.0 if sharded else _cast_bytes(shape, method, load)
    forwards, backwards = _head_bytes(shape, method, load)
    hidden, intermediate = {"full": (4, 4), "lora": (10, 10 if load.dropout else 6), "qlora": (10, 2)}[method]
    last = tokens * (hidden * shape.hidden + intermediate * shape.intermediate)
    if method == "full" and shape.tied:
        last += 4 * shape.head  # its gradient waits for that of the embeddings
    layer = tokens * layer_bytes(shape, method, load)
    if not load.checkpointing:
        return layer * shape.layers + copies + max(backwards, last)
    inputs = tokens * _number_bytes(method, load) * shape.hidden * shape.layers
    if method == "full":
        forwards += copies  # of trained weights autocast keeps them to the end
    return inputs + max(forwards, backwards, copies / shape.layers + layer + last)


def _number_bytes(method: str, load: Load) -> int:
    """Of a hidden state between layers: additions are not autocast, so it has the format of the weights."""
    return 2 if method == "qlora" or (method == "lora" and load.half_weights) else 4


def _cast_bytes(shape: Shape, method: str, load: Load) -> float:
    """Weights in fp32 that autocast has cast to bf16 for a layer's forward and backward pass, in all layers."""
    adapter = 2 * load.rank * shape.linear_widths if method == "lora" else 0
    return adapter + (2 * shape.linear if _number_bytes(method, load) == 4 else 0)


def _head_bytes(shape: Shape, method: str, load: Load) -> tuple[float, float]:
    """The output head in the forward and in the backward pass.

    The last norm keeps its input in fp32 (and that normalised, in full training), TRL a copy of the result. One tile
    of the logits exists at a time, and for it a piece of fp32 weights in bf16. The backward pass adds the gradient of
    the hidden state in fp32, and in full training that of the weights, beside the one that is accumulated.
    """
    tokens, number = load.sequences * load.tokens, _number_bytes(method, load)
    rows = min(tokens, TILE_TOKENS)
    tile = 2 * rows * TILE_VOCABULARY + (2 * (rows + TILE_VOCABULARY) * shape.hidden if number == 4 else 0)
    forwards = tile + tokens * shape.hidden * (12 if method == "full" else 4 + 2 * number)
    return forwards, forwards + 4 * tokens * shape.hidden + (4 * shape.head if method == "full" else 0)


def total_bytes(shape: Shape, method: str, load: Load, shards: int = 1) -> float:
    """Peak memory of one device.

    Args:
        shards: devices that the weights are spread over; each gathers, in bf16, embeddings and head, the layer at
            work and the next one.
    """
    used = state_bytes(shape, method, load) / shards + activation_bytes(shape, method, load, sharded=shards > 1)
    if shards > 1:
        used += 2 * (shape.parameters - shape.linear) + 4 * shape.linear / shape.layers
    return SPARE * used + RUNTIME


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
