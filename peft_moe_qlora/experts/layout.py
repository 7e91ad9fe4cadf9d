"""What one has to know of an experts class to compute it, read from what the class itself declares.

transformers (5.17 and later) marks its experts classes with `@use_experts_implementation(...)`, whose arguments become
attributes of the instance: `is_transposed`, `is_concatenated`, `has_bias`, `has_gate`, `has_post_expert_norm`. Sizes
follow from the parameters' shapes and these flags; orientation never follows from a shape, since square stacks exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..sharded import ZERO3, engine_of
from .architectures import architecture_of, declaration
from .liger import WITHOUT_LIGER

_DECLARATIONS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")

UNSUPPORTED_CLASSES = {
    "DbrxExpertGLU": "its stacks are flat 2-D parameters",
    "InklingSharedExperts": "its experts are always on, not routed",
    "JetMoeParallelExperts": "it is one stack without gate or routing weights",
    "LongcatFlashExperts": "it mixes identity experts with real ones",
    "Step3p7Experts": "its gate clamps differently in every layer",
}
"""Experts classes that declare no layout and have no file in `architectures`, and what is special about each."""

ALWAYS_ON_CLASSES = frozenset({"InklingSharedExperts"})
"""Of these, the ones that are not routed: they stay as they are beside a model's routed experts."""


@dataclass(frozen=True)
class ExpertsLayout:
    """Shapes and declarations of one experts module.

    Args:
        class_name: the experts class.
        num_experts: E.
        hidden_size: width of what goes in and comes out.
        intermediate_size: width between the two projections, behind the gate.
        is_transposed: matrices are stored `(in, out)` instead of `(out, in)`.
        is_concatenated: gate and up rows stand one block after the other instead of interleaved.
        has_bias: each projection has a bias `(E, out)`.
        has_gate: the first projection is `gate_up_proj`, twice as wide, instead of `up_proj`.
        has_post_expert_norm: a norm follows the down projection.
    """

    class_name: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    is_transposed: bool
    is_concatenated: bool
    has_bias: bool
    has_gate: bool
    has_post_expert_norm: bool

    @property
    def up_name(self) -> str:
        return up_projection(self.has_gate)

    def parts(self, projection: str) -> int:
        """Matrices under each other, `(out, in)` each, that the projection's is: gate and up, or one."""
        return 2 if self.has_gate and self.is_concatenated and projection == self.up_name else 1

    @property
    def projections(self) -> tuple[str, str]:
        """Names of the two stacks, in the order of the forward."""
        return (self.up_name, "down_proj")

    def features(self, projection: str) -> tuple[int, int]:
        """`(in, out)` of a projection."""
        if projection == "down_proj":
            return self.intermediate_size, self.hidden_size
        return self.hidden_size, self.intermediate_size * (2 if self.has_gate else 1)


SHARD_LATER = (
    "experts are quantized and adapted whole. Load the model without distributed_config, and shard it when it has "
    "all its adapters, as Trainer and accelerate do with FSDP."
)


def up_projection(has_gate: bool) -> str:
    return "gate_up_proj" if has_gate else "up_proj"


def declares_layout(module: nn.Module) -> bool:
    """Whether a module is of an experts class whose layout is known, and still holds its stacks."""
    if any(declaration(module, name) is None for name in _DECLARATIONS):
        return False
    return up_projection(declaration(module, "has_gate")) in module._parameters and "down_proj" in module._parameters


def read_layout(module: nn.Module, path: str) -> ExpertsLayout:
    """Reads the layout of an experts module.

    Args:
        module: the experts module, in 16 or 32 bits.
        path: its place in the model, for errors.

    Raises:
        ValueError: a parameter is missing, has not three dimensions, or does not fit the others.
    """
    is_transposed, is_concatenated, has_bias, has_gate = (declaration(module, name) for name in _DECLARATIONS)
    names = (up_projection(has_gate), "down_proj")
    shapes = {}
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dim() != 3:
            found = "missing" if parameter is None else f"of shape {tuple(parameter.shape)}"
            raise ValueError(f"{path}.{name} is {found}; a 3-D stack (experts, rows, columns) was expected.")
        shapes[name] = tuple(parameter.shape)

    def features(name: str) -> tuple[int, int]:
        _, rows, columns = shapes[name]
        return (rows, columns) if is_transposed else (columns, rows)

    hidden_size, up_features = features(names[0])
    layout = ExpertsLayout(
        class_name=type(module).__name__,
        num_experts=shapes[names[0]][0],
        hidden_size=hidden_size,
        intermediate_size=up_features // (2 if has_gate else 1),
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
        has_bias=has_bias,
        has_gate=has_gate,
        has_post_expert_norm=getattr(module, "has_post_expert_norm", False),
    )
    for name in names:
        if shapes[name][0] != layout.num_experts or features(name) != layout.features(name):
            raise ValueError(
                f"{path} ({layout.class_name}): the stacks {shapes} do not fit the declared layout {layout}. "
                "If the class is your own, check the arguments of its @use_experts_implementation."
            )
    return layout


def check_floating_point(module: nn.Module, path: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Makes sure that the stacks are plain numbers in memory.

    Raises:
        ValueError: a stack is offloaded, or packed or scaled by another quantizer.
    """
    for name in (up_projection(declaration(module, "has_gate")), "down_proj"):
        parameter = module._parameters[name]
        if parameter.is_meta:
            raise ValueError(
                f"{path}.{name} is on the meta device, that is, offloaded to CPU or disk or not loaded yet. Load the "
                "experts onto one device, for example with device_map={'': 0}, and quantize them there."
            )
        if parameter.dtype not in dtypes:
            raise ValueError(
                f"{path}.{name} has dtype {parameter.dtype}; unquantized weights in one of "
                f"{', '.join(map(str, dtypes))} were expected. Load the checkpoint with load_quantized, which keeps "
                "quantized experts as they are, or in 16 bits."
            )


def check_not_sharded(experts: nn.Module, path: str) -> None:
    """Refuses experts of which this process has but a part.

    Raises:
        ValueError: a parameter or the experts are sharded over processes.
    """
    path, engine = path.removesuffix(".base_layer"), engine_of(experts)
    if engine == ZERO3:  # gathered ones too: the engine would not know of what is added
        raise ValueError(
            f"{path} is sharded over processes by {ZERO3}; experts are quantized and adapted whole. Load the model "
            "with quantization_config=MoeQuantizationConfig(), which zero.Init leaves whole, and give it all its "
            "adapters before it is given to DeepSpeed."
        )
    if engine is not None or getattr(experts, "_is_expert_parallel", False):
        raise ValueError(f"{path} is sharded over processes; {SHARD_LATER}")


def refuse_unsupported(model: nn.Module) -> None:
    """Refuses a model whose routed experts cannot be computed.

    Raises:
        ValueError: names the first such module, its class and what is special about it.
    """
    for path, module in model.named_modules():
        name = type(module).__name__
        if name.startswith("Liger") and name.endswith("Experts") and architecture_of(module) is None:
            raise ValueError(
                f"{path} is of class {name}, which Liger has put in the place of the model's own for as long as this "
                f"process runs, and whose layout is not known. Start a new process, and keep Liger off the experts: "
                f"{WITHOUT_LIGER}."
            )
        if name in UNSUPPORTED_CLASSES and name not in ALWAYS_ON_CLASSES:
            raise ValueError(
                f"{path} is of class {name}, which is not supported yet: {UNSUPPORTED_CLASSES[name]}. "
                "Train this model's other layers with PEFT's LoraConfig."
            )
