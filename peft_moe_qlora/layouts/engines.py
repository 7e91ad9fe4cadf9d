"""What each engine reads: the layout for each model (`engines.csv`), the linear layers, the quantization of the base.

Models are listed by their class in transformers. A model that is not in the table is rejected, because engines drop
unknown keys, or misread them, without an error. The evidence of each row is

- `run`: the engine's own code has read such an adapter and computed its delta (`tests/check_engines.py`);
- `converted`: the engine's converter has accepted it, or rejected it;
- `source`: read in the engine's source. vLLM: `is_3d_moe_weight` of the class determines the layout; the module path
  is the checkpoint's, after vLLM's own renaming. SGLang: any class with FusedMoE whose `get_hidden_dim`, if defined,
  handles `gate_up_proj_moe`. mlx-lm: the name of the SwitchGLU in the model's class.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from torch import nn

from ..loading.quantization_config import QUANT_METHOD
from .adapter_file import AdapterFile
from .base_model import BaseModel
from .mlx import write_mlx
from .non_expert import A_SUFFIX, B_SUFFIX, adapted_layers
from .peft_lora import write_peft_lora
from .per_expert import write_per_expert
from .stacked import write_stacked
from .uniform import uniform
from .whole_model import in_whole_model

_TABLE = Path(__file__).with_name("engines.csv")


def _write_fused(adapter: AdapterFile, directory: Path, base: BaseModel) -> None:
    """Writes PEFT's fused layout with both projections, one rank and plain scaling; interleaved rows stay so."""
    write_peft_lora(uniform(adapter, base), directory, base)


_WRITERS: dict[str, Callable[[AdapterFile, Path, BaseModel], None]] = {
    "peft-lora": _write_fused,
    "per-expert": partial(write_per_expert, targets_in_newer_names=True),
    "stacked": write_stacked,
    "mlx switch_mlp": partial(write_mlx, experts_name="switch_mlp"),
    "mlx experts": partial(write_mlx, experts_name="experts"),
    "mlx language_model": partial(
        write_mlx, experts_name="switch_mlp", prefixes=("model.language_model.", "language_model.model.")
    ),
}
"""Layout in the table -> function that writes it. Those of mlx-lm differ in the names of experts or text model."""

_BITSANDBYTES = ("bitsandbytes", QUANT_METHOD)
# with multi-head latent attention engines split this weight, which bypasses LoRA on it
_LATENT = frozenset({"kv_b_proj"})


@dataclass(frozen=True)
class Engine:
    """What one engine reads.

    Args:
        name: name and the version that the table applies to.
        linear: last parts of the names of supported linear layers; None for all layers of the model.
        not_linear: last parts of the names of layers that it misreads or ignores.
        not_on: quantization of the base -> model classes that are not supported on it; None for all.
        max_r: the largest supported rank.
    """

    name: str
    linear: frozenset[str] | None = None
    not_linear: frozenset[str] = frozenset()
    not_on: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    max_r: int | None = None

    @cached_property
    def rows(self) -> dict[str, dict[str, str]]:
        """Class of the model in transformers -> its row of the table."""
        with _TABLE.open(newline="", encoding="utf-8") as file:
            return {row["class"]: row for row in csv.DictReader(file) if row["engine"] == self.name}

    def writer(self, class_name: str) -> Callable[[AdapterFile, Path, BaseModel], None]:
        """Returns the function that writes the layout which the engine reads for a model.

        Raises:
            ValueError: the engine does not support the model, or the layout that it reads is unknown.
        """
        row = self.rows.get(class_name)
        if row is not None and row["layout"] in _WRITERS:
            return _WRITERS[row["layout"]]
        why = row["note"] if row else f"{class_name} is not on the list of models whose layout is known"
        raise ValueError(f"{self.name} cannot serve this adapter of {class_name}: {why}. Merge the adapter instead.")


VLLM = Engine("vLLM 0.33.0", not_linear=_LATENT, not_on=dict.fromkeys(_BITSANDBYTES), max_r=512)
SGLANG = Engine(
    "SGLang 0.5.23",
    linear=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}),
    not_on={**dict.fromkeys(_BITSANDBYTES), "mxfp4": ("GptOssForCausalLM",)},
)
LLAMA_CPP = Engine("llama.cpp 0c1e57098", not_linear=_LATENT)
MLX = Engine("mlx-lm 0.32.2", not_linear=_LATENT)

# engines fuse these layers, and some require factors for all of them or none
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def write_for_engine(engine: Engine, adapter: AdapterFile, directory: Path, base: BaseModel) -> None:
    """Writes an adapter in the layout that an engine reads for this model.

    Args:
        engine: one of the engines of this module.
        adapter: an adapter of this package.
        directory: output directory; created if it does not exist.
        base: the adapter's base model.

    Raises:
        ValueError: the engine does not support LoRA on experts of this model, or of this base; or the adapter has a
            layer, a rank or a kind of tensor that the engine does not support. The error names an alternative.
    """
    adapter, base = in_whole_model(uniform(adapter, base), base)
    class_name = type(base.model).__name__
    write = engine.writer(class_name)
    if base.quantization in engine.not_on:
        classes = engine.not_on[base.quantization]
        if classes is None or class_name in classes:
            raise ValueError(
                f"{base.directory} is quantized by {base.quantization}, and {engine.name} does not support LoRA on "
                "experts of such a base. Pass the 16-bit checkpoint that will be served as base (--base), or merge "
                "the adapter instead."
            )
    _check_linear(engine, adapted_layers(adapter.non_expert), base)
    if engine.max_r is not None and adapter.config.r > engine.max_r:
        raise ValueError(
            f"The adapter has rank {adapter.config.r}, but {engine.name} supports ranks up to {engine.max_r}. Merge "
            "the adapter instead."
        )
    write(_with_siblings(adapter, base), directory, base)


def _check_linear(engine: Engine, names: list[str], base: BaseModel) -> None:
    text_models = {path.partition("layers.")[0] for path in base.layouts}
    for name in names:
        last = name.rpartition(".")[2]
        if last in engine.not_linear or (engine.linear is not None and last not in engine.linear):
            raise ValueError(
                f"{engine.name} does not support LoRA on {name}. Merge the adapter instead, or train one without "
                f"{last}."
            )
        if last != "lm_head" and not name.startswith(tuple(f"{start}layers." for start in text_models)):
            raise ValueError(
                f"{name} is outside the decoder layers of the text model, where {engine.name} drops LoRA or applies "
                "it to another layer. Merge the adapter instead."
            )


def _with_siblings(adapter: AdapterFile, base: BaseModel) -> AdapterFile:
    """Adds zero factors for the linear layers that engines fuse with an adapted one."""
    non_expert = dict(adapter.non_expert)
    for name in adapted_layers(adapter.non_expert):
        block, _, last = name.rpartition(".")
        for sibling in (one for group in _TOGETHER if last in group for one in group):
            module = getattr(base.model.get_submodule(block), sibling, None)
            key = f"{block}.{sibling}"
            if isinstance(module, nn.Linear) and key + A_SUFFIX not in non_expert:
                some = non_expert[name + A_SUFFIX]
                non_expert[key + A_SUFFIX] = some.new_zeros(1, module.in_features)
                non_expert[key + B_SUFFIX] = some.new_zeros(module.out_features, 1)
    return AdapterFile(adapter.config, adapter.experts, non_expert)
