"""Estimates the memory for training a model on one GPU, part by part.

Checked against peaks measured on an H200 (`benchmarks/results`, `tests/test_card.py`; differences in docs/cards.md).
Letters: T tokens per step, K experts per token, H hidden size, 2I features of gate and up projection, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod

from tabulate import tabulate

from ...ops import kept_nbytes
from ...quantization import Format, FourBitFormat
from .sizes import DTYPE, ModelSizes, factors_of

GIB = 2**30
MOST_WORKSPACE = 256 * 2**20
"""Workspace of grouped products that dequantize matrices first (`ops/kernels/grouped_gemm.py`), or of the gate's
backward in one pass (`ops/kernels/gate_low_rank.py`); they are not alive together."""
LIBRARIES = 2**26
"""Workspace of cuBLAS, per stream, and tables."""
FRAGMENTATION = 0.01
"""Share of the memory reserved by torch that is free but unusable because of fragmentation."""
OUTSIDE_OF_TORCH = 3 * 2**29
"""The CUDA context, kernels and graphs (0.85 GiB on an H200), and a display."""


@dataclass(frozen=True)
class OptimizerSize:
    """Size of an optimizer's state for factors in fp32.

    Args:
        title: name of the optimizer, for tables.
        state: shape of a factor -> bytes of its state on the GPU.
    """

    title: str
    state: Callable[[tuple[int, ...]], int]


def _in_8_bits(moments: int) -> Callable[[tuple[int, ...]], int]:
    """State in 8 bits of bitsandbytes: one fp32 scale per 256 values; tensors below 4,096 values stay in fp32."""

    def state(shape: tuple[int, ...]) -> int:
        size = prod(shape)
        return moments * (4 * size if size < 4096 else size + 4 * -(-size // 256))

    return state


def _of_rows_and_columns(shape: tuple[int, ...]) -> int:
    *stacked, rows, columns = shape
    return 4 * prod(stacked) * (rows + columns)


OPTIMIZERS = {
    "adamw_torch_fused": OptimizerSize("AdamW", lambda shape: 8 * prod(shape)),
    "adamw_8bit": OptimizerSize("8-bit AdamW", _in_8_bits(moments=2)),
    "paged_adamw_8bit": OptimizerSize("8-bit AdamW with its state in CPU memory", lambda shape: 0),
    "lion_8bit": OptimizerSize("8-bit Lion", _in_8_bits(moments=1)),
    "adafactor": OptimizerSize("Adafactor", _of_rows_and_columns),
}
"""`optim` of `TrainingArguments` -> size of its state. docs/optimizers.md lists more optimizers."""


@dataclass(frozen=True)
class Settings:
    """Settings of a training run.

    Args:
        storage: storage format of the experts; None for that of the checkpoint, or 16 bits.
        rank: rank on linear layers.
        expert_rank: rank on experts.
        tokens: number of tokens per sequence.
        batch: number of sequences per step.
        keep_experts: whether `use_gradient_checkpointing` is `"keep-experts"` rather than True.
        optimizer: a key of `OPTIMIZERS`.
        linear_in_4_bits: whether linear layers are loaded in NF4 rather than as stored.
        logits: whether the loss materializes all logits, unlike the fused losses of Liger and TRL.
        cuda_graphs: whether training uses `cuda_graphs=True`.
        accumulates: whether gradients persist between backward passes (`gradient_accumulation_steps` above 1).
    """

    storage: Format | None
    rank: int = 16
    expert_rank: int = 16
    tokens: int = 2048
    batch: int = 1
    keep_experts: bool = False
    optimizer: str = "adamw_torch_fused"
    linear_in_4_bits: bool = True
    logits: bool = False
    cuda_graphs: bool = False
    accumulates: bool = False

    @property
    def step_tokens(self) -> int:
        return self.batch * self.tokens


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of training in bytes, by purpose.

    Args:
        experts: codes and scales of the experts.
        linear_layers: linear layers that `linear_in_4_bits` stores in 4 bits, in either setting.
        other_weights: embeddings, head, norms, routers and all other weights, in 16 bits.
        factors: LoRA factors, in fp32.
        gradients: gradients of the factors, in fp32.
        optimizer: state of the optimizer.
        layer_inputs: inputs of all decoder layers, in 16 bits, from which the backward recomputes activations.
        kept_experts: activations of the experts that are kept for the backward.
        head: the loss, and tensors that it saves for the backward.
        one_layer: activations of the layer that is recomputed, their gradients, and workspace.
        graph_buffers: inputs and outputs of CUDA graphs.
        unused_cache: memory cached by torch that graphs can't use; as measured, that of a layer with kept experts or
            all logits, otherwise none.
        libraries: see `LIBRARIES`.
        fragmentation: see `FRAGMENTATION`.
        outside_of_torch: see `OUTSIDE_OF_TORCH`.
    """

    experts: int
    linear_layers: int
    other_weights: int
    factors: int
    gradients: int
    optimizer: int
    layer_inputs: int
    kept_experts: int
    head: int
    one_layer: int
    graph_buffers: int
    unused_cache: int
    libraries: int
    fragmentation: int
    outside_of_torch: int

    @property
    def total(self) -> int:
        """Required GPU memory."""
        return sum(asdict(self).values())

    @property
    def reserved(self) -> int:
        """Memory that torch reserves (`torch.cuda.max_memory_reserved`)."""
        return self.total - self.outside_of_torch

    @property
    def peak_allocated(self) -> int:
        """Peak memory of tensors (`torch.cuda.max_memory_allocated`); the pool of graphs is free between replays."""
        taken = self.reserved - self.fragmentation - self.unused_cache
        return taken - (self.one_layer if self.graph_buffers else 0)

    @property
    def resident(self) -> int:
        """Weights and factors."""
        return self.experts + self.linear_layers + self.other_weights + self.factors

    def table(self) -> str:
        """A table of the parts that are not 0, and their sum."""
        parts = {name.replace("_", " "): size for name, size in asdict(self).items() if size}
        rows = [(name, f"{size / GIB:.2f}") for name, size in {**parts, "total": self.total}.items()]
        return tabulate(rows, ("", "GiB"), disable_numparse=True, colalign=("left", "right"))


