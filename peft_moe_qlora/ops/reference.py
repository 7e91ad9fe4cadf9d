"""Reference implementation of the experts layer in torch.

All faster paths are tested against it, and the gate of an experts class is compared with it to find out whether the
kernels support the gate.

Dense weights, one product for each routed pair, no sorting, autograd throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import gelu, silu

from ..quantization import Stack
from .grouped_linear import LowRank
from .operands import Gate


def linear(
    x: torch.Tensor,
    expert_of_row: torch.Tensor,
    stack: Stack,
    bias: torch.Tensor | None = None,
    low_rank: Sequence[LowRank] = (),
) -> torch.Tensor:
    """Applies the linear layer of its expert to each row: `(S, in)`, `(S,)` -> `(S, out)`, in the dtype of `x`.

    Rows without an expert in the stack are zero. Dropout and token masks of `low_rank` are ignored.
    """
    matrices = stack.decode(x.dtype)
    matrices = matrices if stack.is_transposed else matrices.transpose(1, 2)
    for term in low_rank:
        matrices = matrices + term.scaling * (term.B.to(x.dtype) @ term.A.to(x.dtype)).transpose(1, 2)
    is_here = (expert_of_row >= 0) & (expert_of_row < stack.num_experts)
    expert = torch.where(is_here, expert_of_row, 0)
    out = torch.einsum("si,sio->so", x, matrices[expert])
    if bias is not None:
        out = out + bias.to(x.dtype)[expert]
    return out * is_here[:, None]


def gated(x: torch.Tensor, gate: Gate) -> torch.Tensor:
    """`(S, 2I)` -> `(S, I)`, in the dtype of `x`."""
    g, u = (x[..., ::2], x[..., 1::2]) if gate.interleaved else x.chunk(2, dim=-1)
    if gate.kind == "silu":
        return silu(g) * u
    if gate.kind == "gelu_tanh":
        return gelu(g, approximate="tanh") * u
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    if gate.kind == "clamped_silu":
        return silu(g) * u
    if gate.kind == "swiglu_oai":
        return (u + 1) * g * torch.sigmoid(gate.alpha * g)
    raise ValueError(f"{gate} is not a gate that the kernels support.")
