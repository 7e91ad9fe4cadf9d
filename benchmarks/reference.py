"""Reference layer in fp32, computed per expert from the stored weights, and the error of an arm relative to it."""

from __future__ import annotations

import torch
from arms import Layer
from measure import forward, train_step
from shapes import Inputs
from torch.nn.functional import linear

CHUNK_ROWS = 4096
"""Number of rows of an expert per chunk, so that memory does not depend on the routing."""


def _projected(
    rows: torch.Tensor, layer: Layer, projection: str, expert: int, A: torch.Tensor | None, B: torch.Tensor | None
) -> torch.Tensor:
    """`(rows, in)` -> `(rows, out)` of one expert; A `(R, in)` and B `(out, R)`, or None without LoRA."""
    out = linear(rows, layer.matrix(projection, expert), layer.bias(projection, expert))
    if A is not None:
        out = out + layer.factors[projection].scaling * (rows @ A.T) @ B.T
    return out


def reference(layer: Layer, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and all gradients in fp32, by name: output and `hidden_states` `(T, H)`, `top_k_weights` `(T, K)`, and A
    `(E, R, in)` and B `(E, out, R)` of each adapted projection.

    Gradients are computed by autograd. The loss is linear in the output of each expert, so experts and chunks of rows
    are processed sequentially.
    """
    E = layer.shape.num_experts
    gate = layer.shape.experts_on_meta()._apply_gate
    found = {"output": torch.zeros_like(inputs.hidden_states, dtype=torch.float32)}
    found |= {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in inputs.leaves.items()}
    factors = {}
    for projection, of_projection in layer.factors.items():
        pair = of_projection.per_expert(of_projection.A.detach(), of_projection.B.detach(), E)
        factors |= {f"{projection} {name}": factor for name, factor in zip("AB", pair)}
    found |= {name: torch.zeros(factor.shape, device=factor.device) for name, factor in factors.items()}

    for expert in inputs.top_k_index.unique().tolist():
        of_expert = {name: factor[expert].float().requires_grad_() for name, factor in factors.items()}
        token_of_row, choice_of_row = torch.where(inputs.top_k_index == expert)
        for token, choice in zip(token_of_row.split(CHUNK_ROWS), choice_of_row.split(CHUNK_ROWS)):
            rows = inputs.hidden_states.detach().index_select(0, token).float().requires_grad_()
            weights = inputs.top_k_weights.detach()[token, choice].float().requires_grad_()
            inner = rows
            for projection in ("gate_up_proj", "down_proj"):
                A, B = (of_expert.get(f"{projection} {name}") for name in "AB")
                inner = _projected(inner, layer, projection, expert, A, B)
                inner = gate(inner) if projection == "gate_up_proj" else inner
            out = inner * weights[:, None]
            cotangent = inputs.cotangent.index_select(0, token).float()
            grads = torch.autograd.grad(out, (rows, weights, *of_expert.values()), cotangent)
            found["output"].index_add_(0, token, out.detach())
            found["hidden_states"].index_add_(0, token, grads[0])
            found["top_k_weights"][token, choice] += grads[1]
            for name, grad in zip(of_expert, grads[2:]):
                found[name][expert] += grad
    return found


def computed(layer: Layer, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and gradients of the arm in its dtypes, and the output under no_grad, which may use another path."""
    implementation, *_ = layer.implementations(len(inputs.hidden_states), needs_gradients=True)
    layer.use(implementation)
    found = {"output": train_step(layer, inputs).detach(), "output, no_grad": forward(layer, inputs)}
    found |= {name: leaf.grad for name, leaf in inputs.leaves.items()}
    for projection, factors in layer.factors.items():
        grads = factors.per_expert(factors.A.grad, factors.B.grad, layer.shape.num_experts)
        found |= {f"{projection} {name}": grad for name, grad in zip("AB", grads)}
    return found


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """`||value - expected|| / ||expected||`; NaN if either contains NaN."""
    difference = torch.linalg.vector_norm(value.float() - expected, dtype=torch.float64)
    return (difference / torch.linalg.vector_norm(expected, dtype=torch.float64)).item()


def relative_errors(layer: Layer, inputs: Inputs) -> dict[str, float]:
    """Relative L2 errors of the output and all gradients, by name."""
    expected = reference(layer, inputs)
    expected["output, no_grad"] = expected["output"]
    return {name: relative_error(value, expected[name]) for name, value in computed(layer, inputs).items()}
