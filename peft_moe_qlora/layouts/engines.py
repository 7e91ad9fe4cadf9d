"""What each engine reads: for which model which layout (`engines.csv`), which linear layers, on which base.

Models go by their class in transformers. A model that isn't in the table is refused, since engines drop keys that they
don't know, or read them wrong, without a word. The evidence of each row is

- `run`: the engine's own code has read such an adapter, and made the delta of it (`tests/check_engines.py`);
- `converted`: the engine's converter has taken it, or refused it;
- `source`: read in the engine's source. vLLM: `is_3d_moe_weight` of the class says which layout it reads; the module
  path is the checkpoint's, after vLLM's own renaming. SGLang: any class with FusedMoE whose `get_hidden_dim`, if it
  has one, knows `gate_up_proj_moe`. mlx-lm: what the model's class calls its SwitchGLU.
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
    """PEFT's fused layout with both projections, one rank and plain scaling, interleaved rows left interleaved."""
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
"""Layout in the table -> what writes it. Of mlx-lm's, what it calls the experts, or the text model, differs."""

_BITSANDBYTES = ("bitsandbytes", QUANT_METHOD)
# taken apart by the engine where attention is latent, which goes past its LoRA
_LATENT = frozenset({"kv_b_proj"})


@dataclass(frozen=True)
class Engine:
    """What one engine reads.

    Args:
        name: with the version that the table is of.
        linear: last parts of the names of the linear layers that it reads; None for whichever the model has.
        not_linear: last parts of those that it reads wrong, or not at all.
        not_on: quantization of the base -> classes that can't be served on it, None for all.
        max_r: the largest rank.
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
        """What writes the layout that the engine reads for a model.

        Raises:
            ValueError: it doesn't serve the model, or nobody knows what it reads for it.
        """
        row = self.rows.get(class_name)
        if row is not None and row["layout"] in _WRITERS:
            return _WRITERS[row["layout"]]
        why = row["note"] if row else f"{class_name} is not among the models of which we know what it reads"
        raise ValueError(f"{self.name} can't serve this adapter of {class_name}: {why}. Merge it instead.")


VLLM = Engine("vLLM 0.33.0", not_linear=_LATENT, not_on=dict.fromkeys(_BITSANDBYTES), max_r=512)
SGLANG = Engine(
    "SGLang 0.5.23",
    linear=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}),
    not_on={**dict.fromkeys(_BITSANDBYTES), "mxfp4": ("GptOssForCausalLM",)},
)
LLAMA_CPP = Engine("llama.cpp 0c1e57098", not_linear=_LATENT)
MLX = Engine("mlx-lm 0.32.2", not_linear=_LATENT)

# engines put these together, and some of them want all or none
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def write_for_engine(engine: Engine, adapter: AdapterFile, directory: Path, base: BaseModel) -> None:
    """Writes an adapter in the layout that an engine reads for this model.

    Args:
        engine: one of this module.
        adapter: one of this package.
        directory: created if it isn't there.
        base: the model that it belongs to.

    Raises:
        ValueError: the engine doesn't serve the model with LoRA on its experts, or not on this base; or the adapter
            has a layer, a rank or a kind of tensor that the engine doesn't know. The error says what instead.
    """
    adapter, base = in_whole_model(uniform(adapter, base), base)
    class_name = type(base.model).__name__
    write = engine.writer(class_name)
    if base.quantization in engine.not_on:
        classes = engine.not_on[base.quantization]
        if classes is None or class_name in classes:
            raise ValueError(
                f"{engine.name} has no LoRA on experts of a base quantized by {base.quantization}, which "
                f"{base.directory} is. Name the checkpoint in 16 bits that you will serve it on, or merge it instead."
            )
    _check_linear(engine, adapted_layers(adapter.non_expert), base)
    if engine.max_r is not None and adapter.config.r > engine.max_r:
        raise ValueError(
            f"{engine.name} takes ranks up to {engine.max_r}; the adapter has {adapter.config.r}. Merge it instead."
        )
    write(_with_siblings(adapter, base), directory, base)


def _check_linear(engine: Engine, names: list[str], base: BaseModel) -> None:
    text_models = {path.partition("layers.")[0] for path in base.layouts}
    for name in names:
        last = name.rpartition(".")[2]
        if last in engine.not_linear or (engine.linear is not None and last not in engine.linear):
            raise ValueError(
                f"{engine.name} reads no LoRA on {name}. Merge the adapter instead, or train one without {last}."
            )
        if last != "lm_head" and not name.startswith(tuple(f"{start}layers." for start in text_models)):
            raise ValueError(
                f"{name} is outside the layers that have the experts, where {engine.name} drops LoRA or takes it for "
                "another layer's. Merge the adapter instead."
            )


def _with_siblings(adapter: AdapterFile, base: BaseModel) -> AdapterFile:
    """With zeros for the linear layers that engines join to an adapted one."""
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
