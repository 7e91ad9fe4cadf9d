"""What each engine reads: for which model which layout, which linear layers, on which base. All from their sources.

Models go by their class in transformers. A model that isn't here is refused, since engines drop keys that they don't
know, or read them wrong, without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from torch import nn

from ..loading.quantization_config import QUANT_METHOD
from .adapter_file import AdapterFile
from .base_model import BaseModel
from .mlx_writer import write_mlx
from .non_expert import A_SUFFIX, B_SUFFIX, adapted_layers
from .peft_lora_writer import write_peft_lora
from .per_expert_writer import write_per_expert
from .stacked_writer import write_stacked
from .uniform import uniform
from .whole_model import in_whole_model


def _write_fused(adapter: AdapterFile, directory: Path, base: BaseModel) -> None:
    """PEFT's fused layout with both projections, one rank and plain scaling, interleaved rows left interleaved."""
    write_peft_lora(uniform(adapter, base), directory, base)


_PER_EXPERT = partial(write_per_expert, targets_in_newer_names=True)
_MLX_SWITCH = partial(write_mlx, experts_name="switch_mlp")
_MLX_EXPERTS = partial(write_mlx, experts_name="experts")
_BITSANDBYTES = ("bitsandbytes", QUANT_METHOD)


@dataclass(frozen=True)
class Engine:
    """What one engine reads.

    Args:
        name: with the version whose source says so.
        layouts: class of the model in transformers -> what writes the adapter.
        refused: class of the model -> why its adapters can't be served.
        linear: last parts of the names of the linear layers that it reads; None for whichever the model has.
        not_linear: last parts of those that it reads wrong, or not at all.
        not_on: quantization of the base -> classes that can't be served on it, None for all.
        max_r: the largest rank.
    """

    name: str
    layouts: Mapping[str, Callable[[AdapterFile, Path, BaseModel], None]]
    refused: Mapping[str, str] = field(default_factory=dict)
    linear: frozenset[str] | None = None
    not_linear: frozenset[str] = frozenset()
    not_on: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    max_r: int | None = None


# `is_3d_moe_weight` of the class (vllm/model_executor/models) says which layout it reads; the module path in vLLM is
# the checkpoint's for all of these, after vLLM's own renaming
VLLM = Engine(
    name="vLLM 0.33.0",
    layouts={
        **dict.fromkeys(
            (
                "GptOssForCausalLM",
                "Qwen3VLMoeForConditionalGeneration",
                "Qwen3_5MoeForConditionalGeneration",
                # by its backend for transformers' own classes; to be served with --enable-mixed-moe-lora-format and
                # is_3d_lora_weight in the request
                "FlexOlmoForCausalLM",
                "HunYuanMoEV1ForCausalLM",
                "Kolibri1ForCausalLM",
                "MellumForCausalLM",
            ),
            _write_fused,
        ),
        **dict.fromkeys(
            (
                "AXK1ForCausalLM",
                "AfmoeForCausalLM",
                "DeepseekV2ForCausalLM",
                "DeepseekV3ForCausalLM",
                "Ernie4_5_MoeForCausalLM",
                "ExaoneMoeForCausalLM",
                "Gemma4ForCausalLM",
                "Gemma4ForConditionalGeneration",
                "Glm4MoeForCausalLM",
                "Glm4MoeLiteForCausalLM",
                "Glm4vMoeForConditionalGeneration",
                "GraniteMoeForCausalLM",
                "GraniteMoeHybridForCausalLM",
                "GraniteMoeSharedForCausalLM",
                "HYV3ForCausalLM",
                "JambaForCausalLM",
                "LagunaForCausalLM",
                "Lfm2MoeForCausalLM",
                "MiniMaxM2ForCausalLM",
                "MixtralForCausalLM",
                "NemotronHForCausalLM",
                "OlmoeForCausalLM",
                "PhimoeForCausalLM",
                "Qwen2MoeForCausalLM",
                "Qwen3MoeForCausalLM",
                "Qwen3NextForCausalLM",
                "Qwen3_5MoeForCausalLM",
            ),
            _PER_EXPERT,
        ),
    },
    refused={
        **dict.fromkeys(
            (
                "AriaForConditionalGeneration",
                "Cohere2MoeForCausalLM",
                "DbrxForCausalLM",
                "KimiLinearForCausalLM",
                "MiMoV2FlashForCausalLM",
                "MiniMaxM3SparseForConditionalGeneration",
            ),
            "it has no LoRA for this model",
        ),
        **dict.fromkeys(
            ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
            "it weighs the experts' output by the router, where Llama 4 weighs their input",
        ),
        "Qwen3OmniMoeForConditionalGeneration": "it drops an adapter that has transformers' names of the modules",
    },
    # MLAAttention takes the weight of kv_b_proj apart and goes past its LoRA
    not_linear=frozenset({"kv_b_proj"}),
    not_on=dict.fromkeys(_BITSANDBYTES),
    max_r=512,
)

