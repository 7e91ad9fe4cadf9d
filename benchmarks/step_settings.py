"""Configurations of a timed training step: an arm and its settings, from a name such as `ours+compile+graphs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ARMS = {
    "ours": "this package: experts and attention in the given storage; attention in NF4 if that is a 4-bit one",
    "ours-bf16": "this package, all weights in 16 bits",
    "attention": "transformers in 16 bits, LoRA on attention alone",
    "peft": "16-bit experts with LoRA by PEFT's target_parameters",
    "unsloth": "experts of unsloth_zoo in NF4, attention in NF4; Qwen3 only",
}

SETTINGS = {
    "compile": "compile each decoder layer",
    "graphs": "capture each decoder layer in CUDA graphs",
    "liger": "Liger's norms, rotary embedding and fused linear cross entropy",
    "liger-head": "Liger's fused linear cross entropy only; the compiler fuses the rest",
    "keep-experts": "selective checkpointing: save the activations of experts, recompute the rest of a layer",
    "no-checkpointing": "save all activations",
    "reentrant": "reentrant checkpointing",
    "bf16-factors": "LoRA factors in the dtype of the model instead of fp32",
}

_OURS_ONLY = ("graphs", "keep-experts")
_EXCLUSIVE = ("keep-experts", "no-checkpointing", "reentrant")
_OF_LIGER = ("liger", "liger-head")

CHANGES_NUMBERS = ("bf16-factors",)
"""Settings with which a model is another, so that the plain path it is compared with has them too."""


@dataclass(frozen=True)
class Arm:
    """What computes a step.

    Args:
        name: of `ARMS`.
        settings: of `SETTINGS`, in their order.
        storage: of the experts, for `ours`.
    """

    name: str
    settings: tuple[str, ...] = ()
    storage: str | None = None

    def __str__(self) -> str:
        return "+".join((self.name, *self.settings))

    def has(self, setting: str) -> bool:
        return setting in self.settings

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")

    @property
    def changes_classes(self) -> bool:
        """Whether it changes classes of transformers for the rest of the process."""
        return self.has("liger") or self.has("liger-head") or self.name == "unsloth"

    @property
    def is_made_for_one_length(self) -> bool:
        """Whether a model that has seen one length would be slower, or larger, with another."""
        return self.has("compile") or self.has("graphs")

    @property
    def checkpointing(self) -> bool | str:
        """`use_gradient_checkpointing` of `prepare_model_for_training`."""
        return "keep-experts" if self.has("keep-experts") else not self.has("no-checkpointing")

    @property
    def plain(self) -> Arm:
        """The same without what must not change the numbers."""
        return Arm(self.name, tuple(one for one in self.settings if one in CHANGES_NUMBERS), self.storage)

    @property
    def prepare_options(self) -> dict[str, Any]:
        """Of `prepare_model_for_training`, those without a default's value left out."""
        options: dict[str, Any] = {"use_gradient_checkpointing": self.checkpointing}
        if self.has("reentrant"):
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
        for setting, option in (("compile", "compile_layers"), ("graphs", "cuda_graphs")):
            if self.has(setting):
                options[option] = True
        return options


def parse_arm(text: str, storage: str | None = None) -> Arm:
    """An arm from its name on the command line.

    Args:
        text: name and settings, joined by `+`.
        storage: of the experts of `ours`.

    Raises:
        ValueError: an unknown name or setting, or settings that exclude each other or that others don't have.
    """
    name, *given = text.split("+")
    if name not in ARMS:
        raise ValueError(f"{text}: {name!r} is no arm; one of {', '.join(ARMS)} was expected.")
    for setting in given:
        if setting not in SETTINGS:
            raise ValueError(f"{text}: {setting!r} is no setting; {', '.join(SETTINGS)} are.")
    settings = tuple(setting for setting in SETTINGS if setting in given)
    for group in (_EXCLUSIVE, _OF_LIGER):
        exclusive = [setting for setting in settings if setting in group]
        if len(exclusive) > 1:
            raise ValueError(f"{text}: {' and '.join(exclusive)} exclude each other.")
    if not name.startswith("ours"):
        foreign = [setting for setting in settings if setting in _OURS_ONLY]
        if foreign:
            raise ValueError(f"{text}: only arms of this package have {', '.join(foreign)}.")
    if name.startswith("ours") and "reentrant" in settings and {"compile", "graphs"} & {*settings}:
        raise ValueError(f"{text}: layers that are compiled or captured are not checkpointed by torch; no reentrant.")
    return Arm(name, settings, storage if name == "ours" else None)


@dataclass(frozen=True)
class Plan:
    """A model to build.

    Args:
        shape: of `models.MODELS`.
        arm: what computes it.
        rank: of LoRA on attention.
        expert_rank: of LoRA on experts.
        layers: how many the model has instead of its own number.
        dtype: of the weights that are not packed, and of activations: `bfloat16` or `float32`.
        device: where.
        attention: implementation that transformers is asked for; None for its choice.
        seed: of weights and factors.
        noise: relative noise on the factors' start, to see what rounding alone does to a training.
    """

    shape: str
    arm: Arm
    rank: int = 16
    expert_rank: int = 16
    layers: int | None = None
    dtype: str = "bfloat16"
    device: str = "cpu"
    attention: str | None = None
    seed: int = field(default=0, compare=False)
    noise: float = 0.0


def in_order(arms: list[Arm]) -> list[Arm]:
    """Those last that change classes of transformers for the rest of the process.

    Raises:
        ValueError: Liger and unsloth_zoo both would.
    """
    if any(arm.has("liger") for arm in arms) and any(arm.name == "unsloth" for arm in arms):
        raise ValueError(
            "Liger and unsloth_zoo both change classes of transformers for the rest of a process. Time them in two "
            "runs with --json, and show the first beside the second with --beside."
        )
    return sorted(arms, key=lambda arm: arm.changes_classes)
