"""Configurations of a timed training step: an arm with settings, such as `ours+compile+graphs`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ARMS = {
    "ours": "this package: experts and attention in the given storage; attention in NF4 for 4-bit storages",
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
"""Settings that change the numerics, which the plain path of a comparison has too."""


@dataclass(frozen=True)
class Arm:
    """An implementation of the step with settings.

    Args:
        name: name in `ARMS`.
        settings: names in `SETTINGS`, in their order.
        storage: storage of the experts, for `ours`.
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
    def changed_classes(self) -> int:
        """How much of transformers the arm changes for the rest of the process: 0 nothing, 1 the head, 2 more."""
        if self.has("liger") or self.name == "unsloth":
            return 2
        return int(self.has("liger-head"))

    @property
    def is_made_for_one_length(self) -> bool:
        """Whether a model that has run with one length is slower or larger with another."""
        return self.has("compile") or self.has("graphs")

    @property
    def checkpointing(self) -> bool | str:
        """`use_gradient_checkpointing` of `prepare_model_for_training`."""
        return "keep-experts" if self.has("keep-experts") else not self.has("no-checkpointing")

    @property
    def plain(self) -> Arm:
        """The arm without settings that must not change the results."""
        return Arm(self.name, tuple(one for one in self.settings if one in CHANGES_NUMBERS), self.storage)

    @property
    def prepare_options(self) -> dict[str, Any]:
        """Options of `prepare_model_for_training` that are not the default."""
        options: dict[str, Any] = {"use_gradient_checkpointing": self.checkpointing}
        if self.has("reentrant"):
            options["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
        for setting, option in (("compile", "compile_layers"), ("graphs", "cuda_graphs")):
            if self.has(setting):
                options[option] = True
        return options


def parse_arm(text: str, storage: str | None = None) -> Arm:
    """Parses the name of an arm from the command line.

    Args:
        text: name and settings, joined by `+`.
        storage: storage of the experts, for `ours`.

    Raises:
        ValueError: a name or setting is unknown, settings are mutually exclusive, or the arm does not support them.
    """
    name, *given = text.split("+")
    if name not in ARMS:
        raise ValueError(f"{text}: unknown arm {name!r}. Expected one of {', '.join(ARMS)}.")
    for setting in given:
        if setting not in SETTINGS:
            raise ValueError(f"{text}: unknown setting {setting!r}. Expected one of {', '.join(SETTINGS)}.")
    settings = tuple(setting for setting in SETTINGS if setting in given)
    for group in (_EXCLUSIVE, _OF_LIGER):
        exclusive = [setting for setting in settings if setting in group]
        if len(exclusive) > 1:
            raise ValueError(f"{text}: {' and '.join(exclusive)} are mutually exclusive.")
    if not name.startswith("ours"):
        foreign = [setting for setting in settings if setting in _OURS_ONLY]
        if foreign:
            raise ValueError(f"{text}: {', '.join(foreign)} requires an arm of this package.")
    if name.startswith("ours") and "reentrant" in settings and {"compile", "graphs"} & {*settings}:
        raise ValueError(
            f"{text}: reentrant requires torch's checkpointing, which is not used with compiled or captured layers."
        )
    return Arm(name, settings, storage if name == "ours" else None)


@dataclass(frozen=True)
class Plan:
    """Configuration of a model.

    Args:
        shape: name in `models.MODELS`.
        arm: the arm.
        rank: LoRA rank on attention.
        expert_rank: LoRA rank on experts.
        layers: number of layers; None for the model's.
        dtype: dtype of unquantized weights and activations, `bfloat16` or `float32`.
        device: device of the model.
        attention: attention implementation; None for transformers' choice.
        seed: seed of weights and factors.
        noise: relative noise on the initial factors, to measure the effect of rounding on a training.
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
    """Sorts arms by what they change in transformers for the rest of the process, so that later ones change it too.

    Raises:
        ValueError: there are arms with Liger and with unsloth_zoo.
    """
    if any(arm.has(name) for arm in arms for name in _OF_LIGER) and any(arm.name == "unsloth" for arm in arms):
        raise ValueError(
            "Liger and unsloth_zoo both change classes of transformers for the rest of the process. Run them "
            "separately with --json, and use --beside to show the first result in the table of the second run."
        )
    return sorted(arms, key=lambda arm: arm.changed_classes)