# any class with FusedMoE (sglang/srt/models) whose `get_hidden_dim`, if it has one, knows `gate_up_proj_moe`
SGLANG = Engine(
    name="SGLang 0.5.23",
    layouts={
        # its weights are stacks there, of which the adapter's need no name for each expert
        "GptOssForCausalLM": write_stacked,
        **dict.fromkeys(
            (
                "DeepseekV2ForCausalLM",
                "DeepseekV3ForCausalLM",
                "Ernie4_5_MoeForCausalLM",
                "ExaoneMoeForCausalLM",
                "Glm4MoeForCausalLM",
                "Glm4MoeLiteForCausalLM",
                "Glm4vMoeForConditionalGeneration",
                "GraniteMoeForCausalLM",
                "HYV3ForCausalLM",
                "LagunaForCausalLM",
                "MiniMaxM2ForCausalLM",
                "MixtralForCausalLM",
                "OlmoeForCausalLM",
                "PhimoeForCausalLM",
                "Qwen2MoeForCausalLM",
                "Qwen3MoeForCausalLM",
                "Qwen3NextForCausalLM",
                "Qwen3VLMoeForConditionalGeneration",
                "Qwen3_5MoeForCausalLM",
                "Qwen3_5MoeForConditionalGeneration",
            ),
            _PER_EXPERT,
        ),
    },
    refused=dict.fromkeys(
        (
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Llama4ForCausalLM",
            "Llama4ForConditionalGeneration",
        ),
        "it has no LoRA for experts of this model",
    ),
    linear=frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}),
    not_on={**dict.fromkeys(_BITSANDBYTES), "mxfp4": ("GptOssForCausalLM",)},
)

# the converter's classes that put experts together, each tried with an adapter
LLAMA_CPP = Engine(
    name="llama.cpp 0c1e57098",
    layouts={
        **dict.fromkeys(("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"), write_stacked),
        **dict.fromkeys(
            (
                "DeepseekV3ForCausalLM",
                "Glm4MoeForCausalLM",
                "MixtralForCausalLM",
                "OlmoeForCausalLM",
                "Qwen2MoeForCausalLM",
                "Qwen3MoeForCausalLM",
                "Qwen3_5MoeForCausalLM",
                "Qwen3_5MoeForConditionalGeneration",
            ),
            _PER_EXPERT,
        ),
    },
    refused=dict.fromkeys(
        (
            "GptOssForCausalLM",
            "GraniteMoeForCausalLM",
            "GraniteMoeHybridForCausalLM",
            "GraniteMoeSharedForCausalLM",
            "Llama4ForCausalLM",
            "Llama4ForConditionalGeneration",
        ),
        "its converter takes no adapter of experts of this model",
    ),
    # the converter takes it apart, which it can't do with factors
    not_linear=frozenset({"kv_b_proj"}),
)

# what the model's class in mlx_lm/models calls its SwitchGLU
MLX = Engine(
    name="mlx-lm 0.32.2",
    layouts={
        "GptOssForCausalLM": _MLX_EXPERTS,
        "Qwen3_5MoeForConditionalGeneration": partial(
            _MLX_SWITCH, prefixes=("model.language_model.", "language_model.model.")
        ),
        **dict.fromkeys(
            (
                "DeepseekV3ForCausalLM",
                "Glm4MoeForCausalLM",
                "GraniteMoeForCausalLM",
                "MixtralForCausalLM",
                "OlmoeForCausalLM",
                "PhimoeForCausalLM",
                "Qwen2MoeForCausalLM",
                "Qwen3MoeForCausalLM",
                "Qwen3NextForCausalLM",
            ),
            _MLX_SWITCH,
        ),
    },
    # taken apart where the attention is latent
    not_linear=frozenset({"kv_b_proj"}),
)

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
    write = engine.layouts.get(class_name)
    if write is None:
        why = engine.refused.get(class_name, f"{class_name} is not among the models of which we know what it reads")
        raise ValueError(f"{engine.name} can't serve this adapter of {class_name}: {why}. Merge it instead.")
    if base.quantization in engine.not_on:
        classes = engine.not_on[base.quantization]
        if classes is None or class_name in classes:
            raise ValueError(
                f"{engine.name} has no LoRA on experts of a base quantized by {base.quantization}, which "
                f"{base.directory} is. Name the checkpoint in 16 bits that you will serve it on, or merge it instead."
            )
    _check_linear(engine, adapted_layers(adapter.others), base)
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
    others = dict(adapter.others)
    for name in adapted_layers(adapter.others):
        block, _, last = name.rpartition(".")
        for sibling in (one for group in _TOGETHER if last in group for one in group):
            module = getattr(base.model.get_submodule(block), sibling, None)
            key = f"{block}.{sibling}"
            if isinstance(module, nn.Linear) and key + A_SUFFIX not in others:
                some = others[name + A_SUFFIX]
                others[key + A_SUFFIX] = some.new_zeros(1, module.in_features)
                others[key + B_SUFFIX] = some.new_zeros(module.out_features, 1)
    return AdapterFile(adapter.config, adapter.experts, others)
