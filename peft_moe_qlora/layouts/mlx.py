"""Adapters of mlx-lm.

adapter_config.json has `fine_tune_type`, `num_layers` (the number of adapted layers, counted from the last) and
`lora_parameters` with rank, scale and names of layers within a block; adapters.safetensors has
`PATH.switch_mlp.<part>.lora_a` `(E, r, in)` and `lora_b` `(E, out, r)` for experts, with separate gate and up, and
`NAME.lora_a` `(in, r)` and `lora_b` `(r, out)` for other layers. The text model of a multimodal model is at
`language_model`. Layout: `mlx_lm.tuner`, 0.32.2.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors.torch import save_file
from torch import nn

from ..options import COUNT, INT, NUMBER, PROBABILITY, TEXT, Values, check_saved, is_list_of, is_name
from ..progress import announce_file
from .adapter_file import AdapterFile
from .base_model import PARTS_OF_FUSED, BaseModel
from .foreign import ForeignAdapter
from .gaps import find_gaps, without_gaps
from .gate_up_halves import (
    Part,
    check_layers,
    containers_of,
    gate_and_up,
    join_parts,
    non_expert_by_own_names,
    part_names,
)
from .non_expert import A_SUFFIX, B_SUFFIX, EMBEDDING_A, EMBEDDING_B, adapted_layers
from .uniform import adapted_blocks, pairs_in_checkpoint, uniform

FILE_NAME = "adapters.safetensors"
# names of the experts module in mlx-lm's models
_EXPERTS = re.compile(r"\.(experts\.switch_glu|switch_mlp|switch_glu|experts)$")


def check_mlx_options(file: Path, options: Mapping[str, Any]) -> None:
    """Like `check_saved`, for a config of mlx-lm."""
    known = {
        "fine_tune_type": TEXT,
        "lora_parameters": Values("an object", lambda value: isinstance(value, dict)),
        "model": TEXT,
        "num_layers": INT,
    }
    check_saved(file, options, known, ("lora_parameters", "num_layers"), {"model"})
    parameters = {
        "dropout": PROBABILITY,
        "keys": Values("a list of names", is_list_of(is_name)),
        "rank": COUNT,
        "scale": NUMBER,
    }
    check_saved(file, options["lora_parameters"], parameters, ("rank", "scale"), {"keys"}, "lora_parameters.")


def peft_options(config: dict[str, Any], file: str) -> dict[str, Any]:
    """The config in PEFT's terms: r, lora_alpha.

    Raises:
        ValueError: the adapter is not LoRA.
    """
    found = config["fine_tune_type"]
    if found != "lora":
        raise ValueError(f"{file}: fine_tune_type={found!r} is not supported. Expected 'lora'.")
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


def read_mlx(foreign: ForeignAdapter) -> AdapterFile:
    """Reads the layout.

    Raises:
        ValueError: a factor or a layer is missing, or a tensor fits no layer of the base.
    """
    r, alpha = foreign.config.r, foreign.config.lora_alpha
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in foreign.tensors.items():
        name, _, factor = _name_in_checkpoint(key, foreign).rpartition(".")
        if factor not in ("lora_a", "lora_b"):
            raise ValueError(
                f"{foreign.file}: {key} is not a tensor of a LoRA adapter of mlx-lm. Expected keys that end in lora_a "
                "or lora_b."
            )
        pairs.setdefault(name, {})[factor] = tensor
    paths = {container: path for path in foreign.base.layouts for container in containers_of(foreign.base, path)}
    found: dict[str, dict[str, Part]] = {}
    non_expert = {}
    for name, pair in pairs.items():
        if pair.keys() != {"lora_a", "lora_b"}:
            raise ValueError(
                f"{foreign.file} contains {name}.{next(iter(pair))} without its other factor. The file is damaged. "
                "Save the adapter again."
            )
        module, _, leaf = name.rpartition(".")
        path = paths.get(_EXPERTS.sub(".experts", module))
        a, b = pair["lora_a"], pair["lora_b"]
        if path is None or a.dim() == 2:
            if a.dim() != 2 or b.dim() != 2:
                raise ValueError(
                    f"{foreign.file}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}. Expected "
                    "(in, r) and (r, out), because the base model has no experts there."
                )
            is_embedding = isinstance(foreign.base.layer(name), nn.Embedding)
            ends = (EMBEDDING_A, EMBEDDING_B) if is_embedding else (A_SUFFIX, B_SUFFIX)
            non_expert |= {name + end: tensor.mT.contiguous() for end, tensor in zip(ends, (a, b))}
            continue
        part = next((one for one, names in part_names(foreign.base.layouts[path]).items() if leaf in names), None)
        if part is None or a.dim() != 3 or b.dim() != 3 or a.shape[1] != b.shape[2]:
            raise ValueError(
                f"{foreign.file}: the factors of {name} have shapes {list(a.shape)} and {list(b.shape)}. Expected "
                f"(E, r, in) and (E, out, r) of a projection of {path}. The factors are transposed, or the file is "
                "damaged. Save the adapter again."
            )
        foreign.check_rank(name, a.shape[1], r)
        found.setdefault(path, {})[part] = Part(a, b, alpha)
    first = _first_adapted_layer(foreign)

    def is_targeted(name: str, part: str = "") -> bool:
        number = re.search(r"\.(\d+)\.", name)
        return number is None or int(number[1]) >= first

    check_layers(foreign, found, is_targeted)
    experts = [factors for path, parts in found.items() for factors in join_parts(foreign, path, parts)]
    non_expert, _ = non_expert_by_own_names(foreign, non_expert, is_targeted)
    return foreign.adapter(experts, non_expert, lambda name: (r, alpha))


def _name_in_checkpoint(key: str, foreign: ForeignAdapter) -> str:
    start = next(iter(foreign.base.layouts), "").partition("layers.")[0]
    if key.startswith("language_model.lm_head."):
        return key.removeprefix("language_model.")
    if key.startswith("language_model.model."):
        return start + key.removeprefix("language_model.model.")
    return key


def _first_adapted_layer(foreign: ForeignAdapter) -> int:
    """Converts mlx-lm's count from the end; 0 if all layers are adapted or the number is not positive."""
    num_layers = foreign.base.model.config.get_text_config().num_hidden_layers
    adapted = foreign.options["num_layers"]
    return max(num_layers - adapted, 0) if adapted > 0 else 0


