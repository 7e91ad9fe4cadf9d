"""An adapter from another tool, while it is read: what was found, what its config says, how it becomes one of ours."""

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
"""Which index of the columns of a fused lora_B runs fastest."""
QUANT_TYPE_NAMES = (*QUANT_TYPES, "none")
"""The storages of experts that a converted adapter can ask for."""

# after training these say no more than how the factors began; others leave a changed base behind
_FINISHED_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class ReadOptions:
    """Information that adapter files of other tools lack, or do not always have.

    Args:
        quant_type: storage of the experts that the result asks for: `"nf4"`, `"fp4"` or `"none"`. Default: `"nf4"`, or
            what the function says that reads. An adapter of this package has it in its config.
        written_by: the PEFT that made an adapter on fused parameters, such as `"peft==0.18.1"`, in place of the
            `peft_version` of its config. The orientation of the factors follows from it.
        lora_b_order: which index of `lora_B`'s columns runs fastest, `"experts-fastest"` (PEFT) or `"experts-slowest"`
            (unsloth before 2026.9.6), where the config doesn't say it.
        partial: take layers that the config asks for and the file lacks as not adapted, instead of refusing it.

    Raises:
        ValueError: an option has no such value.
    """

    quant_type: str | None = None
    written_by: str | None = None
    lora_b_order: str | None = None
    partial: bool = False

    def __post_init__(self) -> None:
        if self.quant_type not in (None, *QUANT_TYPE_NAMES):
            raise ValueError(f"quant_type={self.quant_type!r} is unknown; choose one of {QUANT_TYPE_NAMES}.")
        if self.lora_b_order not in (None, *LORA_B_ORDERS):
            raise ValueError(f"lora_b_order={self.lora_b_order!r} is unknown; choose one of {LORA_B_ORDERS}.")
        if self.written_by is not None and self.peft_version is None:
            raise ValueError(f"written_by={self.written_by!r}: 'peft==' and a version were expected.")

    @property
    def peft_version(self) -> Version | None:
        name, _, version = (self.written_by or "").partition("==")
        try:
            return Version(version) if name == "peft" else None
        except InvalidVersion:
            return None


def check_lora_options(file: Path, options: Mapping[str, Any]) -> None:
    """As `check_saved`, of a config of PEFT's LoRA; null is left out where readers don't need the option."""
    known, needed = values_of("lora", "unsloth"), ("lora_alpha", "r")
    check_saved(file, options, known, needed, known.keys() - set(needed))
    if not options.get("target_modules") and not options.get("target_parameters"):
        raise ValueError(
            f"{file}: target_modules={shown(options.get('target_modules'))} without target_parameters; "
            f"{TARGETS.expected} was expected. {REMEDY}"
        )


