"""Reads adapters of mlx-lm.

adapter_config.json has `fine_tune_type`, `num_layers` (the last so many have adapters) and `lora_parameters` with
rank and scale; adapters.safetensors has `PATH.switch_mlp.<part>.lora_a` `(E, r, in)` and `lora_b` `(E, out, r)` for
experts, and `NAME.lora_a` `(in, r)` and `lora_b` `(r, out)` for other layers. The text model of one that has towers
is at `language_model`. Layout: `mlx_lm.tuner.lora`, 0.32.2.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from .adapter_file import AdapterFile
from .gate_up_halves import Part, check_layers, containers_of, join_parts, others_by_own_names, part_names
from .non_expert import A_SUFFIX, B_SUFFIX, EMBEDDING_A, EMBEDDING_B
from .source import Source

FILE_NAME = "adapters.safetensors"
# what mlx-lm's models call the module of their experts
_EXPERTS = re.compile(r"\.(experts\.switch_glu|switch_mlp|switch_glu|experts)$")


def peft_options(config: dict[str, Any], file: str) -> dict[str, Any]:
    """The config in PEFT's terms: r, lora_alpha.

    Raises:
        ValueError: it isn't LoRA.
    """
    found = config["fine_tune_type"]
    if found != "lora":
        raise ValueError(f"{file}: fine_tune_type {found!r}; 'lora' was expected, which can be read.")
    parameters = config["lora_parameters"]
    r, scale = parameters["rank"], parameters["scale"]
    return {
        "base_model_name_or_path": config.get("model"),
        "lora_alpha": scale * r,
        "lora_dropout": parameters.get("dropout", 0.0),
        "num_layers": config["num_layers"],
        "r": r,
        "task_type": "CAUSAL_LM",
    }


def read_mlx(source: Source) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: a factor or a layer is missing, or a tensor fits no layer of the base.
    """
    r, alpha = source.config.r, source.config.lora_alpha
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in source.tensors.items():
        name, _, factor = _name_in_checkpoint(key, source).rpartition(".")
        if factor not in ("lora_a", "lora_b"):
            raise ValueError(f"{source.file}: {key} is none of lora_a and lora_b, which an adapter of mlx-lm has.")
        pairs.setdefault(name, {})[factor] = tensor
    paths = {container: path for path in source.base.layouts for container in containers_of(source.base, path)}
    found: dict[str, dict[str, Part]] = {}
    others = {}
    for name, pair in pairs.items():
        if pair.keys() != {"lora_a", "lora_b"}:
            raise ValueError(f"{source.file} has {name}.{next(iter(pair))} without its other factor; it is damaged.")
        module, _, leaf = name.rpartition(".")
        path = paths.get(_EXPERTS.sub(".experts", module))
        a, b = pair["lora_a"], pair["lora_b"]
        if path is None or a.dim() == 2:
            if a.dim() != 2 or b.dim() != 2:
                raise ValueError(
                    f"{source.file}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}; (in, r) "
                    "and (r, out) were expected, or the base has no experts there."
                )
            is_embedding = isinstance(source.base.layer(name), nn.Embedding)
            ends = (EMBEDDING_A, EMBEDDING_B) if is_embedding else (A_SUFFIX, B_SUFFIX)
            others |= {name + end: tensor.mT.contiguous() for end, tensor in zip(ends, (a, b))}
            continue
        part = next((one for one, names in part_names(source.base.layouts[path]).items() if leaf in names), None)
        if part is None or a.dim() != 3 or b.dim() != 3 or a.shape[1] != b.shape[2]:
            raise ValueError(
                f"{source.file}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}; (E, r, in) "
                f"and (E, out, r) of a projection of {path} were expected. They are transposed, or damaged."
            )
        source.check_rank(name, a.shape[1], r)
        found.setdefault(path, {})[part] = Part(a, b, alpha)
    first = _first_adapted_layer(source)

    def is_targeted(name: str, part: str = "") -> bool:
        number = re.search(r"\.(\d+)\.", name)
        return number is None or int(number[1]) >= first

    check_layers(source, found, is_targeted)
    experts = [factors for path, parts in found.items() for factors in join_parts(source, path, parts)]
    others, _ = others_by_own_names(source, others, is_targeted)
    return source.adapter(experts, others, lambda name: (r, alpha))


def _name_in_checkpoint(key: str, source: Source) -> str:
    start = next(iter(source.base.layouts), "").partition("layers.")[0]
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    if key.startswith("language_model.model."):
        return start + key.removeprefix("language_model.model.")
    return key


def _first_adapted_layer(source: Source) -> int:
    """mlx-lm counts from the end; all layers if there are no more, or the number is not positive."""
    num_layers = source.base.model.config.get_text_config().num_hidden_layers
    adapted = source.options["num_layers"]
    return max(num_layers - adapted, 0) if adapted > 0 else 0
