"""The configuration of a MoE-QLoRA adapter: PEFT's `LoraConfig` plus what concerns experts."""

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
"""As a target name: every routed experts module, whatever its path."""


class MoeQLoraPeftType(str, enum.Enum):
    """The adapter's type in `adapter_config.json`. A type of our own: an enum that has members can't be extended."""

    MOE_QLORA = "MOE_QLORA"


@dataclass(frozen=True)
class StoredAdapter:
    """The adapter file beside a config, and what of the config its shapes follow from.

    Args:
        shapes: key -> shape of the tensors.
        expert_r: rank of the experts' factors.
        rank_pattern: the exceptions from it.
        reach: the options that decide which layers are adapted.
    """

    shapes: dict[str, tuple[int, ...]]
    expert_r: int
    rank_pattern: dict[str, int]
    reach: tuple[Any, ...]

    @classmethod
    def beside(cls, config: MoeQLoraConfig, shapes: dict[str, tuple[int, ...]]) -> StoredAdapter:
        return cls(shapes, config.resolved_expert_r, dict(config.rank_pattern), _reach(config))

    def belongs_to(self, config: MoeQLoraConfig) -> bool:
        """Whether the config still is the one of the file: someone may have read it to start from."""
        return (self.expert_r, self.rank_pattern) == (config.resolved_expert_r, config.rank_pattern)

    def has_layers_of(self, config: MoeQLoraConfig) -> bool:
        """Whether the config, its targets not yet resolved, still names the layers of the file."""
        return self.reach == _reach(config)


def _reach(config: MoeQLoraConfig) -> tuple[Any, ...]:
    options = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    return tuple(copy.copy(getattr(config, name)) for name in options)