@dataclass(frozen=True)
class ForeignAdapter:
    """An adapter from another tool.

    Args:
        file: with the tensors.
        options: its adapter_config.json, in PEFT's terms.
        tensors: key without PEFT's prefix -> tensor.
        base: what it belongs to.
        reading: what the file doesn't say.
    """

    file: Path
    options: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    base: BaseModel
    reading: ReadOptions

    @cached_property
    def config(self) -> LoraConfig:
        """What of the config decides which layers are adapted, with what rank.

        Raises:
            ValueError: the config has options that experts can't honour.
        """
        options = self.options
        init = options.get("init_lora_weights", True)
        if init not in _FINISHED_INITS:
            raise ValueError(
                f"{self.file.parent}: an adapter with init_lora_weights={init!r} belongs to a base whose weights were "
                "changed at the start, which the file doesn't hold. Save it converted, with PEFT's "
                "path_initial_model_for_weight_conversion."
            )
        if options.get("bias", "none") != "none":
            raise ValueError(
                f"{self.file.parent}: bias={options['bias']!r} trains biases, which are not carried over. Merge it."
            )
        known = {field.name for field in fields(MoeQLoraConfig)} | {"num_layers", *names_of(owner="unsloth")}
        unknown = sorted(name for name, value in options.items() if value and name not in known)
        if unknown:
            warnings.warn(
                f"{self.file.parent}: options {unknown} of its config are not known and left out.", stacklevel=2
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
        """Whether the config's `target_modules` reaches a module of that name, in the model or in a checkpoint."""
        return is_all_linear(self.config) or _reaches(self.config, name)

    def targets_layer(self, name: str) -> bool:
        """Whether `target_modules` reaches a layer of the model, where "all-linear" leaves out embeddings and head."""
        return _reaches(self._config_for_model, name)

    @cached_property
    def _config_for_model(self) -> LoraConfig:
        return _maybe_include_all_linear_layers(replace(self.config), self.base.model)

    def scaling(self, r: int, alpha: float) -> float:
        return alpha / sqrt(r) if self.config.use_rslora else alpha / r

    def factors(self, path: str, projection: str, A: torch.Tensor, B: torch.Tensor, alpha: float) -> ExpertFactors:
        """Factors of a stack, held against the base.

        Raises:
            ValueError: they don't fit.
        """
        layout = self.base.layouts[path]
        self.check_shapes(f"{path}.{projection}", A, B, layout.num_experts, *layout.features(projection))
        r = A.shape[1]
        return ExpertFactors(path, projection, A.contiguous(), B.contiguous(), self.scaling(r, alpha), alpha)

    def check_shapes(
        self, name: str, A: torch.Tensor, B: torch.Tensor, num_experts: int, in_features: int, out_features: int
    ) -> None:
        """Refuses factors of a stack, or of a part of one, that are not `(E, r, in)` and `(E, out, r)` of the base."""
        r = A.shape[1]
        expected = (num_experts, r, in_features), (num_experts, out_features, r)
        if (tuple(A.shape), tuple(B.shape)) != expected:
            raise ValueError(
                f"{self.file}: the factors of {name} come to {list(A.shape)} and {list(B.shape)}; "
                f"{self.base.directory} wants {list(expected[0])} and {list(expected[1])}. They are transposed, or of "
                "another base."
            )

    def check_rank(self, name: str, found: int, expected: int) -> None:
        """Refuses tensors of another rank than the config's, from which the scaling would be wrong."""
        if found != expected:
            raise ValueError(
                f"{self.file}: the factors of {name} have rank {found}, but the config says {expected}, from which "
                "the scaling follows. The two don't belong together."
            )

    def check_complete(self, found: Iterable[str], expected: Iterable[str]) -> None:
        """Refuses a file that lacks what its config asks for.

        Raises:
            ValueError: names the first that is missing.
        """
        found = set(found)
        missing = [name for name in expected if name not in found]
        if missing and not self.reading.partial:
            raise ValueError(
                f"{self.file} has no factors of {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''}, "
                "which its config and its other layers ask for. It is damaged, or cut down on purpose: then pass "
                "partial=True (--partial)."
            )

    def adapter(
        self,
        experts: list[ExpertFactors],
        non_expert: dict[str, torch.Tensor],
        of_linear: Callable[[str], tuple[int, float]],
    ) -> AdapterFile:
        """The adapter as one of this package, whose config reaches exactly what has factors.

        Args:
            experts: its stacks.
            non_expert: key under the model's own names -> tensor.
            of_linear: rank and alpha of a linear layer, by its name in the model.

        Raises:
            ValueError: there are no experts, or a tensor fits nothing.
        """
        if not experts:
            raise ValueError(f"{self.file} has no factors of experts that {self.base.directory} has.")
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
            # names in full, so that neither their order nor other layers matter
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
                    f"{self.file}: {name} has rank {r} and alpha {alpha}, which patterns can't say, since another "
                    "layer's name ends in the same way. Give both the same."
                )
        return AdapterFile(config, tuple(experts), non_expert)


def _reaches(config: LoraConfig, name: str) -> bool:
    return bool(config.target_modules) and bool(check_target_module_exists(config, name))


def kind(name: str) -> str:
    """A name without its numbers: layers of one kind have the same."""
    return re.sub(r"\d+", "N", name)
