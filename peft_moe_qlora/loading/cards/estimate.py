"""The memory that training a model takes on one GPU, part by part.

Checked against peaks measured on an H200 (`benchmarks/results`, `tests/test_card.py`; differences in docs/cards.md).
Letters: T tokens of a step, K experts for a token, H hidden size, 2I features of gate and up projection.
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
"""Of the grouped products, where matrices are decoded before they are multiplied (`ops/kernels/grouped_gemm.py`)."""
LIBRARIES = 2**26
"""For cuBLAS, on each stream that runs something, and tables."""
FRAGMENTATION = 0.01
"""Of the memory that torch has taken from the GPU, what is free but not where it is needed."""
OUTSIDE_OF_TORCH = 3 * 2**29
"""For the CUDA context, kernels and graphs, 0.85 GiB on an H200, and a display."""


@dataclass(frozen=True)
class OptimizerSize:
    """What an optimizer keeps for factors in fp32.

    Args:
        title: of it.
        state: shape of a factor -> bytes of its state on the GPU.
    """

    title: str
    state: Callable[[tuple[int, ...]], int]


def _in_8_bits(moments: int) -> Callable[[tuple[int, ...]], int]:
    """bitsandbytes: an fp32 scale for 256 values; tensors of fewer than 4,096 values stay in fp32."""

    def state(shape: tuple[int, ...]) -> int:
        size = prod(shape)
        return moments * (4 * size if size < 4096 else size + 4 * -(-size // 256))

    return state


def _of_rows_and_columns(shape: tuple[int, ...]) -> int:
    *stacked, rows, columns = shape
    return 4 * prod(stacked) * (rows + columns)


OPTIMIZERS = {
    "adamw_torch_fused": OptimizerSize("AdamW", lambda shape: 8 * prod(shape)),
    "adamw_8bit": OptimizerSize("AdamW in 8 bits", _in_8_bits(moments=2)),
    "paged_adamw_8bit": OptimizerSize("AdamW in 8 bits, its state in the CPU's memory", lambda shape: 0),
    "lion_8bit": OptimizerSize("Lion in 8 bits", _in_8_bits(moments=1)),
    "adafactor": OptimizerSize("Adafactor", _of_rows_and_columns),
}
"""`optim` of `TrainingArguments` -> what it keeps; docs/optimizers.md has more of them."""


@dataclass(frozen=True)
class Settings:
    """Settings of a training run.

    Args:
        storage: of the experts; None for what the checkpoint has, or 16 bits.
        rank: on linear layers.
        expert_rank: on experts.
        tokens: in a sequence.
        batch: sequences in a step.
        keep_experts: with `use_gradient_checkpointing="keep-experts"`, else True.
        optimizer: of `OPTIMIZERS`.
        linear_in_4_bits: linear layers are loaded in NF4, else as they are.
        logits: the loss is computed from all logits, without Liger or TRL's own head.
        cuda_graphs: with `cuda_graphs=True`.
        accumulates: gradients stay from one backward to the next (`gradient_accumulation_steps` above 1).
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
        experts: their codes and scales.
        linear_layers: those that are loaded in 4 bits, or would be.
        other_weights: embeddings, head, norms, routers and all else, in 16 bits.
        factors: of LoRA, in fp32.
        gradients: of the factors, in fp32.
        optimizer: its state.
        layer_inputs: of all decoder layers, in 16 bits, from which the backward recomputes the rest.
        kept_experts: what the experts' backward needs, where it isn't recomputed.
        head: the loss, and what it saves for the backward.
        one_layer: of the layer being recomputed: its activations, their gradients, and workspace.
        graph_buffers: what CUDA graphs read and write.
        before_capture: an allowance for memory cached by the steps before the capture, which graphs can't use; most of
            it is freed before a capture.
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
    before_capture: int
    libraries: int
    fragmentation: int
    outside_of_torch: int

    @property
    def total(self) -> int:
        """Memory that the GPU must have."""
        return sum(asdict(self).values())

    @property
    def reserved(self) -> int:
        """Memory that torch reserves (`torch.cuda.max_memory_reserved`)."""
        return self.total - self.outside_of_torch

    @property
    def peak_allocated(self) -> int:
        """Memory of tensors (`torch.cuda.max_memory_allocated`); the graphs' pool counts as free between replays."""
        taken = self.reserved - self.fragmentation - self.before_capture
        return taken - (self.one_layer if self.graph_buffers else 0)

    @property
    def resident(self) -> int:
        """Weights and factors."""
        return self.experts + self.linear_layers + self.other_weights + self.factors

    def table(self) -> str:
        """The parts that are not 0, and their sum."""
        parts = {name.replace("_", " "): size for name, size in asdict(self).items() if size}
        rows = [(name, f"{size / GIB:.2f}") for name, size in {**parts, "total": self.total}.items()]
        return tabulate(rows, ("", "GiB"), disable_numparse=True, colalign=("left", "right"))


