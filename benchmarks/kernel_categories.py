"""Categories of GPU kernels by name, which is all that is known of kernels launched by a CUDA graph."""

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
"""Categories in the order of the table and the plot."""

# the first match is used
_PATTERNS = (
    # names of inductor's kernels contain all fused operations; templates are flex attention or products
    (ELEMENTWISE, r"^triton_(poi|red|per|for)_"),
    (LINEAR, r"^triton_tem_.*mm"),
    (ATTENTION, r"^triton_tem_"),
    # kernels of this package, and PyTorch's grouped products, which have GroupProblemShape in their name
    (
        PRODUCTS,
        r"^_grouped_gemm_kernel|^specialized_gemm_kernel|^_(gated|combined)_pairs_kernel|GroupProblemShape|grouped_(mm|gemm)",
    ),
    (REDUCTIONS, r"^_reduce_kernel|^_reduce_pairs_kernel"),
    (GRADIENTS, r"^_factor_gradient|^_sum_of_runs"),
    (DECODING, r"^_decode_|^_plain_scales|kDequantize|dequantize_4bit|kgemm_4bit"),
    (
        ROUTING,
        r"^_gate_(backward_|factors_)?kernel|^_sum_of_parts|^_combine_kernel|^_(count|scan|place|tiles|route_few)_kernel",
    ),
    (ROUTING, r"[Tt]op[Kk]|softmax_warp|[Ss]ort|bincount|[Hh]istogram|searchsorted|cumsum|kernel_scan_|DeviceScan"),
    (OPTIMIZER, r"kOptimizer|FusedAdam|fused_adam"),
    (HEAD, r"cross_entropy|nll_loss|LogSoftMax|log_softmax|^element_mul_kernel"),
    (ATTENTION, r"flash_|fmha|cudnn::fusion|sdpa|attention|[Ss]oft[Mm]ax"),
    # SIMT or TF32 products of fp32 operands
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
    """One kernel in a step: total milliseconds and number of launches."""

    milliseconds: float
    count: int


Kernels = Mapping[str, KernelTime]
"""Name -> time."""


def category(name: str) -> str:
    """Category of a kernel."""
    return next((category for category, pattern in _COMPILED if pattern.search(name)), OTHER)


def is_annotation(name: str) -> bool:
    """Whether an event is not a kernel but a range of kernels launched by a part of the program."""
    return _ANNOTATION.match(name) is not None


def without(kernels: Kernels, part: Kernels) -> dict[str, KernelTime]:
    """Subtracts the kernels of a part, measured separately, from those of a step; no result is negative.

    A kernel with the same number of launches in both belongs to the part completely, even if its times differ.
    """
    rest = {}
    for name, found in kernels.items():
        less = part.get(name, KernelTime(0.0, 0))
        count = found.count - less.count
        if count > 0:
            rest[name] = KernelTime(max(found.milliseconds - less.milliseconds, 0.0), count)
    return rest


def by_category(kernels: Kernels) -> dict[str, float]:
    """Category -> milliseconds, for categories that occur."""
    found = dict.fromkeys(CATEGORIES, 0.0)
    for name, time in kernels.items():
        found[category(name)] += time.milliseconds
    return {name: milliseconds for name, milliseconds in found.items() if milliseconds}


def unclassified(kernels: Kernels, number: int = 8) -> list[tuple[str, float, int]]:
    """The slowest kernels without a category: name, milliseconds, launches."""
    rows = [(name, time.milliseconds, time.count) for name, time in kernels.items() if category(name) == OTHER]
    return sorted(rows, key=lambda row: -row[1])[:number]


def total(kernels: Kernels) -> float:
    return sum(time.milliseconds for time in kernels.values())