@dataclass
class MoeQLoraConfig(LoraConfig):
    """Config of LoRA on the fused experts of a MoE model, quantized to 4 bits or another format, and on linear layers.

    Every option of `LoraConfig` either applies to experts as it does to linear layers, or is rejected.

    Args:
        target_modules: what to adapt. Default: the routed experts of every layer and nothing else. A list may name
            linear layers, experts modules (`"experts"` for all), projections of them (`"experts.gate_up_proj"`,
            `"experts.down_proj"`; `"experts.up_proj"` where the class has no gate), or use the names from when each
            expert was a module (`"gate_proj"`, `"up_proj"`, `"down_proj"`, `"w1"`, `"w2"`, `"w3"`). `"all-linear"` is
            every linear layer and the experts, routers and layers that LoRA can't train (`UNADAPTABLE`) excepted.
            Names that match nothing raise an error. Once an adapter is created, the config names projections by their
            paths.
        expert_r: rank of the factors of each expert. Default: `r`. Experts are many: for one projection a rank costs
            `num_experts * (in_features + out_features)` parameters, so that rank 16 on all experts of a 30B-A3B model
            is 629 million parameters; `max(1, r // experts_per_token)` gives a token about as many active ones as rank
            `r` gives a dense layer of the same width.
        expert_alpha: numerator of the experts' scaling, which is `expert_alpha / expert_r`, or
            `expert_alpha / sqrt(expert_r)` with `use_rslora`. Default: so that the scaling equals the linear layers'.
        storage: format of the experts of the whole model, adapted or not, by its name, such as `"fp8/128x128"`.
            Default: what the next three say, or for a model that was loaded in a format that they can't say, that.
        quant_type: the 4-bit format of the experts: `"nf4"`, `"fp4"`, or None to leave them in 16 bits.
        blocksize: number of weights that share a scale; 64 is the block size of QLoRA.
        double_quant: store the scales in 8 bits, 0.37 bits a weight less at block size 64.
        rank_pattern, alpha_pattern: of linear layers and of projections of experts, by path, such as
            `"layers.3.mlp.experts.down_proj"`.
        base: what the adapter was trained on (`BaseIdentity`); set by this package when the adapter is created.
        format_version: of the adapter file; set by this package.

    Raises:
        ValueError: an option can't be honoured for experts, has no such value, or comes from a later version.
    """

    expert_r: int | None = field(default=None, metadata={"help": "Rank of each expert's factors. Default: r."})
    expert_alpha: float | None = field(
        default=None, metadata={"help": "Alpha of the experts. Default: such that their scaling is that of r."}
    )
    storage: str | None = field(
        default=None, metadata={"help": "Format of the experts, such as 'fp8/128x128', instead of quant_type."}
    )
    quant_type: str | None = field(
        default="nf4", metadata={"help": "Storage of the experts: 'nf4', 'fp4', or None to leave them in 16 bits."}
    )
    blocksize: int = field(default=64, metadata={"help": "Weights of an expert that share a scale."})
    double_quant: bool = field(default=False, metadata={"help": "Store the scales in 8 bits."})
    base: dict | None = field(default=None, metadata={"help": "What the adapter was trained on; set when created."})
    format_version: int = field(default=FORMAT_VERSION, metadata={"help": "Version of the adapter file."})

    stored: ClassVar[StoredAdapter | None] = None
    """What stands beside the file that the config was read from; set on instances, never saved."""

    is_read: ClassVar[bool] = False
    """Whether `base` comes from a file; set on instances, never saved."""

    def __post_init__(self) -> None:
        self._check_values()
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter has format_version {self.format_version}; this peft-moe-qlora reads up to "
                f"{FORMAT_VERSION}. Upgrade peft-moe-qlora."
            )
        if self.storage is not None:
            self.set_format(self.format)
        check_honoured(vars(self))
        super().__post_init__()
        self.peft_type = MoeQLoraPeftType.MOE_QLORA

    def _check_values(self) -> None:
        """Refuses what would fail, or mean something else, when layers are made: the experts are converted by then."""
        can_be_none = {"quant_type", *(one.name for one in fields(self) if one.default is None)}
        known = values_of("lora", "own")
        for name in (*names_of(matches=True), *names_of(owner="own"), "lora_dropout", "bias"):
            value = getattr(self, name)
            if value is None and name in can_be_none:
                continue
            if not known[name].include(list(value) if isinstance(value, (set, tuple)) else value):
                raise ValueError(f"{name}={shown(value)}: {known[name].expected} was expected.")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; where an adapter lies beside it, its README says how that is loaded.

        Raises:
            ValueError: the adapter beside it was just saved as a pickle (`safe_serialization=False`), or has empty
                tensors.
        """
        refuse_pickled_just_saved(Path(save_directory))
        refuse_parts_just_saved(Path(save_directory))
        super().save_pretrained(save_directory, **kwargs)
        if Path(save_directory, SAFETENSORS_WEIGHTS_NAME).is_file():
            add_loading(save_directory, self.base_model_name_or_path, self.format_version)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs):
        """As PEFT's, and remembers the shapes in a local adapter file, to be checked before a model is changed.

        Raises:
            ValueError: the config has what experts can't honour, or no target_modules; the tensors beside it, on the
                hub too, are pickled, or their file is cut off. The error names the file.
        """
        try:
            config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        except ValueError as error:
            raise ValueError(f"The config of {pretrained_model_name_or_path}: {error}") from error
        if config.target_modules is None:
            raise ValueError(
                f"The config of {pretrained_model_name_or_path} has no target_modules; those of a saved adapter are "
                f"written out. {REMEDY}"
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
        """How the experts are stored, None for 16 bits."""
        return format_of(self.storage, self.quant_type, self.blocksize, self.double_quant)

    def set_format(self, found: Format | None) -> None:
        """Asks for a format, None for 16 bits."""
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
        """A copy with the experts' rank and alpha in the place of `r` and `lora_alpha`, as PEFT reads them."""
        config = copy.copy(self)
        config.r, config.lora_alpha = self.resolved_expert_r, self.resolved_expert_alpha
        return config

    def scaling(self, r: int, alpha: float) -> float:
        """The factor of `B @ A` (rsLoRA: arXiv:2312.03732)."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def rank_and_alpha(config: LoraConfig, *names: str) -> tuple[int, float]:
    """Rank and alpha of a layer, as PEFT settles them.

    Args:
        config: with the patterns; for a projection of experts, `MoeQLoraConfig.of_experts()`.
        names: all that the layer may be called in them; the first counts that a pattern matches.
    """
    return _by_pattern(config.rank_pattern, names, config.r), _by_pattern(
        config.alpha_pattern, names, config.lora_alpha
    )


def _by_pattern(pattern: dict[str, float], names: tuple[str, ...], default: float) -> float:
    keys = (get_pattern_key(pattern.keys(), name) for name in names)
    return next((pattern[key] for key in keys if key in pattern), default)
