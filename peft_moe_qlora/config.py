"""The configuration of a MoE-QLoRA adapter: PEFT's `LoraConfig` plus options for experts."""

from __future__ import annotations

import copy
import enum
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key

from .options import REMEDY, check_honoured, names_of, shown, values_of
from .quantization import Format, format_of, spelled
from .saved_adapter import (
    add_loading,
    refuse_parts_just_saved,
    refuse_pickled_just_saved,
    refuse_pickled_on_hub,
    stored_shapes,
)

FORMAT_VERSION = 1
"""Version of the adapter file: key names, shapes of the factors, meaning of the config's fields."""

ALL_EXPERTS = "experts"
"""Target name that matches every routed experts module, at any path."""


class MoeQLoraPeftType(str, enum.Enum):
    """The adapter's type in `adapter_config.json`. A separate enum, because an enum with members can't be extended."""

    MOE_QLORA = "MOE_QLORA"


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter file next to a config, and the config's options that determine the shapes in the file.

    Args:
        shapes: key -> shape of each tensor.
        expert_r: rank of the experts' factors.
        rank_pattern: ranks of single layers, as in the config.
        reach: values of the options that determine which layers are adapted.
    """

    shapes: dict[str, tuple[int, ...]]
    expert_r: int
    rank_pattern: dict[str, int]
    reach: tuple[Any, ...]

    @classmethod
    def beside(cls, config: MoeQLoraConfig, shapes: dict[str, tuple[int, ...]]) -> StoredAdapter:
        return cls(shapes, config.resolved_expert_r, dict(config.rank_pattern), _reach(config))

    def belongs_to(self, config: MoeQLoraConfig) -> bool:
        """Whether the config still has the ranks of the file; a user may have changed a config after reading it."""
        return (self.expert_r, self.rank_pattern) == (config.resolved_expert_r, config.rank_pattern)

    def has_layers_of(self, config: MoeQLoraConfig) -> bool:
        """Whether the config still selects the layers of the file. Call it before the targets are resolved."""
        return self.reach == _reach(config)


def _reach(config: MoeQLoraConfig) -> tuple[Any, ...]:
    options = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    return tuple(copy.copy(getattr(config, name)) for name in options)


@dataclass
class MoeQLoraConfig(LoraConfig):
    """Config of LoRA on linear layers and on the fused experts of a MoE model, quantized to 4 bits by default.

    Every option of `LoraConfig` either applies to experts as it does to linear layers, or is rejected.

    Args:
        target_modules: modules to adapt. Default: the routed experts of every layer and nothing else. A list may
            contain linear layers, experts modules (`"experts"` for all), their projections (`"experts.gate_up_proj"`,
            `"experts.down_proj"`; `"experts.up_proj"` if the class has no gate), and the names used in checkpoints
            with one module per expert (`"gate_proj"`, `"up_proj"`, `"down_proj"`, `"w1"`, `"w2"`, `"w3"`).
            `"all-linear"` is every linear layer and all experts, except routers and layers that LoRA can't train
            (`UNADAPTABLE`). Names that match nothing raise an error. When an adapter is created, the projections are
            written to the config with their full paths.
        expert_r: rank of the factors of each expert. Default: `r`. Models have many experts: each rank of a projection
            adds `num_experts * (in_features + out_features)` parameters, so rank 16 on all experts of a 30B-A3B model
            has 629 million parameters. With `max(1, r // experts_per_token)`, a token uses about as many LoRA
            parameters as with rank `r` on a dense layer of the same width.
        expert_alpha: numerator of the experts' scaling, which is `expert_alpha / expert_r`, or
            `expert_alpha / sqrt(expert_r)` with `use_rslora`. Default: the value that gives experts the same scaling
            as linear layers.
        storage: name of the storage format of all experts of the model, adapted or not, such as `"fp8/128x128"`.
            Default: the format given by `quant_type`, `blocksize` and `double_quant`, or the format in which the model
            was loaded if these options cannot express it.
        quant_type: the 4-bit format of the experts: `"nf4"`, `"fp4"`, or None to leave them in 16 bits.
        blocksize: number of weights that share a scale; 64 is the block size of QLoRA.
        double_quant: store the scales in 8 bits, which saves 0.37 bits per weight at block size 64.
        rank_pattern, alpha_pattern: ranks and alphas of single linear layers or projections of experts, by path, such
            as `"layers.3.mlp.experts.down_proj"`.
        base: identity of the base model (`BaseIdentity`); set by this package when the adapter is created.
        format_version: version of the adapter file; set by this package.

    Raises:
        ValueError: an option is not supported for experts, has an invalid value, or was written by a later version.
    """

    expert_r: int | None = field(default=None, metadata={"help": "Rank of each expert's factors. Default: r."})
    expert_alpha: float | None = field(
        default=None, metadata={"help": "Alpha of the experts. Default: gives experts the scaling of linear layers."}
    )
    storage: str | None = field(
        default=None, metadata={"help": "Format of the experts, such as 'fp8/128x128', instead of quant_type."}
    )
    quant_type: str | None = field(
        default="nf4", metadata={"help": "Storage of the experts: 'nf4', 'fp4', or None to leave them in 16 bits."}
    )
    blocksize: int = field(default=64, metadata={"help": "Number of weights of an expert that share a scale."})
    double_quant: bool = field(default=False, metadata={"help": "Store the scales in 8 bits."})
    base: dict | None = field(default=None, metadata={"help": "Identity of the base model; set by this package."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the adapter file."})

    stored: ClassVar[StoredAdapter | None] = None
    """The adapter file next to the config file that was read; set on instances, never saved."""

    is_read: ClassVar[bool] = False
    """Whether the config, including `base`, was read from a file; set on instances, never saved."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format_version {self.format_version}. This version of peft-moe-qlora reads up to "
                f"{FORMAT_VERSION}. Upgrade peft-moe-qlora."
            )
        if self.storage is not None:
            self.set_format(self.format)
        check_honoured(vars(self))
        super().__post_init__()
        self.peft_type = MoeQLoraPeftType.MOE_QLORA

    def _check_values(self) -> None:
        """Rejects values that would otherwise fail, or be misread, after the experts have been converted."""
        can_be_none = {"quant_type", *(one.name for one in fields(self) if one.default is None)}
        known = values_of("lora", "own")
        for name in (*names_of(matches=True), *names_of(owner="own"), "lora_dropout", "bias"):
            value = getattr(self, name)
            if value is None and name in can_be_none:
                continue
            if not known[name].include(list(value) if isinstance(value, (set, tuple)) else value):
                raise ValueError(f"{name}={shown(value)}: expected {known[name].expected}.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the config as PEFT does, and adds loading instructions to the README of an adapter in the directory.

        Raises:
            ValueError: the adapter in the directory was just saved as a pickle (`safe_serialization=False`), or has
                empty tensors.
        """
        refuse_pickled_just_saved(Path(save_directory))
        refuse_parts_just_saved(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        if Path(save_directory, SAFETENSORS_WEIGHTS_NAME).is_file():
            add_loading(save_directory, self.base_model_name_or_path, self.format_version)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """Reads the config as PEFT does, and the shapes in a local adapter file, to check them before a model changes.

        Raises:
            ValueError: the config has an option that is not supported for experts, or no target_modules; or the
                adapter file, local or on the hub, is a pickle or truncated. The error names the file.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            raise ValueError(f"The config of {pretrained_model_name_or_path}: {error}") from error
        if config.target_modules is None:
            raise ValueError(
                f"The config of {pretrained_model_name_or_path} has no target_modules. Expected the list of names "
                f"that every saved adapter contains. {REMEDY}"
            )
        config.is_read = True
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        if directory.is_dir():
            shapes = stored_shapes(directory)
            if shapes is not None:
                config.stored = StoredAdapter.beside(config, shapes)
        else:
            refuse_pickled_on_hub(str(pretrained_model_name_or_path), subfolder, kwargs)
        return config

    @property
    def format(self) -> Format | None:
        """Storage format of the experts, None for 16 bits."""
        return format_of(self.storage, self.quant_type, self.blocksize, self.double_quant)

    def set_format(self, found: Format | None) -> None:
        """Sets the storage format of the experts, None for 16 bits."""
        self.storage, self.quant_type, self.blocksize, self.double_quant = spelled(found)

    @property
    def resolved_expert_r(self) -> int:
        return self.r if self.expert_r is None else self.expert_r

    @property
    def largest_expert_r(self) -> int:
        """The largest rank that a projection of experts may have."""
        return max(self.resolved_expert_r, *self.rank_pattern.values(), 0)

    @property
    def resolved_expert_alpha(self) -> float:
        if self.expert_alpha is not None:
            return self.expert_alpha
        ratio = self.resolved_expert_r / self.r
        return self.lora_alpha * (math.sqrt(ratio) if self.use_rslora else ratio)

    def of_experts(self) -> MoeQLoraConfig:
        """A copy whose `r` and `lora_alpha` are the experts' rank and alpha."""
        config = copy.copy(self)
        config.r, config.lora_alpha = self.resolved_expert_r, self.resolved_expert_alpha
        return config

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of `B @ A` (rsLoRA: arXiv:2312.03732)."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def rank_and_alpha(config: LoraConfig, *names: str) -> tuple[int, float]:
    """Rank and alpha of a layer, resolved as in PEFT.

    Args:
        config: config with the patterns; for a projection of experts, `MoeQLoraConfig.of_experts()`.
        names: names that patterns may use for the layer; the first one matched by a pattern counts.
    """
    return _by_pattern(config.rank_pattern, names, config.r), _by_pattern(
        config.alpha_pattern, names, config.lora_alpha
    )


def _by_pattern(pattern: dict[str, float], names: tuple[str, ...], default: float) -> float:
    keys = (get_pattern_key(pattern.keys(), name) for name in names)
    return next((pattern[key] for key in keys if key in pattern), default)
