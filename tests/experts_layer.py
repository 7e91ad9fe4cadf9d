"""The fused experts layer and its reference in plain torch, on the same random inputs."""

from __future__ import annotations

import torch
from gate_formulas import gated
from kernel_cases import DEVICE, random_ids

from peft_moe_qlora.ops import Factors, Gate, LowRank, packed_weight, reference
from peft_moe_qlora.ops.fused_experts import fused_experts
from peft_moe_qlora.quantization import Stack


def run_layer(
    num_tokens: int,
    top_k: int,
    stacks: tuple[Stack, Stack],
    gate: Gate,
    rank: int,
    has_bias: bool,
    dtype: torch.dtype,
    backward: bool = True,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and all gradients of the fused layer, each with its fp32 reference in plain torch."""
    up, down = stacks
    num_experts, hidden, intermediate = up.num_experts, up.in_features, down.in_features

    def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()

    ids = random_ids(num_tokens, top_k, num_experts)
    x = leaf(num_tokens, hidden, dtype=dtype)
    weights = torch.rand(num_tokens, top_k, device=DEVICE, requires_grad=True)
    factors = []
    if rank:
        shapes = ((rank, hidden), (2 * intermediate, rank), (rank, intermediate), (hidden, rank))
        factors = [leaf(num_experts, *shape, scale=0.3) for shape in shapes]
    bias = [leaf(num_experts, n, scale=0.1).detach() for n in (2 * intermediate, hidden)] if has_bias else [None, None]
    grad = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    terms = [Factors(*factors[:2], 0.7), Factors(*factors[2:], 1.3)] if rank else [None, None]
    inputs = [x, weights, *factors]
    with torch.set_grad_enabled(backward):
        out = fused_experts(x, ids, weights, packed_weight(up), packed_weight(down), gate, *terms, *bias)
    found = [out, *torch.autograd.grad(out, inputs, grad)] if backward else [out]

    x_reference = x.detach().float().requires_grad_()
    rows, expert = x_reference.repeat_interleave(top_k, 0), ids.flatten()
    low_rank = [[LowRank(*factors[:2], 0.7)], [LowRank(*factors[2:], 1.3)]] if rank else [(), ()]
    inner = gated(reference.linear(rows, expert, up, bias[0], low_rank[0]), gate)
    pairs = reference.linear(inner, expert, down, bias[1], low_rank[1]).view(num_tokens, top_k, hidden)
    expected_out = (pairs * weights[..., None]).sum(1)
    expected = [
        expected_out,
        *torch.autograd.grad(expected_out, [x_reference, *inputs[1:]], grad.float(), allow_unused=True),
    ]
    return list(zip(found, expected))
