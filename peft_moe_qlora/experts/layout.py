"""The layout of an experts class, read from its own declarations.

transformers (5.17 and later) marks its experts classes with `@use_experts_implementation(...)`, whose arguments become
attributes of the instance: `is_transposed`, `is_concatenated`, `has_bias`, `has_gate`, `has_post_expert_norm`. Sizes
are derived from the parameters' shapes and these flags. The orientation is never derived from a shape, since a stack
can be square.
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
    "JetMoeParallelExperts": "it has one stack without gate or routing weights",
    "LongcatFlashExperts": "it mixes identity experts with real ones",
    "Step3p7Experts": "its gate clamps differently in every layer",
}
"""Unsupported experts classes, which declare no layout and have no module in `architectures`, and the reasons."""

ALWAYS_ON_CLASSES = frozenset({"InklingSharedExperts"})
"""Unsupported classes that are not routed: they are left unchanged, and the routed experts are converted."""


@dataclass(frozen=True)
class ExpertsLayout:
    """Shapes and declarations of one experts module.

    Args:
        class_name: name of the experts class.
        num_experts: number of experts, E.
        hidden_size: size of inputs and outputs.
        intermediate_size: input size of the down projection.
        is_transposed: matrices are stored `(in, out)` instead of `(out, in)`.
        is_concatenated: gate and up rows are two consecutive blocks instead of interleaved.
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
        """Number of `(out, in)` matrices concatenated in the projection: 2 for gate and up, else 1."""
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
    "experts cannot be quantized or adapted in parts. Load the model without distributed_config, and shard it after "
    "all adapters are added, as Trainer and accelerate do with FSDP."
)


def up_projection(has_gate: bool) -> str:
    return "gate_up_proj" if has_gate else "up_proj"


def declares_layout(module: nn.Module) -> bool:
    """Whether the layout of a module is known and the module contains its stacks."""
    if any(declaration(module, name) is None for name in _DECLARATIONS):
        return False
    return up_projection(declaration(module, "has_gate")) in module._parameters and "down_proj" in module._parameters


def read_layout(module: nn.Module, path: str) -> ExpertsLayout:
    """Reads the layout of an experts module.

    Args:
        module: the experts module, in 16 or 32 bits.
        path: path of the module, for errors.

    Raises:
        ValueError: a parameter is missing, is not 3-D, or does not match the others.
    """
    is_transposed, is_concatenated, has_bias, has_gate = (declaration(module, name) for name in _DECLARATIONS)
    names = (up_projection(has_gate), "down_proj")
    shapes = {}
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dim() != 3:
            found = "missing" if parameter is None else f"of shape {tuple(parameter.shape)}"
            raise ValueError(f"{path}.{name} is {found}. Expected a 3-D stack (experts, rows, columns).")
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
                f"{path} ({layout.class_name}): the stacks {shapes} do not match the declared layout {layout}. If the "
                "class is your own, check the arguments of its @use_experts_implementation."
            )
    return layout


def check_floating_point(module: nn.Module, path: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Checks that the stacks are in memory and not quantized.

    Raises:
        ValueError: a stack is offloaded, or quantized by another library.
    """
    for name in (up_projection(declaration(module, "has_gate")), "down_proj"):
        parameter = module._parameters[name]
        if parameter.is_meta:
            raise ValueError(
                f"{path}.{name} is on the meta device: it is offloaded to CPU or disk, or not loaded yet. Load the "
                "experts onto one device, for example with device_map={'': 0}, and quantize them there."
            )
        if parameter.dtype not in dtypes:
            raise ValueError(
                f"{path}.{name} has dtype {parameter.dtype}. Expected unquantized weights in one of "
                f"{', '.join(map(str, dtypes))}. Load the checkpoint with load_quantized, which keeps quantized "
                "experts as they are, or load it in 16 bits."
            )


def check_not_sharded(experts: nn.Module, path: str) -> None:
    """Rejects experts that are sharded over processes.

    Raises:
        ValueError: a parameter or the experts are sharded over processes.
    """
    path, engine = path.removesuffix(".base_layer"), engine_of(experts)
    if engine == ZERO3:  # even if gathered: DeepSpeed would not manage parameters that are added
        raise ValueError(
            f"{path} is sharded over processes by {ZERO3}, but experts cannot be quantized or adapted in parts. Load "
            "the model with quantization_config=MoeQuantizationConfig(), which exempts experts from zero.Init, and "
            "add all adapters before you pass it to DeepSpeed."
        )
    if engine is not None or getattr(experts, "_is_expert_parallel", False):
        raise ValueError(f"{path} is sharded over processes; {SHARD_LATER}")


def refuse_unsupported(model: nn.Module) -> None:
    """Rejects models with unsupported routed experts.

    Raises:
        ValueError: the error names the first unsupported module, its class and the reason.
    """
    for path, module in model.named_modules():
        name = type(module).__name__
        if name.startswith("Liger") and name.endswith("Experts") and architecture_of(module) is None:
            raise ValueError(
                f"{path} is of class {name}, with which Liger has replaced the model's own class in this process, and "
                f"whose layout is unknown. Start a new process and disable Liger for experts: {WITHOUT_LIGER}."
            )
        if name in UNSUPPORTED_CLASSES and name not in ALWAYS_ON_CLASSES:
            raise ValueError(
                f"{path} is of class {name}, which is not supported: {UNSUPPORTED_CLASSES[name]}. Train the other "
                "layers of this model with PEFT's LoraConfig."
            )
