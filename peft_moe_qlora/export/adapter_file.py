"""A saved adapter as plain data: the factors of experts, and everything else as PEFT names it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn

from ..config import MoeQLoraConfig, MoeQLoraPeftType
from ..targets import resolve_rank_and_alpha, targeted_projections
from .base_model import BaseModel

PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"
_FACTOR = re.compile(r"(?P<path>.*)\.lora_(?P<projection>gate_up_proj|up_proj|down_proj)_(?P<factor>[AB])")


@dataclass(frozen=True)
class ExpertFactors:
    """What an adapter adds to one stack: `scaling * B[e] @ A[e]`.

    Args:
        path: of the experts module.
        projection: name of the stack.
        A: `(E, r, in)`.
        B: `(E, out, r)`.
        scaling: of the product.
        alpha: that gives the scaling at this rank.
    """

    path: str
    projection: str
    A: torch.Tensor
    B: torch.Tensor
    scaling: float
    alpha: float

    @property
    def r(self) -> int:
        return self.A.shape[1]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.projection}"


@dataclass(frozen=True)
class AdapterFile:
    """A saved adapter.

    Args:
        config: as saved.
        experts: the factors of all adapted stacks; of one module, those of its first projection first.
        others: key without PEFT's prefix -> tensor, of linear layers and whatever else was saved.
    """

    config: MoeQLoraConfig
    experts: tuple[ExpertFactors, ...]
    others: dict[str, torch.Tensor]

    def check_complete(self, base: BaseModel) -> None:
        """Makes sure that a base has what the adapter adapts, and the adapter all that its config promises.

        Raises:
            ValueError: names the first layer that is missing on either side, or has another size.
        """
        found = {one.name: one for one in self.experts}
        for path, layout in base.layouts.items():
            for projection in targeted_projections(self.config, path, layout):
                factors = found.pop(f"{path}.{projection}", None)
                if factors is None:
                    raise ValueError(
                        f"The adapter has no factors of {path}.{projection}, which its config targets. The file is "
                        f"incomplete, or {base.directory} isn't its base."
                    )
                in_features, out_features = layout.features(projection)
                expected = (layout.num_experts, factors.r, in_features), (layout.num_experts, out_features, factors.r)
                if (factors.A.shape, factors.B.shape) != expected:
                    raise ValueError(
                        f"{factors.name} has factors {list(factors.A.shape)} and {list(factors.B.shape)}, but "
                        f"{base.directory} has {layout.num_experts} experts with {in_features} features in and "
                        f"{out_features} out."
                    )
        if found:
            raise ValueError(
                f"The adapter has factors of {next(iter(found))}, which is no stack of {base.directory}, or none that "
                "the adapter's config targets."
            )
        adapted = {key.removesuffix(A_SUFFIX) for key in self.others if key.endswith(A_SUFFIX)}
        for name, module in base.model.named_modules():
            is_target = isinstance(module, nn.Linear) and check_target_module_exists(self.config, name)
            if is_target and name not in adapted and not any(f"{parent}." in name for parent in base.layouts):
                raise ValueError(
                    f"The adapter has no factors of {name}, which its config targets. The file is incomplete, or "
                    f"{base.directory} isn't its base."
                )


def read_adapter(directory: str | Path) -> AdapterFile:
    """Reads an adapter that `PeftModel.save_pretrained` has written.

    Raises:
        ValueError: the directory holds no MoE-QLoRA adapter, or one that is cut off, lacks a tensor, or has values
            that are not finite or shapes that don't fit each other. The error names the file and the key.
    """
    file, config_file = Path(directory, SAFETENSORS_WEIGHTS_NAME), Path(directory, CONFIG_NAME)
    if not config_file.is_file():
        raise ValueError(f"{directory} has no {CONFIG_NAME}; a saved adapter was expected.")
    found_type = json.loads(config_file.read_text()).get("peft_type")
    if found_type != MoeQLoraPeftType.MOE_QLORA.value:
        raise ValueError(
            f"{directory} holds an adapter of type {found_type}; {MoeQLoraPeftType.MOE_QLORA.value} was expected."
        )
    config = MoeQLoraConfig.from_pretrained(str(directory))
    if not file.is_file():
        raise ValueError(f"{directory} has no {file.name} beside {CONFIG_NAME}; a saved adapter was expected.")
    tensors = load_file(file)
    factors: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    others = {}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {key} has values that are not finite; the adapter is broken.")
        name = key.removeprefix(PREFIX)
        if name.endswith(".base_layer.weight"):
            continue  # PEFT's copy of a frozen embedding or head
        match = _FACTOR.fullmatch(name)
        if match is None:
            others[name] = tensor
        else:
            factors.setdefault((match["path"], match["projection"]), {})[match["factor"]] = tensor
    for own, other in ((A_SUFFIX, B_SUFFIX), (B_SUFFIX, A_SUFFIX)):
        for key in others:
            if key.endswith(own) and key.removesuffix(own) + other not in others:
                raise ValueError(f"{file} has {key}, but not {key.removesuffix(own)}{other}; it is damaged.")
    experts = [_factors(file, config, *at, found) for at, found in factors.items()]
    # the first projection of a module is the one that isn't down_proj
    experts.sort(key=lambda one: (one.path, one.projection == "down_proj"))
    if not experts:
        raise ValueError(f"{file} has no factors of experts; PEFT's own LoRA does for an adapter of linear layers.")
    return AdapterFile(config, tuple(experts), others)


def _factors(
    file: Path, config: MoeQLoraConfig, path: str, projection: str, found: dict[str, torch.Tensor]
) -> ExpertFactors:
    r, alpha = resolve_rank_and_alpha(config, path, projection)
    name = f"{path}.lora_{projection}"
    if found.keys() != {"A", "B"}:
        raise ValueError(f"{file} has {name}_{next(iter(found))}, but not the other factor of {path}.{projection}.")
    A, B = found["A"], found["B"]
    if A.dim() != 3 or B.dim() != 3 or A.shape[:2] != (B.shape[0], r) or B.shape[2] != r:
        raise ValueError(
            f"{file}: {name}_A {list(A.shape)} and {name}_B {list(B.shape)} are not (E, r, in) and (E, out, r) of "
            f"rank {r}, which the config has for {path}.{projection}."
        )
    return ExpertFactors(path, projection, A, B, config.scaling(r, alpha), alpha)


def linear_scaling(config: MoeQLoraConfig, name: str) -> float:
    """The factor of `B @ A` of a linear layer."""
    return config.scaling(*linear_rank_and_alpha(config, name))


def linear_rank_and_alpha(config: MoeQLoraConfig, name: str) -> tuple[int, float]:
    """Rank and alpha of a linear layer, as PEFT settles them."""
    r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
    return r, config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