_BLOCK = re.compile(r"(^|.*\.)layers\.\d+\.")


def write_mlx(
    adapter: AdapterFile, directory: Path, base: BaseModel, experts_name: str, prefixes: tuple[str, str] = ("", "")
) -> None:
    """Writes an adapter for `mlx_lm.load(..., adapter_path=directory)`.

    Args:
        adapter: an adapter of this package.
        directory: output directory; created if it does not exist.
        base: the adapter's base model.
        experts_name: name in mlx-lm's model class of the module that the checkpoint calls `experts`.
        prefixes: prefix of names in the checkpoint, and its replacement in mlx-lm.

    Raises:
        ValueError: the adapter has tensors that mlx-lm does not support (see `uniform`), or a layer whose weight is
            not a separate tensor in the checkpoint.
    """
    adapter = uniform(adapter, base)
    names = [*adapted_layers(adapter.non_expert), *(factors.path for factors in adapter.experts)]
    first = min(adapted_blocks(names, base) or [0])
    num_layers = base.model.config.get_text_config().num_hidden_layers
    adapter = without_gaps(adapter, find_gaps(adapter, base, list(range(first, num_layers))), base)
    tensors: dict[str, torch.Tensor] = {}

    def add(name: str, A: torch.Tensor, B: torch.Tensor) -> None:
        if not name.startswith(prefixes[0]):
            raise ValueError(
                f"The name of {name} in mlx-lm is not known. Merge the adapter instead, or train one without this "
                "layer."
            )
        name = prefixes[1] + name.removeprefix(prefixes[0])
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = A.contiguous().clone(), B.contiguous().clone()

    for factors in adapter.experts:
        of_first = base.names_of_experts(factors.path, factors.projection)[0]
        block = of_first.removesuffix(re.search(r"experts\.0\.\w+$", of_first)[0])
        if factors.projection == "gate_up_proj":
            for part, B in zip(PARTS_OF_FUSED, gate_and_up(factors.B, base.layouts[factors.path])):
                add(f"{block}{experts_name}.{part}", factors.A, B)
        else:
            add(f"{block}{experts_name}.{factors.projection}", factors.A, factors.B)
    for pair in pairs_in_checkpoint(adapter, base):
        add(pair.name, pair.A.T, pair.B.T)
    directory.mkdir(parents=True, exist_ok=True)
    announce_file(directory / FILE_NAME, sum(tensor.nbytes for tensor in tensors.values()))
    save_file(tensors, directory / FILE_NAME, {"format": "mlx"})
    config = {
        "fine_tune_type": "lora",
        "num_layers": num_layers - first,  # counted from the end
        "lora_parameters": {
            "rank": adapter.config.r,
            "scale": adapter.config.lora_alpha / adapter.config.r,
            "dropout": 0.0,
            "keys": sorted({_BLOCK.sub("", key).rpartition(".")[0] for key in tensors}),
        },
    }
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
