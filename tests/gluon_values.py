"""Values of simulated Gluon programs (`gluon_on_cpu`): tensors, pointers and shared memory.

A tensor keeps its layout as far as assembly needs it, which combines elements in the order of registers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from functools import cache, reduce
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from ptx_in_numpy import SharedVariables, run
from triton.experimental.gluon import language as gl

_TYPES = {
    torch.bool: tl.int1,
    torch.uint8: tl.uint8,
    torch.int8: tl.int8,
    torch.int16: tl.int16,
    torch.int32: tl.int32,
    torch.int64: tl.int64,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}
TORCH_TYPES = {ours: theirs for theirs, ours in _TYPES.items()}


def _divide(left: Any, right: Any) -> torch.Tensor:
    """As in C, rounded towards zero."""
    return torch.div(left, right, rounding_mode="trunc")


class Tensor:
    """A tensor or scalar of a program; the layout is None where it does not matter."""

    def __init__(self, data: torch.Tensor, layout: Any = None) -> None:
        self.data, self.layout = data, layout
        self.dtype, self.shape = _TYPES[data.dtype], list(data.shape)
        self.type = SimpleNamespace(layout=layout, shape=self.shape, element_ty=self.dtype)

    def to(self, dtype: tl.dtype, bitcast: bool = False) -> Tensor:
        kind = TORCH_TYPES[dtype]
        if bitcast and kind.itemsize != self.data.dtype.itemsize:
            raise TypeError(f"{self.dtype} has not as many bits as {dtype}")
        return Tensor(self.data.view(kind) if bitcast else self.data.to(kind), self.layout)

    def reshape(self, shape: Sequence[int]) -> Tensor:
        return Tensor(self.data.reshape(*shape))

    def permute(self, order: Sequence[int]) -> Tensor:
        return Tensor(self.data.permute(*order))

    def __index__(self) -> int:
        return int(self.data.item())

    __int__ = __index__

    def __bool__(self) -> bool:
        return bool(self.data.item())


def _add_operators() -> None:
    named = {"floordiv": _divide, "mod": torch.fmod, "and": operator.and_, "or": operator.or_}
    for name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"):
        operate = named.get(name) or getattr(operator, name)
        setattr(Tensor, f"__{name}__", lambda a, b, operate=operate: _elementwise(operate, a, b))
        setattr(Tensor, f"__r{name}__", lambda a, b, operate=operate: _elementwise(operate, b, a))
    for name in ("lt", "le", "gt", "ge", "eq", "ne"):
        operate = getattr(operator, name)
        setattr(Tensor, f"__{name}__", lambda a, b, operate=operate: _elementwise(operate, a, b))


_add_operators()


def _common(values: Sequence[Any]) -> tuple[list[int], Any]:
    """Shape and layout of an elementwise result. Scalars broadcast to all shapes, tensors only along a length of 1."""
    tensors = [value for value in values if isinstance(value, Tensor) and value.shape]
    shapes, layouts = [one.shape for one in tensors], [one.layout for one in tensors if one.layout is not None]
    if any(len(shape) != len(shapes[0]) for shape in shapes):
        raise ValueError(f"different numbers of dimensions: {shapes}")
    if any(layout != layouts[0] for layout in layouts):
        raise ValueError(f"different layouts: {layouts}")
    return [max(sizes) for sizes in zip(*shapes)], layouts[0] if layouts else None


def _elementwise(operate: Callable, *values: Any) -> Any:
    if any(isinstance(value, Pointer) for value in values):
        return NotImplemented
    kind = reduce(torch.promote_types, [value.data.dtype for value in values if isinstance(value, Tensor)])
    return Tensor(
        operate(*(value.data.to(kind) if isinstance(value, Tensor) else value for value in values)),
        _common(values)[1],
    )


def number(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(torch.tensor(value, dtype=torch.int32))


def _minimum(a: Any, b: Any) -> Tensor:
    return _elementwise(torch.minimum, number(a), number(b))


def _maximum(a: Any, b: Any) -> Tensor:
    return _elementwise(torch.maximum, number(a), number(b))


def _where(condition: Tensor, a: Any, b: Any) -> Tensor:
    chosen = _elementwise(lambda a, b: torch.where(condition.data, a, b), a, b)
    return Tensor(chosen.data, _common([condition, a, b])[1])


def _expand_dims(value: Tensor, dim: int) -> Tensor:
    layout = value.layout
    if layout is not None:
        if layout.dim != dim:
            raise ValueError(f"a tensor with {layout} has no dimension to add at {dim}")
        layout = layout.parent
    return Tensor(value.data.unsqueeze(dim), layout)


def _split(value: Tensor) -> tuple[Tensor, Tensor]:
    first, second = value.data.unbind(-1)
    return Tensor(first), Tensor(second)


def poison(data: torch.Tensor) -> None:
    """Makes contents arbitrary: NaN, also as pairs of 16-bit numbers in integers."""
    data.fill_(torch.nan if data.dtype.is_floating_point else torch.iinfo(data.dtype).max)


class Pointer:
    """Addresses in the memory from the first to the last element of a tensor."""

    def __init__(self, name: str, memory: torch.Tensor, places: Tensor) -> None:
        self.name, self.memory, self.places = name, memory, places
        self.dtype = tl.pointer_type(_TYPES[memory.dtype])

    @classmethod
    def to_tensor(cls, name: str, tensor: torch.Tensor) -> Pointer:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return cls(name, tensor.detach().as_strided((last + 1,), (1,)), Tensor(torch.tensor(0)))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.name, self.memory, self.places + offset)

    def __sub__(self, offset: Any) -> Pointer:
        return Pointer(self.name, self.memory, self.places - offset)

    def accessed(self, mask: Tensor | None) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """Places, which of them to access, and the layout."""
        shape, layout = _common([self.places, mask])
        mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.data.expand(shape)
        places = self.places.data.expand(shape)
        if ((places < 0) | (places >= len(self.memory)))[mask].any():
            raise IndexError(f"access to {self.name} outside of its {len(self.memory)} elements")
        return places, mask, layout


def load(pointer: Pointer, mask: Tensor | None = None, other: Any = None) -> Tensor:
    places, mask, layout = pointer.accessed(mask)
    found = torch.empty(places.shape, dtype=pointer.memory.dtype)
    poison(found) if other is None else found.fill_(other)
    found[mask] = pointer.memory[places[mask]]
    return Tensor(found, layout)


def _store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    _common([pointer.places, value])
    places, mask, _ = pointer.accessed(mask)
    pointer.memory[places[mask]] = value.data.to(pointer.memory.dtype).expand(places.shape)[mask]


class Shared:
    """A shared memory descriptor."""

    def __init__(self, data: torch.Tensor, layout: Any = None) -> None:
        self.data, self.layout = data, layout
        self.dtype, self.shape = _TYPES[data.dtype], list(data.shape)

    def index(self, index: Any) -> Shared:
        if not 0 <= int(index) < self.shape[0]:
            raise IndexError(f"index {int(index)} of shared memory {self.shape}")
        return Shared(self.data[int(index)], self.layout)

    def slice(self, start: Any, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, int(start), length), self.layout)

    def permute(self, order: Sequence[int]) -> Shared:
        return Shared(self.data.permute(*order), self.layout)

    def reshape(self, shape: Sequence[int]) -> Shared:
        return Shared(self.data.view(*shape), self.layout)

    def load(self, layout: Any = None) -> Tensor:
        return Tensor(self.data.clone(), layout)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise TypeError(f"{value.dtype} {value.shape} does not fit in {self.dtype} {self.shape}")
        self.data.copy_(value.data)


@cache
def _elements(layout: Any) -> np.ndarray:
    """`(threads, registers)`: index of the element in each register, for a layout given by bases."""
    if not isinstance(layout, gl.DistributedLinearLayout):
        raise NotImplementedError(f"the order of registers of {layout}")
    found = np.zeros((1, len(layout.shape)), np.int64)
    # the lowest bit, of the first register, changes fastest
    for basis in [*layout.reg_bases, *layout.lane_bases, *layout.warp_bases]:
        found = np.concatenate([found, found ^ np.array(basis)])
    return np.ravel_multi_index(tuple(found.T), layout.shape).reshape(-1, 1 << len(layout.reg_bases))


def run_assembly(
    assembly: str,
    constraints: str,
    operands: Sequence[Tensor],
    dtype: tl.dtype,
    is_pure: bool,
    pack: int,
    variables: SharedVariables,
) -> Tensor:
    """Runs PTX for `pack` consecutive elements of a thread at a time, which smaller types share a register for."""
    shape, layout = _common(operands)
    elements = _elements(layout)
    if shape != list(layout.shape):
        raise ValueError(f"a tensor {shape} with {layout}")
    variables.num_threads = len(elements)
    registers: list[np.ndarray] = []
    for one in operands:
        bits = one.data.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[one.data.dtype.itemsize])
        own = bits.expand(shape).reshape(-1).numpy()[elements].reshape(-1, pack)
        registers += list(np.ascontiguousarray(own).view(np.uint32).T)
    kinds = [kind.strip() for kind in constraints.split(",")]
    num_results = kinds.count("=r")
    if kinds != ["=r"] * num_results + ["r"] * len(registers):
        raise ValueError(f"{constraints} for {len(registers)} registers")
    found = np.stack(run(assembly, dict(enumerate(registers, num_results)), num_results, variables), axis=1)
    out = torch.empty(shape, dtype=TORCH_TYPES[dtype])
    bits = found.astype(np.uint32).view(np.dtype(f"i{out.dtype.itemsize}"))
    if bits.shape[1] != pack:
        raise ValueError(f"{num_results} results for {pack} elements of {dtype}")
    flat = np.empty(out.numel(), bits.dtype)
    flat[elements.ravel()] = bits.ravel()
    out.copy_(torch.from_numpy(flat).view(out.dtype).view(shape))
    return Tensor(out, layout)


def _range(*bounds: Any) -> Iterator[Tensor]:
    return map(number, range(*map(int, bounds)))


LANGUAGE: dict[str, Callable] = {
    "arange": lambda start, end, layout=None: Tensor(torch.arange(start, end, dtype=torch.int32), layout),
    "zeros": lambda shape, dtype, layout=None: Tensor(torch.zeros(shape, dtype=TORCH_TYPES[dtype]), layout),
    "convert_layout": lambda value, layout, assert_trivial=False: Tensor(value.data, layout),
    "join": lambda a, b: Tensor(torch.stack(torch.broadcast_tensors(a.data, b.data), -1)),
    "range": _range,
    "static_range": range,
    "minimum": _minimum,
    "maximum": _maximum,
    "where": _where,
    "expand_dims": _expand_dims,
    "split": _split,
    "load": load,
    "store": _store,
}
"""Operations that depend on nothing but their arguments."""
