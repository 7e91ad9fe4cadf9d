"""The gates that the kernels implement, in plain torch."""

from __future__ import annotations

import torch
from torch.nn.functional import gelu, silu

from peft_moe_qlora.ops import Gate


def gated(x: torch.Tensor, gate: Gate) -> torch.Tensor:
    """`(S, 2I)` -> `(S, I)`."""
    g, u = (x[..., ::2], x[..., 1::2]) if gate.interleaved else x.chunk(2, -1)
    if gate.kind == "silu":
        return silu(g) * u
    if gate.kind == "gelu_tanh":
        return gelu(g, approximate="tanh") * u
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return silu(g) * u if gate.kind == "clamped_silu" else (u + 1) * g * torch.sigmoid(gate.alpha * g)
