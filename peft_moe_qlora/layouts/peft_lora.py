"""PEFT's own LoRA on fused parameters (`target_parameters`): reads all versions, writes that of 0.19.1 and later.

`peft.tuners.lora.layer.ParamWrapper`, peft 0.17 to 0.21: the parameters of a module are wrapped in their order. The
last one has the keys `PATH.lora_A.weight`, the one before `PATH.base_layer.lora_A.weight`. lora_A is `(E * r, a)`
with the expert index varying slowest, lora_B `(b, r * E)` with the expert index varying fastest. For a stack
`(E, d1, d2)`, (a, b) is

- up to 0.18: (d1, d2);
- in 0.19.0: (d2, d1) for classes that declare `is_transposed`, else (d1, d2);
- from 0.19.1 on: (d1, d2) for classes that declare `is_transposed`, else (d2, d1).

If a is not the input size, the factors are those of the transposed weight.

Before 2026.9.6, unsloth_zoo trained the same tensors with the expert index varying slowest in lora_B too. Later
versions record the order in adapter_config.json: `lora_B_layout`, and per parameter in `unsloth_fused_expert_lora`,
which may be nested in `auto_mapping`; `auto_mapping.unsloth_fixed` marks files from any version of unsloth.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version
from peft import LoraConfig

from ..config import rank_and_alpha
from ..experts import ExpertsLayout
from ..options import names_of
from .adapter_file import AdapterFile, ExpertFactors, InMemory, save_config, save_tensors
from .base_model import BaseModel
from .check_non_expert import check_targeted
from .foreign import LORA_B_ORDERS, ForeignAdapter
from .gate_up_halves import under_own_names
from .non_expert import A_SUFFIX, B_SUFFIX, EMBEDDING_A, EMBEDDING_B, adapted_layers

_ORDER_OF_MARKER = {"rank_major": "experts-fastest", "grouped_by_expert": "experts-slowest"}


def read_peft_lora(foreign: ForeignAdapter) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: a tensor is missing, unexpected or of another shape than expected for the base and the version of
            PEFT; or neither file nor options determine the orientation or the order of lora_B.
    """
    parameters = foreign.options.get("target_parameters") or ()
    if isinstance(parameters, str):
        parameters = (parameters,)

    def is_targeted(key: str) -> bool:
        return any(key == name or key.endswith(f".{name}") for name in parameters)

    # PEFT renames keys as transformers renames checkpoint keys
    left, _ = under_own_names(foreign, foreign.tensors)
    experts, found, expected = [], [], []
    for path, layout in foreign.base.layouts.items():
        names = [name for name, _ in foreign.base.model.get_submodule(path).named_parameters(recurse=False)]
        targeted = [name for name in names if is_targeted(f"{path}.{name}")]
        expected += [f"{path}.{name}" for name in targeted]
        flat = _take(foreign, left, path, targeted)
        found += [f"{path}.{name}" for name in flat]
        if not flat:
            continue
        strange = [name for name in targeted if name not in layout.projections]
        if strange:
            raise ValueError(
                f"{foreign.file}: LoRA on {path}.{strange[0]} is not supported. Expected a stack of weights: "
                f"{', '.join(layout.projections)}."
            )
        is_flipped = _is_flipped(foreign, path, layout, flat)
        for name, (A, B) in flat.items():
            r, alpha = rank_and_alpha(foreign.config, f"{path}.{name}")
            foreign.check_rank(f"{path}.{name}", A.shape[0] // layout.num_experts, r)
            A = A.reshape(layout.num_experts, r, -1)
            if _lora_b_order(foreign, path, name, layout.num_experts, r) == "experts-fastest":
                B = B.reshape(-1, r, layout.num_experts).permute(2, 0, 1)
            else:
                B = B.reshape(-1, layout.num_experts, r).permute(1, 0, 2)
            if is_flipped:
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            experts.append(foreign.factors(path, name, A, B, alpha))
    layers = foreign.base.layers()
    as_parameters = [name for name in layers if is_targeted(f"{name}.weight")]
    linear = [name for name in layers if name in as_parameters or foreign.targets_layer(name)]
    with_factors = [name for name in layers if any(key.startswith(f"{name}.lora_") for key in left)]
    foreign.check_complete(found + with_factors, expected + linear)
    check_targeted(foreign.file, with_factors, linear.__contains__)
    return foreign.adapter(
        experts,
        left,
        lambda name: rank_and_alpha(foreign.config, f"{name}.weight" if name in as_parameters else name),
    )


def _take(
    foreign: ForeignAdapter, left: dict[str, torch.Tensor], path: str, targeted: list[str]
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Removes the factors of a module from `left`: projection -> lora_A, lora_B. Empty if there are none."""
    keys = {name: f"{path}{'.base_layer' * depth}" for depth, name in enumerate(reversed(targeted))}
    found = [key for key in left if key.startswith((f"{path}.lora_", f"{path}.base_layer."))]
    if not found:
        return {}
    wanted = [key + suffix for key in keys.values() for suffix in (A_SUFFIX, B_SUFFIX)]
    missing = [key for key in wanted if key not in left]
    strange = [key for key in found if key not in wanted]
    if missing or strange:
        raise ValueError(
            f"{foreign.file} contains {f'no {missing[0]}' if missing else f'the unexpected {strange[0]}'}. Expected "
            f"{wanted or 'no tensors'}, because target_parameters of its config matches {targeted or 'nothing'} of "
            f"{path}. The file is damaged. Save the adapter again."
        )
    return {name: (left.pop(keys[name] + A_SUFFIX), left.pop(keys[name] + B_SUFFIX)) for name in targeted}


def _is_flipped(
    foreign: ForeignAdapter, path: str, layout: ExpertsLayout, flat: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> bool:
    """Whether the factors are those of the transposed weights; shapes and version must agree.

    Raises:
        ValueError: the shapes fit neither orientation, fit another one than the version's, or fit both and the version
            is unknown.
    """
    fitting = {True, False}
    for name, (A, B) in flat.items():
        features = layout.features(name)
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] % layout.num_experts or A.shape[0] != B.shape[1]:
            raise ValueError(
                f"{foreign.file}: the factors of {path}.{name} have shapes {list(A.shape)} and {list(B.shape)}. "
                f"Expected ({layout.num_experts} experts * r, ...) and (..., r * {layout.num_experts})."
            )
        found = (A.shape[1], B.shape[0])
        fitting &= {flipped for flipped in (True, False) if found == (features[::-1] if flipped else features)}
        if not fitting:
            raise ValueError(
                f"{foreign.file}: the factors of {path}.{name} have {found[0]} input and {found[1]} output features. "
                f"Expected {features[0]} and {features[1]} for {foreign.base.directory}. The adapter belongs to "
                "another base model. Use the adapter's own base model."
            )
    by_version = _is_flipped_by_version(foreign, path, layout)
    if by_version is None and len(fitting) == 2:
        raise ValueError(
            f"{foreign.file}: the orientation of the factors of {path} is ambiguous, because its input and output "
            "sizes are equal and the config has no peft_version, or that of a prerelease. Pass the version that wrote "
            "the adapter, for example written_by='peft==0.18.1' (--written-by)."
        )
    if by_version is not None and by_version not in fitting:
        raise ValueError(
            f"{foreign.file}: the factors of {path} are transposed compared to those that PEFT {_version(foreign)} "
            "writes. If another version wrote the adapter, pass it, for example written_by='peft==0.18.1' "
            "(--written-by)."
        )
    return fitting.pop() if by_version is None else by_version


def _is_flipped_by_version(foreign: ForeignAdapter, path: str, layout: ExpertsLayout) -> bool | None:
    version = _version(foreign)
    if version is None:
        return None
    # the attribute of the class, as in PEFT, not this package's layout
    is_declared = bool(getattr(foreign.base.model.get_submodule(path), "is_transposed", False))
    if version < Version("0.19.0"):
        a_is_last = False
    elif version < Version("0.19.1"):
        a_is_last = is_declared
    else:
        a_is_last = not is_declared
    in_is_last = not layout.is_transposed
    return a_is_last != in_is_last


def _version(foreign: ForeignAdapter) -> Version | None:
    """The PEFT version that wrote the adapter; None if unknown, or a prerelease between differing layouts."""
    if foreign.reading.peft_version is not None:
        return foreign.reading.peft_version
    text = foreign.options.get("peft_version")
    if not text:
        return None
    try:
        version = Version(str(text).partition("@")[0])
    except InvalidVersion as error:
        raise ValueError(
            f"{foreign.file.parent}: peft_version={text!r} is not a valid version. Pass the version that wrote the "
            "adapter as written_by (--written-by)."
        ) from error
    is_between = version.is_prerelease and Version("0.18") < version < Version("0.19.1")
    return None if is_between else version


def _lora_b_order(foreign: ForeignAdapter, path: str, projection: str, num_experts: int, r: int) -> str:
    """`"experts-fastest"` or `"experts-slowest"`: from the marker, else from the option, else PEFT's order.

    Raises:
        ValueError: unsloth wrote the file without a marker and the option is not set; or marker and option differ.
    """
    auto_mapping = foreign.options.get("auto_mapping") or {}
    marker = next(
        (found for found in (_marker(of, projection) for of in (foreign.options, auto_mapping)) if found is not None),
        None,
    )
    asked = foreign.reading.lora_b_order
    if marker is not None:
        order = _ORDER_OF_MARKER.get(marker)
        if order is None and asked is None:
            raise ValueError(
                f"{foreign.file.parent}: the config has lora_B_layout={marker!r} for {path}.{projection}. Expected "
                f"one of {tuple(_ORDER_OF_MARKER)}. Set lora_b_order (--lora-b-order) to one of {LORA_B_ORDERS}."
            )
        if None not in (order, asked) and order != asked:
            raise ValueError(
                f"{foreign.file.parent}: lora_b_order={asked!r} contradicts lora_B_layout={marker!r} in the config. "
                "Remove one of them."
            )
        return order or asked
    if asked is not None:
        return asked
    if auto_mapping.get("unsloth_fixed") and num_experts > 1 and r > 1:
        raise ValueError(
            f"{foreign.file}: unsloth wrote this adapter without the order of lora_B. Versions of unsloth_zoo before "
            "2026.9.6 used experts-slowest, unless PEFT's own forward was selected. Set lora_b_order (--lora-b-order) "
            f"to one of {LORA_B_ORDERS}."
        )
    return "experts-fastest"


def _marker(options: dict, projection: str) -> str | None:
    """The order that unsloth recorded for a parameter; None if it recorded none."""
    detail = options.get("unsloth_fused_expert_lora") or {}
    of_parameter = (detail.get("parameters") or {}).get(projection) or {}
    return of_parameter.get("lora_B_layout") or detail.get("lora_B_layout") or options.get("lora_B_layout")


_OLD_NAMES = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""PEFT treats target modules with these endings as experts, including those of dense layers and shared experts."""


def write_peft_lora(adapter: AdapterFile, directory: Path | InMemory, base: BaseModel | None) -> None:
    """Writes an adapter that stock `PeftModel.from_pretrained` loads, without this package.

    Ranks and alphas that differ between layers are written as patterns, so the factors stay unchanged.

    Args:
        adapter: an adapter of this package.
        directory: output directory; created if it does not exist.
        base: the adapter's base model; only required if the layout depends on it.

    Raises:
        ValueError: the adapter has tensors that PEFT's LoRA on parameters does not support, or a layer that PEFT does
            not adapt in this model, or the base is required and None.
    """
    if adapter.config.bias != "none":
        raise ValueError(
            f"The adapter was trained with bias={adapter.config.bias!r}, which PEFT's LoRA on parameters does not "
            "support. Merge the adapter instead."
        )
    _check_non_expert(adapter)
    of_module: dict[str, list[ExpertFactors]] = defaultdict(list)
    for factors in adapter.experts:
        of_module[factors.path].append(factors)
    tensors = {_name_for_peft(key, adapter, base): tensor for key, tensor in adapter.non_expert.items()}
    for path, projections in of_module.items():
        is_mistaken = _is_mistaken(path, adapter, base)
        for depth, factors in enumerate(reversed(projections)):
            segment = ".base_layer" * depth
            A, B = factors.A, factors.B
            if is_mistaken:
                A, B = B.transpose(1, 2), A.transpose(1, 2)
            num_experts, r, in_features = A.shape
            A = A.reshape(num_experts * r, in_features)
            B = B.permute(1, 2, 0).reshape(B.shape[1], r * num_experts)
            tensors[f"{path}{segment}.lora_A.weight"], tensors[f"{path}{segment}.lora_B.weight"] = A, B
    save_tensors(directory, tensors)
    save_config(directory, _config(adapter))


def _config(adapter: AdapterFile) -> LoraConfig:
    config = adapter.config
    linear = sorted(adapted_layers(adapter.non_expert))
    as_parameters = [f"{name}.weight" for name in linear if name.rpartition(".")[2] in _OLD_NAMES]
    settled = {factors.name: (factors.r, factors.alpha) for factors in adapter.experts}
    parameters = [*settled, *as_parameters]
    settled |= {name: rank_and_alpha(config, name.removesuffix(".weight")) for name in (*linear, *as_parameters)}
    # full names instead of the patterns: the first match wins, and PEFT sorts patterns when it saves
    ranks = {name: r for name, (r, _) in settled.items() if r != config.r}
    alphas = {name: alpha for name, (_, alpha) in settled.items() if alpha != config.lora_alpha}
    return LoraConfig(
        **{option: getattr(config, option) for option in names_of(is_written=True)},
        target_modules=[name for name in linear if f"{name}.weight" not in as_parameters],
        target_parameters=parameters,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        inference_mode=True,
    )


def _check_non_expert(adapter: AdapterFile) -> None:
    """Rejects tensors that would be written but not loaded."""
    saved = adapter.config.modules_to_save or ()
    for key in adapter.non_expert:
        is_of_lora = key.endswith((A_SUFFIX, B_SUFFIX, EMBEDDING_A, EMBEDDING_B))
        if not is_of_lora and not any(f"{name}." in key for name in saved):
            raise ValueError(
                f"The adapter contains {key}, which PEFT's LoRA on parameters does not support. Merge the adapter "
                "instead."
            )


def _is_mistaken(path: str, adapter: AdapterFile, base: BaseModel | None) -> bool:
    """Whether PEFT treats the stacks of an experts module as (out, in) although they are (in, out).

    It does so for classes that do not declare `is_transposed`, such as Llama 4's.
    """
    return path.endswith("feed_forward.experts") and _model_type(path, "Llama 4", adapter, base).startswith("llama4")


def _name_for_peft(key: str, adapter: AdapterFile, base: BaseModel | None) -> str:
    """The key of a linear layer's factor that PEFT maps to the layer.

    PEFT renames keys as transformers renames checkpoint keys. For Laguna the pattern `mlp.shared_expert.` also matches
    `mlp.shared_experts` of the model and corrupts it.
    """
    if ".mlp.shared_experts." in key and _model_type(key, "Laguna", adapter, base) == "laguna":
        return key.replace(".mlp.shared_experts.", ".mlp.shared_expert.")
    return key


def _model_type(name: str, candidate: str, adapter: AdapterFile, base: BaseModel | None) -> str:
    if base is None and adapter.config.base is not None:
        return adapter.config.base["model_type"]
    if base is None:
        raise ValueError(
            f"{name} may belong to {candidate}, which PEFT treats differently, and the adapter's base model "
            f"{adapter.config.base_model_name_or_path} is not a local directory. Pass the directory of the base model "
            "as base (--base)."
        )
    return base.model.config.model_type
