"""Recognizes the gate of an experts class by its values, not by the name of the class.

The gate of the class is run on inputs around each number at which it could clamp. It is recognized if its values and
derivatives equal those of a formula that the kernels implement, in training and in evaluation mode.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import nn

from ..ops import Gate
from ..ops.reference import gated
from .architectures import architecture_of
from .layout import ExpertsLayout

_FAR = 1e9
"""Larger than any clamp limit. Gates run in fp32, in which the cube of this number is finite."""
_TOLERANCE = 2e-6
"""Tolerance for rounding, relative to the value of the formula for the magnitudes of gate and up."""
_CPU = {"dtype": torch.float32, "device": "cpu"}

_Function = Callable[[torch.Tensor], torch.Tensor]


def known_gate(module: nn.Module, layout: ExpertsLayout) -> Gate | str:
    """The gate of an experts module if the kernels implement it, otherwise the reason why not.

    Args:
        module: the experts module of transformers, with or without its stacks, on any device.
        layout: layout of the module.
    """
    name = layout.class_name
    if not layout.has_gate:
        return f"{name} has no gate"
    if "_apply_gate" in vars(module):
        return f"the gate of this {name} is overridden on the instance"
    tensors = _tensors_beside_stacks(module, layout)
    if tensors:
        return f"the gate of {name} may depend on {tensors[0]}, which can change"
    numbers = _numbers(module)
    pairs = _pairs(numbers)
    for interleaved in (not layout.is_concatenated, layout.is_concatenated):
        rows = _rows(pairs, layout.intermediate_size, interleaved)
        try:
            found = [_response(_gate_of(module, is_training), rows) for is_training in (False, True)]
        except Exception as error:  # a class from outside of transformers may raise anything
            return f"the gate of {name} cannot be run on a CPU ({type(error).__name__}: {error})"
        for gate in _candidates(numbers, interleaved):
            if all(_is_response_of(gate, rows, *one) for one in found):
                return gate
    return f"the kernels do not implement the gate of {name}"


def _tensors_beside_stacks(module: nn.Module, layout: ExpertsLayout) -> list[str]:
    """Names of parameters and buffers that are not part of the layout."""
    declared = {*layout.projections, *(f"{name}_bias" for name in layout.projections if layout.has_bias)}
    if layout.has_post_expert_norm:
        declared.add("post_expert_norm")
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    return [name for name in names if name.partition(".")[0] not in declared]


def _numbers(module: nn.Module) -> list[float]:
    """Positive numbers among the attributes of the module, its submodules and their classes."""
    owners = [owner for part in module.modules() for owner in (part, *type(part).__mro__) if owner is not nn.Module]
    values = [value for owner in owners for value in vars(owner).values() if type(value) in (int, float)]
    values.sort(key=lambda value: type(value) is int)  # integers last: they are mostly sizes
    return list(dict.fromkeys(float(value) for value in values if 0 < value < _FAR))


def _pairs(numbers: list[float]) -> torch.Tensor:
    """`(P, 2)` pairs of gate and up: a grid of small numbers, and values around all numbers, of both signs."""
    edges = torch.tensor([*numbers, _FAR], **_CPU)
    infinity = torch.tensor(math.inf, **_CPU)
    edges = torch.cat([edges, edges.nextafter(infinity), edges.nextafter(-infinity)])
    values = torch.cat([torch.linspace(-12, 12, 42, **_CPU), edges, -edges])
    return torch.cartesian_prod(values, values)


def _rows(pairs: torch.Tensor, width: int, interleaved: bool) -> torch.Tensor:
    """`(R, 2 * width)`: the pairs as input of the gate, some of them repeated to fill the last row."""
    count = -(-len(pairs) // width) * width
    pairs = pairs[torch.arange(count, device="cpu") % len(pairs)].view(-1, width, 2)
    return pairs.flatten(1) if interleaved else pairs.transpose(1, 2).flatten(1)


def _gate_of(module: nn.Module, is_training: bool) -> _Function:
    """The gate of a copy without stacks, in training or evaluation mode."""
    shell = copy.copy(module)
    shell._parameters = {}
    bare = {name: child for name, child in module.named_children() if next(child.parameters(), None) is None}
    shell._modules = copy.deepcopy(bare)
    shell.train(is_training)
    architecture = architecture_of(shell)
    return shell._apply_gate if architecture is None else partial(architecture.apply_gate, shell)


def _candidates(numbers: list[float], interleaved: bool) -> Iterator[Gate]:
    yield Gate("silu", interleaved)
    yield Gate("gelu_tanh", interleaved)
    yield from (Gate("clamped_silu", interleaved, limit) for limit in numbers)
    yield from (Gate("swiglu_oai", interleaved, *pair) for pair in product(numbers, repeat=2))


def _response(function: _Function, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values `(R, I)` and derivatives `(R, 2I)` of a gate."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        rows = rows.clone().requires_grad_()
        values = function(rows.clone())  # a copy, since a gate may change its input in place
        return values.detach(), torch.autograd.grad(values.sum(), rows)[0]


def _is_response_of(gate: Gate, rows: torch.Tensor, values: torch.Tensor, derivatives: torch.Tensor) -> bool:
    formula = partial(gated, gate=gate)
    if not _is_near(values, formula(rows), formula(rows.abs())):
        return False
    return _is_near(derivatives, _response(formula, rows)[1], _response(formula, rows.abs())[1])


def _is_near(found: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool(((found - expected).abs() <= _TOLERANCE * scale.abs()).all())
