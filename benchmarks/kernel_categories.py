"""What a kernel on the GPU does, by its name: the only thing that is known of one that a CUDA graph launches."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

PRODUCTS = "products of experts"
REDUCTIONS = "reductions to the rank"
GRADIENTS = "gradients of factors"
DECODING = "decoding"
ROUTING = "routing, gate, combining"
ATTENTION = "attention"
LINEAR = "linear layers"
LINEAR_FP32 = "linear layers in fp32"
ELEMENTWISE = "norms, rotary, elementwise"
COPIES = "casts and copies"
HEAD = "head and loss"
OPTIMIZER = "optimizer"
OTHER = "other"

CATEGORIES = (
    PRODUCTS,
    REDUCTIONS,
    GRADIENTS,
    DECODING,
    ROUTING,
    ATTENTION,
    LINEAR,
    LINEAR_FP32,
    ELEMENTWISE,
    COPIES,
    HEAD,
    OPTIMIZER,
    OTHER,
)
"""In the order of the table and the picture."""

# the first that is found in a name counts
_PATTERNS = (
    # what inductor fuses has the names of all that it fuses; templates are flex attention or products
    (ELEMENTWISE, r"^triton_(poi|red|per|for)_"),
    (LINEAR, r"^triton_tem_.*mm"),
    (ATTENTION, r"^triton_tem_"),
    # this package's; PyTorch's grouped products, in which a problem's shape is a group's
    (PRODUCTS, r"^_grouped_gemm_kernel|^_(gated|combined)_pairs_kernel|GroupProblemShape|grouped_(mm|gemm)"),
    (REDUCTIONS, r"^_reduce_kernel|^_reduce_pairs_kernel"),
    (GRADIENTS, r"^_factor_gradient|^_sum_of_runs"),
    (DECODING, r"^_decode_|^_plain_scales|kDequantize|dequantize_4bit|kgemm_4bit"),
    (ROUTING, r"^_gate_(backward_)?kernel|^_combine_kernel|^_(count|scan|place|tiles|route_few)_kernel"),
    (ROUTING, r"[Tt]op[Kk]|softmax_warp|[Ss]ort|bincount|[Hh]istogram|searchsorted|cumsum|kernel_scan_|DeviceScan"),
    (OPTIMIZER, r"kOptimizer|FusedAdam|fused_adam"),
    (HEAD, r"cross_entropy|nll_loss|LogSoftMax|log_softmax|^element_mul_kernel"),
    (ATTENTION, r"flash_|fmha|cudnn::fusion|sdpa|attention|[Ss]oft[Mm]ax"),
    # SIMT or TF32 products of operands in fp32
    (LINEAR_FP32, r"gemm_f32f32|sgemm|tf32"),
    (LINEAR, r"nvjet|gemm|cutlass|xmma|gemv|splitKreduce|cublas"),
    (COPIES, r"Memcpy|Memset|memcpy|memset|copy_kernel|CatArray|FillFunctor"),
    (ELEMENTWISE, r"elementwise|reduce_kernel|rms_norm|layer_norm|_rope|rotary|embedding"),
    (ELEMENTWISE, r"index|gather|scatter|multi_tensor_apply|distribution|arange"),
)
_COMPILED = tuple((category, re.compile(pattern)) for category, pattern in _PATTERNS)

_ANNOTATION = re.compile(r"^(Optimizer\.|ProfilerStep|## )")


@dataclass(frozen=True)
class KernelTime:
    """One kernel in a step: milliseconds of all its launches, and their number."""

    milliseconds: float
    count: int


Kernels = Mapping[str, KernelTime]
"""Name -> time."""


def category(name: str) -> str:
    """Of one kernel."""
    return next((category for category, pattern in _COMPILED if pattern.search(name)), OTHER)


def is_annotation(name: str) -> bool:
    """Whether this is no kernel, but the span of those that a part of the program launched."""
    return _ANNOTATION.match(name) is not None


def without(kernels: Kernels, part: Kernels) -> dict[str, KernelTime]:
    """A step's kernels less those of a part of it that was measured alone; nothing gets negative.

    Where a kernel has as many launches in both, all its time is the part's, however the two runs scatter.
    """
    rest = {}
    for name, found in kernels.items():
        less = part.get(name, KernelTime(0.0, 0))
        count = found.count - less.count
        if count > 0:
            rest[name] = KernelTime(max(found.milliseconds - less.milliseconds, 0.0), count)
    return rest


def by_category(kernels: Kernels) -> dict[str, float]:
    """Category -> milliseconds, of those that there are any of."""
    found = dict.fromkeys(CATEGORIES, 0.0)
    for name, time in kernels.items():
        found[category(name)] += time.milliseconds
    return {name: milliseconds for name, milliseconds in found.items() if milliseconds}


def unclassified(kernels: Kernels, number: int = 8) -> list[tuple[str, float, int]]:
    """The largest of those without a category: name, milliseconds, launches."""
    rows = [(name, time.milliseconds, time.count) for name, time in kernels.items() if category(name) == OTHER]
    return sorted(rows, key=lambda row: -row[1])[:number]


def total(kernels: Kernels) -> float:
    return sum(time.milliseconds for time in kernels.values())