def estimate(sizes: ModelSizes, settings: Settings) -> MemoryEstimate:
    """Estimates the memory of training.

    The backward frees the input of a layer once it has the gradients of its factors, so the peak is at its beginning
    (the head or the last layer) or at its end (the first layer). Captured layers keep their activations in the graphs'
    pool permanently. Graphs can't use memory cached by the steps before the capture: that of the first step, where
    neither the optimizer's state nor later steps reuse it, and that of a layer on the graphs' own stream.

    Raises:
        ValueError: the experts can't be stored in this format.
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
    before_capture = 0
    if settings.cuda_graphs:
        held = {"one_layer": of_layer, "kept_experts": kept}
        before = max(sum(moment.values()) for moment in moments)
        moments = [moment | held for moment in moments]
        outside = max(sum(moment.values()) for moment in moments) - of_layer - kept
        before_capture = of_layer + max(0, before - outside - optimizer)
    moment = max(moments, key=lambda parts: sum(parts.values()))
    parts = {
        "experts": sizes.experts_nbytes(storage),
        "linear_layers": sizes.linear_nbytes(settings.linear_in_4_bits, double_quant),
        "other_weights": sizes.other_nbytes,
        "factors": values,
        "optimizer": optimizer,
        "graph_buffers": graph_buffers(sizes, settings),
        "before_capture": before_capture,
        "libraries": LIBRARIES * (3 if settings.cuda_graphs else 1),
        **{name: moment.get(name, 0) for name in ("gradients", "layer_inputs", "kept_experts", "head", "one_layer")},
    }
    return MemoryEstimate(
        **parts, fragmentation=int(FRAGMENTATION * sum(parts.values())), outside_of_torch=OUTSIDE_OF_TORCH
    )


def kept_experts(sizes: ModelSizes, settings: Settings) -> int:
    """Of all experts modules, see `kept_nbytes`."""
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

    Of experts, `ops/fused_steps.py`: for each of the T K rows its gate's input, the gradient of that, and of the
    gate's output or of the input, whichever is larger; the gradient of the output and of the input for each of T
    tokens; a workspace. Of the rest of the layer, what stands before the experts: inputs and
    outputs of its linear layers in 16 bits, and 24 H bytes of norms and residuals, which are in fp32 in part. Where
    a model class has no SDPA, scores of attention four times in 16 bits, between product, softmax and back.
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
    """With logits, 12 bytes of each: its log-softmax in fp32, and two gradients of that.

    Without, the gradient of the last hidden states, and 6 bytes of each logit of a chunk, which Liger makes as long as
    `T H / V` rounded up to a power of two.
    """
    tokens = settings.step_tokens
    if settings.logits:
        return 12 * tokens * sizes.vocab_size
    rows = -(-tokens // -(-sizes.vocab_size // sizes.hidden_size))
    chunk = min(tokens, 1 << (rows - 1).bit_length())
    return DTYPE.itemsize * tokens * sizes.hidden_size + 6 * chunk * sizes.vocab_size


def graph_buffers(sizes: ModelSizes, settings: Settings) -> int:
    """Two for the gradients of a layer's factors, and three of the size of hidden states; all graphs share them."""
    if not settings.cuda_graphs:
        return 0
    of_layer = max(sum(4 * prod(shape) for shape in factors_of(one, settings.expert_rank)) for one in sizes.layouts)
    return 2 * of_layer + 3 * DTYPE.itemsize * settings.step_tokens * sizes.hidden_size
