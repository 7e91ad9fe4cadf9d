"""CUDA graphs of the forward and backward of decoder layers, captured once for each shape and replayed.

A step of a MoE model launches about ten thousand kernels and is launch-bound. A replay is one launch for the forward
of a layer and one for its backward, including recomputation. The kernels are the same, so results are bit-identical.

All graphs of a model run sequentially and share one memory pool and one set of input and output buffers. Results are
therefore copied before the next graph runs. The output of a layer is in the buffer that the next layer reads, and the
gradient of its input in the buffer that the previous layer reads in its backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..ops import keep_experts, with_backward, without_output
from .compiled import saved_tensors_kept
from .static_tensors import StaticTensors, copies

Function = Callable[..., Any]


class Replayable(Protocol):
    """A captured graph."""

    def replay(self) -> None: ...


class Backend(Protocol):
    """Interface for capturing work: with CUDA, or in tests by calling the work again."""

    device_type: str

    def warm_up(self, work: Callable[[], None]) -> None: ...

    def capture(self, work: Callable[[], None]) -> Replayable: ...

    def why_no_room(self) -> str | None: ...


class CudaBackend:
    """Captures on a separate stream, into a memory pool that is shared by all graphs."""

    device_type = "cuda"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.pool_bytes = 0
        self._plain_peak = torch.cuda.max_memory_allocated(device)
        # a pool cannot be reused after its last graph is freed, even that of a failed capture
        self._holds_pool = self.capture(lambda: torch.zeros(1, device=device))

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def warm_up(self, work: Callable[[], None]) -> None:
        """Runs the work once before its capture, for compilation, loading and allocation."""
        with self._on_stream():
            work()
        # the pool of the graphs cannot use memory that is left in torch's caching allocator
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Captures all launches of `work` in a graph, without running them.

        Raises:
            RuntimeError: CUDA cannot capture an operation, such as a copy to the host.
        """
        graph = torch.cuda.CUDAGraph()
        reserved = torch.cuda.memory_reserved(self.device)
        with self._on_stream():
            try:
                # other threads, such as a data loader's, may allocate during the capture
                graph.capture_begin(self.pool, capture_error_mode="thread_local")
                work()
            except BaseException:
                self._end_failed(graph)
                raise
            graph.capture_end()
        self.pool_bytes += max(0, torch.cuda.memory_reserved(self.device) - reserved)
        return graph

    def why_no_room(self) -> str | None:
        """The reason why gradients and optimizer may not fit into the remaining memory; None if they do."""
        free, total = torch.cuda.mem_get_info(self.device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(self.device)
        room = min(allowed, free + torch.cuda.memory_reserved(self.device))
        if self._plain_peak + self.pool_bytes <= room:
            return None
        plain, graphs, room = (size / 2**30 for size in (self._plain_peak, self.pool_bytes, room))
        return (
            f"earlier steps used {plain:.2f} GiB, graphs need {graphs:.2f} GiB more, and {room:.2f} GiB are available"
        )

    def _end_failed(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # reports an invalidated capture, whose cause is the error being raised, and leaves the random generator
            # in the state of a capture; a successful capture resets it
            other = torch.cuda.CUDAGraph()
            other.capture_begin()
            torch.zeros(1, device=self.device)
            other.capture_end()


class Call(NamedTuple):
    """The arguments of a layer: hidden states, other tensors, and the structure that contains them."""

    hidden_states: Tensor
    tensors: list[Tensor]
    rest: list[Any]
    spec: TreeSpec

    def arguments(self, hidden_states: Tensor, tensors: Sequence[Tensor]) -> tuple[tuple, dict[str, Any]]:
        """`(args, kwargs)` of the layer with other tensors."""
        others = iter(tensors)
        leaves = [next(others) if isinstance(leaf, _Tensor) else leaf for leaf in self.rest]
        args, kwargs = tree_unflatten(leaves, self.spec)
        return (hidden_states, *args), kwargs

    @property
    def signature(self) -> tuple:
        """All properties except the values of the tensors."""
        return (*self.shapes, *self.rest, self.spec)

    @property
    def shapes(self) -> list[tuple[torch.Size, torch.dtype]]:
        """Shapes and dtypes of the hidden states and the other tensors."""
        return [(tensor.shape, tensor.dtype) for tensor in (self.hidden_states, *self.tensors)]


class _Tensor(NamedTuple):
    """Placeholder for a tensor among arguments."""


_CONSTANTS = (type(None), bool, int, float, str, torch.dtype, torch.device, _Tensor)


def flatten(arguments: Any) -> tuple[list[Any], TreeSpec]:
    """The leaves of tuples, lists and dictionaries; other containers count as leaves."""
    return tree_flatten(arguments, is_leaf=lambda node: not isinstance(node, (tuple, list, dict)))


def why_not_constant(leaves: Iterable[Any]) -> str | None:
    """The reason why leaves may change without an effect on a graph: other types may contain tensors, as caches do."""
    kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, _CONSTANTS)})
    return f"arguments of type {', '.join(kinds)} are neither tensors nor constants" if kinds else None


