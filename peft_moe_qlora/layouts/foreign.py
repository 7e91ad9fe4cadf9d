"""An adapter from another tool while it is read: its tensors, its config, and its conversion to this package's."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

from ..config import MoeQLoraConfig, rank_and_alpha
from ..options import REMEDY, TARGETS, check_honoured, check_saved, names_of, shown, values_of
from ..quantization import QUANT_TYPES
from ..targets import is_all_linear
from .adapter_file import AdapterFile, ExpertFactors
from .base_model import BaseModel
from .check_non_expert import check_non_expert
from .non_expert import adapted_layers, factor_pairs

LORA_B_ORDERS = ("experts-fastest", "experts-slowest")
"""Which index varies fastest along the columns of a fused lora_B."""
QUANT_TYPE_NAMES = (*QUANT_TYPES, "none")
"""The expert storages that a converted adapter can specify."""

# these only affect the initial factors; other initializations change the base weights
_FINISHED_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class ReadOptions:
    """Information that adapter files of other tools lack, or do not always have.

    Args:
        quant_type: storage of the experts in the resulting config: `"nf4"`, `"fp4"` or `"none"`. Default: `"nf4"`, or
            the default of the calling function. Adapters of this package have it in their config.
        written_by: the PEFT version that wrote an adapter on fused parameters, such as `"peft==0.18.1"`. Overrides
            `peft_version` of its config. It determines the orientation of the factors.
        lora_b_order: which index varies fastest along the columns of `lora_B`, `"experts-fastest"` (PEFT) or
            `"experts-slowest"` (unsloth before 2026.9.6), if the config does not specify it.
        partial: treat layers that the config targets and the file lacks as not adapted, instead of raising an error.

    Raises:
        ValueError: an option has an unknown value.
    """

    quant_type: str | None = None
    written_by: str | None = None
    lora_b_order: str | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in (None, *QUANT_TYPE_NAMES):
            raise ValueError(f"quant_type={self.quant_type!r} is unknown. Choose one of {QUANT_TYPE_NAMES}.")
        if self.lora_b_order not in (None, *LORA_B_ORDERS):
            raise ValueError(f"lora_b_order={self.lora_b_order!r} is unknown. Choose one of {LORA_B_ORDERS}.")
        if self.written_by is not None and self.peft_version is None:
            raise ValueError(f"written_by={self.written_by!r} is unknown. Expected 'peft==' followed by a version.")

    @property
    def peft_version(self) -> Version | None:
        name, _, version = (self.written_by or "").partition("==")
        try:
            return Version(version) if name == "peft" else None
        except InvalidVersion:
            return None


def check_lora_options(file: Path, options: Mapping[str, Any]) -> None:
    """Like `check_saved`, for a config of PEFT's LoRA; null counts as absent unless readers require the option."""
    known, needed = values_of("lora", "unsloth"), ("lora_alpha", "r")
    check_saved(file, options, known, needed, known.keys() - set(needed))
    if not options.get("target_modules") and not options.get("target_parameters"):
        raise ValueError(
            f"{file}: target_modules={shown(options.get('target_modules'))}, and target_parameters is not set. "
            f"Expected {TARGETS.expected}. {REMEDY}"
        )


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter from another tool.

    Args:
        file: path of the tensor file.
        options: contents of its adapter_config.json, in PEFT's terms.
        tensors: key without PEFT's prefix -> tensor.
        base: the adapter's base model.
        reading: information that the files lack.
    """

    file: Path
    options: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    base: BaseModel
    reading: ReadOptions

    @cached_property
    def config(self) -> LoraConfig:
        """The part of the config that determines which layers are adapted, and their ranks.

        Raises:
            ValueError: the config has options that are not supported for experts.
        """
        options = self.options
        init = options.get("init_lora_weights", True)
        if init not in _FINISHED_INITS:
            raise ValueError(
                f"{self.file.parent}: init_lora_weights={init!r} changed the weights of the base model before "
                "training, and the adapter does not store them. Save the adapter with PEFT's "
                "path_initial_model_for_weight_conversion."
            )
        if options.get("bias", "none") != "none":
            raise ValueError(
                f"{self.file.parent}: the adapter was trained with bias={options['bias']!r}, and trained biases are "
                "not supported here. Merge the adapter with the tool that trained it instead."
            )
        known = {field.name for field in fields(MoeQLoraConfig)} | {"num_layers", *names_of(owner="unsloth")}
        unknown = sorted(name for name, value in options.items() if value and name not in known)
        if unknown:
            warnings.warn(
                f"{self.file.parent}: ignoring unknown options {unknown} of the adapter's config.", stacklevel=2
            )
        read_or_finished = ("target_parameters", *names_of(at_start=True))
        try:
            check_honoured({name: value for name, value in options.items() if name not in read_or_finished})
            return LoraConfig(
                **{name: options[name] for name in names_of(matches=True) if options.get(name) is not None}
            )
        except ValueError as error:
            raise ValueError(f"{self.file.parent}: {error}") from error

    def targets(self, name: str) -> bool:
        """Whether the config's `target_modules` matches a module name of the model or of a checkpoint."""
        return is_all_linear(self.config) or _reaches(self.config, name)

    def targets_layer(self, name: str) -> bool:
        """Whether `target_modules` matches a layer of the model; "all-linear" excludes embeddings and head."""
        return _reaches(self._config_for_model, name)

    @cached_property
    def _config_for_model(self) -> LoraConfig:
        return _maybe_include_all_linear_layers(replace(self.config), self.base.model)

    def scaling(self, r: int, alpha: float) -> float:
        return alpha / sqrt(r) if self.config.use_rslora else alpha / r

    def factors(self, path: str, projection: str, A: torch.Tensor, B: torch.Tensor, alpha: float) -> ExpertFactors:
        """Factors of a stack, checked against the base.

        Raises:
            ValueError: the factors do not fit the base.
        """
        layout = self.base.layouts[path]
        self.check_shapes(f"{path}.{projection}", A, B, layout.num_experts, *layout.features(projection))
        r = A.shape[1]
        return ExpertFactors(path, projection, A.contiguous(), B.contiguous(), self.scaling(r, alpha), alpha)

    def check_shapes(
        self, name: str, A: torch.Tensor, B: torch.Tensor, num_experts: int, in_features: int, out_features: int
    ) -> None:
        """Rejects factors of a stack, or of half of one, that are not `(E, r, in)` and `(E, out, r)` of the base."""
        r = A.shape[1]
        expected = (num_experts, r, in_features), (num_experts, out_features, r)
        if (tuple(A.shape), tuple(B.shape)) != expected:
            raise ValueError(
                f"{self.file}: the factors of {name} have shapes {list(A.shape)} and {list(B.shape)} over all "
                f"experts. Expected {list(expected[0])} and {list(expected[1])} for {self.base.directory}. The "
                "factors are transposed or belong to another base model. Use the adapter's own base model."
            )

    def check_rank(self, name: str, found: int, expected: int) -> None:
        """Rejects factors whose rank differs from the config's, which would result in a wrong scaling."""
        if found != expected:
            raise ValueError(
                f"{self.file}: the factors of {name} have rank {found}, but the config, which determines the scaling, "
                f"has rank {expected}. The file and the config belong to different adapters. Save the adapter again."
            )

    def check_complete(self, found: Iterable[str], expected: Iterable[str]) -> None:
        """Rejects a file that lacks layers which its config targets.

        Raises:
            ValueError: a layer is missing; the error names the first.
        """
        found = set(found)
        missing = [name for name in expected if name not in found]
        if missing and not self.reading.partial:
            raise ValueError(
                f"{self.file} contains no factors of {missing[0]}"
                f"{f' and {len(missing) - 1} more' if missing[1:] else ''}, which its config targets. The file is "
                "damaged. If layers were removed on purpose, pass partial=True (--partial)."
            )

    def adapter(
        self,
        experts: list[ExpertFactors],
        non_expert: dict[str, torch.Tensor],
        of_linear: Callable[[str], tuple[int, float]],
    ) -> AdapterFile:
        """Converts to an adapter of this package, whose config targets exactly the layers that have factors.

        Args:
            experts: the factors of its stacks.
            non_expert: key under the model's own names -> tensor.
            of_linear: returns rank and alpha of a linear layer, given its name in the model.

        Raises:
            ValueError: there are no factors of experts, or a tensor fits no layer.
        """
        if not experts:
            raise ValueError(
                f"{self.file} contains no factors of experts of {self.base.directory}. Pass the adapter's own base "
                "model as base (--base)."
            )
        non_expert = {key: tensor for key, tensor in non_expert.items() if not key.endswith(".base_layer.weight")}
        check_non_expert(self.file, self.config, non_expert, self.base)
        linear = {name: of_linear(name) for name in adapted_layers(non_expert)}
        for pair in factor_pairs(non_expert):
            self.check_rank(pair.name, pair.A.shape[0], linear[pair.name][0])
        stacks = {factors.name: (factors.r, factors.alpha) for factors in experts}
        (expert_r, expert_alpha), _ = Counter(stacks.values()).most_common(1)[0]
        r, alpha = self.config.r, self.config.lora_alpha
        usual = dict.fromkeys(linear, (r, alpha)) | dict.fromkeys(stacks, (expert_r, expert_alpha))
        settled = linear | stacks
        config = MoeQLoraConfig(
            **{name: self.options[name] for name in names_of(is_carried=True) if self.options.get(name) is not None},
            r=r,
            lora_alpha=alpha,
            expert_r=None if expert_r == r else expert_r,
            expert_alpha=None if (expert_r, expert_alpha) == (r, alpha) else expert_alpha,
            # full names, so that neither their order nor other layers matter
            rank_pattern={name: one[0] for name, one in settled.items() if one[0] != usual[name][0]},
            alpha_pattern={name: one[1] for name, one in settled.items() if one[1] != usual[name][1]},
            target_modules=sorted(settled),
            quant_type=None if self.reading.quant_type == "none" else self.reading.quant_type,
            inference_mode=True,
        )
        resolved = {name: rank_and_alpha(config, name) for name in linear}
        resolved |= {one.name: rank_and_alpha(config.of_experts(), one.name) for one in experts}
        for name, (r, alpha) in settled.items():
            if resolved[name] != (r, alpha):
                raise ValueError(
                    f"{self.file}: {name} has rank {r} and alpha {alpha}, but rank_pattern and alpha_pattern also "
                    "match another layer whose name ends in the same way. Use the same rank and alpha for both layers."
                )
        return AdapterFile(config, tuple(experts), non_expert)


def _reaches(config: LoraConfig, name: str) -> bool:
    return bool(config.target_modules) and bool(check_target_module_exists(config, name))


def kind(name: str) -> str:
    """A name with its numbers replaced, which is the same for layers of the same kind."""
    return re.sub(r"\d+", "N", name)