def estimate(sizes: ModelSizes, settings: Settings) -> MemoryEstimate:
    """Estimates the memory of training.

    The backward frees the input of a layer after the gradients of its factors are computed, so the peak is at its
    beginning (the head or the last layer) or at its end (the first layer). Captured layers keep their activations
    permanently in the pool of the graphs.

    Raises:
        ValueError: the storage format does not support the shape of the experts.
    """
    storage, shapes = settings.storage, sizes.factor_shapes(settings.rank, settings.expert_rank)
    double_quant = isinstance(storage, FourBitFormat) and storage.double_quant
    values = 4 * sum(count * prod(shape) for shape, count in shapes.items())
    state = OPTIMIZERS[settings.optimizer].state
    optimizer = sum(count * state(shape) for shape, count in shapes.items())
    kept, of_layer = kept_experts(sizes, settings), one_layer(sizes, settings)
    of_head = head(sizes, settings)
    inputs = DTYPE.itemsize * settings.step_tokens * sizes.hidden_size * sizes.num_layers
    # the logits are freed before the last layer is recomputed
    at_head = {"layer_inputs": inputs, "head": of_head}
    at_last = {"layer_inputs": inputs, "one_layer": of_layer}
    at_first = {"gradients": values, "one_layer": of_layer}
    left = {"gradients": values if settings.accumulates else 0, "kept_experts": kept}
    moments = [left | at_head, left | at_last, at_first]
    if settings.cuda_graphs:
        moments = [moment | {"one_layer": of_layer, "kept_experts": kept} for moment in moments]
    moment = max(moments, key=lambda parts: sum(parts.values()))
    parts = {
        "experts": sizes.experts_nbytes(storage),
        "linear_layers": sizes.linear_nbytes(settings.linear_in_4_bits, double_quant),
        "other_weights": sizes.other_nbytes,
        "factors": values,
        "optimizer": optimizer,
        "graph_buffers": graph_buffers(sizes, settings),
        "unused_cache": of_layer if settings.cuda_graphs and (settings.keep_experts or settings.logits) else 0,
        "libraries": LIBRARIES * (3 if settings.cuda_graphs else 1),
        **{name: moment.get(name, 0) for name in ("gradients", "layer_inputs", "kept_experts", "head", "one_layer")},
    }
    return MemoryEstimate(
        **parts, fragmentation=int(FRAGMENTATION * sum(parts.values())), outside_of_torch=OUTSIDE_OF_TORCH
    )


def kept_experts(sizes: ModelSizes, settings: Settings) -> int:
    """Memory kept for the backward of all experts modules; see `kept_nbytes`."""
    if not settings.keep_experts:
        return 0
    kept = 0
    for layout, count in sizes.layouts.items():
        hidden, up_features = layout.features(layout.up_name)
        tokens = settings.step_tokens
        kept += count * kept_nbytes(tokens, sizes.top_k, hidden, up_features, settings.expert_rank)
    return kept


def one_layer(sizes: ModelSizes, settings: Settings) -> int:
    """Peak of a layer's backward, which is in its experts.

    For the experts (`ops/fused_steps.py`): for each of T K rows, the input of the gate, its gradient, and the larger
    of the gradients of the gate's output and of the input; for each of T tokens, the gradients of output and input;
    and a workspace. For the rest of the layer, whose activations precede the experts: inputs and outputs of its linear
    layers in 16 bits, and 24 H bytes per token for norms and residuals, partly in fp32. For a model class without
    SDPA, four copies of the attention scores in 16 bits, for product, softmax and backward.
    """
    tokens = settings.step_tokens
    experts = 0
    for layout in sizes.layouts:
        hidden, up_features = layout.features(layout.up_name)
        gated = layout.intermediate_size
        row = 2 * up_features + max(gated, hidden)
        of_layout = DTYPE.itemsize * tokens * (sizes.top_k * row + 2 * hidden)
        experts = max(experts, of_layout)
    rest = tokens * (DTYPE.itemsize * sizes.layer_features + 24 * sizes.hidden_size)
    scores = 4 * DTYPE.itemsize * settings.batch * sizes.eager_heads * settings.tokens**2
    return experts + MOST_WORKSPACE + rest + scores


def head(sizes: ModelSizes, settings: Settings) -> int:
    """Peak memory of the head and the loss.

    With `logits`, 12 bytes per logit: the log-softmax in fp32, and two gradients. Otherwise the gradient of the last
    hidden states, and 6 bytes per logit of a chunk; Liger uses chunks of `T H / V` tokens, rounded up to a power of
    two.
    """
    tokens = settings.step_tokens
    if settings.logits:
        return 12 * tokens * sizes.vocab_size
    rows = -(-tokens // -(-sizes.vocab_size // sizes.hidden_size))
    chunk = min(tokens, 1 << (rows - 1).bit_length())
    return DTYPE.itemsize * tokens * sizes.hidden_size + 6 * chunk * sizes.vocab_size


def graph_buffers(sizes: ModelSizes, settings: Settings) -> int:
    """Buffers shared by all graphs: two for the gradients of a layer's factors, and three for hidden states."""
    if not settings.cuda_graphs:
        return 0
    of_layer = max(sum(4 * prod(shape) for shape in factors_of(one, settings.expert_rank)) for one in sizes.layouts)
    return 2 * of_layer + 3 * DTYPE.itemsize * settings.step_tokens * sizes.hidden_size