def read_call(args: tuple, kwargs: dict[str, Any]) -> Call:
    """Splits the arguments of a layer; the hidden states are the first argument or `hidden_states`."""
    kwargs = dict(kwargs)
    hidden_states, *args = args if args else (kwargs.pop("hidden_states"),)
    leaves, spec = flatten((tuple(args), kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    rest = [_Tensor() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return Call(hidden_states, tensors, rest, spec)


class CapturedLayer:
    """The forward and backward graph of a layer for one signature of its arguments.

    Args:
        function: forward of the layer.
        layer: the layer with the trained parameters.
        call: example arguments.
        static: shared buffers.
        backend: backend for the capture.
        keep: activations that the forward saves; the backward recomputes the others: `"nothing"`, `"experts"` or
            `"everything"`.
    """

    def __init__(
        self, function: Function, layer: nn.Module, call: Call, static: StaticTensors, backend: Backend, keep: str
    ) -> None:
        self._static = static
        self._keeps = keep != "nothing"
        self.trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        self._forwards = 0
        self._kept_of = 0
        self._generator: torch.Generator | None = None
        hidden_states, tensors = self._load(call.hidden_states, call.tensors)
        work = _Work(function, layer, call, self.trained, hidden_states, tensors, static, keep)
        generator = _default_generator(call.hidden_states.device)
        state = generator.get_state()  # on the host, also for a GPU
        backend.warm_up(partial(self._warm_up, work, call, generator))
        self._forward = backend.capture(work.forward)
        self._backward = backend.capture(work.backward)
        generator.set_state(state)
        static.changed("hidden_states", "grad_hidden_states")
        self._output, self._grads, self._held = work.output, work.grads, work.saved

    def _warm_up(self, work: _Work, call: Call, generator: torch.Generator) -> None:
        """Finds out whether the layer draws random numbers, and whether its backward reads the experts' output."""
        state = generator.get_state()
        work.forward()
        if not torch.equal(generator.get_state(), state):
            self._generator = generator
        work.find_whether_output_is_read()
        self._static.changed("hidden_states")
        self._load(call.hidden_states, call.tensors)
        work.backward()

    def _load(self, hidden_states: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        others = [self._static.load(("argument", number), tensor) for number, tensor in enumerate(tensors)]
        return self._static.load("hidden_states", hidden_states), others

    @property
    def was_replayed(self) -> bool:
        """Whether the graphs were used again after the call for which they were captured."""
        return self._forwards > 1

    def __call__(self, call: Call) -> Tensor:
        """The output for new arguments, differentiable in the hidden states and the trained parameters."""
        return _Replay.apply(self, call.hidden_states, len(call.tensors), *call.tensors, *self.trained)

    def run_forward(self, hidden_states: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """The output, and the state of this replay for `run_backward`."""
        state = None if self._generator is None else self._generator.get_state()
        self._load(hidden_states, tensors)
        self._forward.replay()
        self._forwards += 1
        self._kept_of = self._forwards
        output = self._output.clone()
        self._static.changed("hidden_states")
        self._static.holds("hidden_states", output)
        return output, (self._forwards, state)

    def run_backward(
        self, hidden_states: Tensor, tensors: Sequence[Tensor], grad_out: Tensor, of_forward: Any
    ) -> list[Tensor | None]:
        """Gradients of the hidden states and the trained parameters; None for unused ones."""
        forward, state = of_forward
        now = None if state is None else self._generator.get_state()
        self._load(hidden_states, tensors)
        if self._keeps and forward != self._kept_of:
            # another forward has overwritten the saved activations
            self._rewind(state)
            self._forward.replay()
            self._kept_of = forward
            self._static.changed("hidden_states")
            self._load(hidden_states, tensors)
        self._rewind(state)
        self._static.load("grad_hidden_states", grad_out)
        self._backward.replay()
        if now is not None:
            self._generator.set_state(now)
        grads = copies(self._grads)
        self._static.changed("grad_hidden_states")
        if grads[0] is not None:
            self._static.holds("grad_hidden_states", grads[0])
        return grads

    def _rewind(self, state: Tensor | None) -> None:
        """Restores the random state of the forward for the recomputation."""
        if state is not None:
            self._generator.set_state(state)


class _Work:
    """The forward and the backward of a layer on static buffers, which are captured; arguments as of `CapturedLayer`.

    Args:
        trained: parameters of the layer that get gradients.
        hidden_states: buffer of the layer's input.
        tensors: buffers of its other tensors.

    Attributes:
        output: buffer of the layer's output.
        grads: buffers of the gradients of the input and of the parameters; None for unused ones.
    """

    output: Tensor
    grads: list[Tensor | None]

    def __init__(
        self,
        function: Function,
        layer: nn.Module,
        call: Call,
        trained: list[nn.Parameter],
        hidden_states: Tensor,
        tensors: list[Tensor],
        static: StaticTensors,
        keep: str,
    ) -> None:
        self._function, self._layer, self._trained = function, layer, trained
        self._call, self._tensors = call._replace(hidden_states=None, tensors=[]), tensors  # the example's are freed
        self._static = static
        self._x = hidden_states.detach().requires_grad_()
        # separate leaves: the model's parameters would add the stream of their first use to the capture
        self._aliases = [nn.Parameter(parameter.detach()) for parameter in trained]
        self._keeps_everything = keep == "everything"
        self._of_forward, self._of_backward = keep_experts() if keep == "experts" else (nullcontext(), nullcontext())
        self._of_experts: AbstractContextManager = nullcontext()
        self._out: Tensor | None = None
        self._autocast = autocast_state()

    def _run(self) -> Tensor:
        args, kwargs = self._call.arguments(self._x, self._tensors)
        with _swapped(self._layer, self._trained, self._aliases):
            out = self._function(*args, **kwargs)
        if not isinstance(out, Tensor):
            raise TypeError(f"{type(self._layer).__name__} returns a {type(out).__name__}, not a tensor")
        return out

    def forward(self) -> None:
        with (
            self._of_forward,
            with_backward(),
            torch.set_grad_enabled(self._keeps_everything),
            uncached_autocast(self._autocast),
        ):
            self._out = self._run()
        self.output = self._static.store([("hidden_states", self._out.detach())])[0]
        # not like the input: norms may be in fp32
        self._grad_out = self._static.buffer("grad_hidden_states", self._out)

    def backward(self) -> None:
        with self._of_backward, self._of_experts, torch.enable_grad(), uncached_autocast(self._autocast):
            out = self._out if self._keeps_everything else self._run()
        # every replay reads the saved tensors again
        with saved_tensors_kept() if self._keeps_everything else nullcontext():
            grad_x, *grads = torch.autograd.grad(
                out, [self._x, *self._aliases], self._grad_out, retain_graph=self._keeps_everything, allow_unused=True
            )
        self.grads = self._static.store([("grad_hidden_states", grad_x), *enumerate(grads)])

    def find_whether_output_is_read(self) -> None:
        """If no gradient depends on the output of the experts, the recomputation skips it."""
        self._grad_out.fill_(1)
        self._of_experts = without_output("nan")
        self.backward()
        is_read = not all(torch.isfinite(grad).all() for grad in self.grads if grad is not None)
        self._of_experts = nullcontext() if is_read else without_output()

    @property
    def saved(self) -> tuple:
        """What holds the activations that the forward saves for the backward."""
        return self._of_forward, self._out if self._keeps_everything else None


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, captured: CapturedLayer, hidden_states: Tensor, num_tensors: int, *rest: Tensor) -> Tensor:
        tensors = rest[:num_tensors]
        output, ctx.of_forward = captured.run_forward(hidden_states, tensors)
        ctx.captured, ctx.num_tensors = captured, num_tensors
        ctx.save_for_backward(hidden_states, *tensors)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple:
        hidden_states, *tensors = ctx.saved_tensors
        grad_hidden_states, *grads = ctx.captured.run_backward(hidden_states, tensors, grad_out, ctx.of_forward)
        return None, grad_hidden_states, None, *[None] * ctx.num_tensors, *grads


@contextmanager
def _swapped(layer: nn.Module, parameters: Sequence[nn.Parameter], aliases: Sequence[nn.Parameter]) -> Iterator[None]:
    """Replaces parameters of the layer by aliases with the same memory."""
    alias_of = {id(parameter): alias for parameter, alias in zip(parameters, aliases)}
    places = [
        (module, name, parameter)
        for module in layer.modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in alias_of
    ]
    for module, name, parameter in places:
        module._parameters[name] = alias_of[id(parameter)]
    try:
        yield
    finally:
        for module, name, parameter in places:
            module._parameters[name] = parameter


def autocast_state() -> dict[str, torch.dtype]:
    """Device type -> dtype, for devices with autocast enabled."""
    return {
        device: torch.get_autocast_dtype(device) for device in ("cuda", "cpu") if torch.is_autocast_enabled(device)
    }


def uncached_autocast(state: dict[str, torch.dtype]) -> ExitStack:
    """Autocast with the given state, without cached casts from outside of the capture."""
    stack = ExitStack()
    for device, dtype in state.items():
        stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=False))
    return stack


def _default_generator(device: torch.device) -> torch.Generator:
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator
