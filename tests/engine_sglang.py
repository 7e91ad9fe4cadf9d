"""SGLang's own code from an adapter's directory to the buffers that its kernels read, on a CPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine_sources import SourcesFinder, unpacked
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

REQUIREMENT = "sglang==0.5.23"
_WANTED = (
    "sglang.srt.layers.quantization.base_config",
    "sglang.srt.layers.quantization.fp8",
    "sglang.srt.layers.quantization.utils",
    "sglang.srt.layers.utils.common",
    "sglang.srt.lora.eviction_policy",
    "sglang.srt.lora.layers",
    "sglang.srt.lora.lora",
    "sglang.srt.lora.lora_config",
    "sglang.srt.lora.mem_pool",
    "sglang.srt.lora.utils",
)
_FILES = (*(f"{name.replace('.', '/')}.py" for name in _WANTED), "sglang/srt/layers/moe/fused_moe_triton/layer.py")
MAX_RANK = 16


class _FusedMoE(nn.Module):
    """Replaces the engine's class; the pool reads these attributes."""

    is_shared_fused_moe, moe_tp_rank = False, 0
    moe_runner_config = SimpleNamespace(is_gated=True)


class Sglang:
    """The engine's modules.

    Args:
        cache: directory for its files.

    Raises:
        NotAvailable: the wheel can't be downloaded.
    """

    name = REQUIREMENT

    def __init__(self, cache: Path):
        self.directory = directory = unpacked(REQUIREMENT, _FILES, cache)
        alone = {f"{kind}_{what}": value for kind in ("tp", "attn_tp", "moe_ep", "moe_tp") for what, value in _ONE}
        given = {
            "sglang.srt.runtime_context": {"get_parallel": lambda: SimpleNamespace(**alone)},
            "sglang.srt.utils": {"is_pin_memory_available": lambda: False},
            "sglang.srt.layers.moe.fused_moe_triton.layer": {"FusedMoE": _FusedMoE},
        }
        sys.meta_path.insert(0, SourcesFinder("sglang", directory, _WANTED, given))
        common = importlib.import_module("sglang.srt.layers.utils.common")
        importlib.import_module("sglang.srt.layers.utils").get_layer_id = common.get_layer_id
        for name in ("layers", "lora", "lora_config", "mem_pool", "utils"):
            setattr(self, name, importlib.import_module(f"sglang.srt.lora.{name}"))

    def products(self, adapter: Path, class_name: str, sizes: dict[str, int]) -> dict[int, tuple[torch.Tensor, ...]]:
        """The deltas of the experts that an adapter adds, read from the buffers.

        Args:
            adapter: the directory.
            class_name: of the model in transformers.
            sizes: `layers`, `experts`, `hidden`, `intermediate`.

        Returns:
            Number of a layer -> deltas of the weights `w13` `(E, 2 I, H)` and `w2` `(E, H, I)`; the rows of w13 in the
            order of the base.
        """
        is_interleaved = class_name == "GptOssForCausalLM"
        hf_config = AutoConfig.from_pretrained(adapter.parent / "base").get_text_config()
        config = self.lora_config.LoRAConfig(path=str(adapter))
        model = nn.Module()
        model.config, model.experts = hf_config, _FusedMoE()
        model.register_parameter("device", nn.Parameter(torch.zeros(1)))
        pool = self.mem_pool.LoRAMemoryPool(
            base_hf_config=hf_config,
            max_loras_per_batch=1,
            dtype=torch.float32,
            max_lora_rank=MAX_RANK,
            target_modules=self.utils.get_normalized_target_modules(config.target_modules),
            base_model=model,
            eviction_policy="lru",
            lora_added_tokens_size=0,
            strict_loading=True,
        )
        loaded = self.lora.LoRAAdapter("adapter", config, hf_config, None, None)
        loaded.initialize_weights_from_tensors(load_file(adapter / "adapter_model.safetensors"))
        wrapped = [{"experts": self._layer(is_interleaved, sizes)} for _ in range(sizes["layers"])]
        pool.load_lora_weight_to_buffer("adapter", 0, loaded, wrapped, None, None)
        return {layer: _products(pool, layer, is_interleaved) for layer in range(sizes["layers"])}

    def _layer(self, is_interleaved: bool, sizes: dict[str, int]) -> Any:
        layer = self.layers.FusedMoEWithLoRA.__new__(self.layers.FusedMoEWithLoRA)
        nn.Module.__init__(layer)
        layer.base_layer = _FusedMoE()
        layer.tp_size, layer.tp_rank = 1, 0
        layer.intermediate_size_per_partition = sizes["intermediate"]
        layer._uses_interleaved_gate_up = is_interleaved
        return layer


_ONE = (("size", 1), ("rank", 0))


def _products(pool: Any, layer: int, is_interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool has already multiplied B by the scaling."""
    A, B = pool.A_buffer["gate_up_proj_moe"][layer][0], pool.B_buffer["gate_up_proj_moe"][layer][0]
    A_gate, A_up = A.chunk(2, dim=1)
    if is_interleaved:
        w13 = torch.stack([B[:, ::2] @ A_gate, B[:, 1::2] @ A_up], dim=2).flatten(1, 2)
    else:
        B_gate, B_up = B.chunk(2, dim=1)
        w13 = torch.cat([B_gate @ A_gate, B_up @ A_up], dim=1)
    A, B = pool.A_buffer["down_proj_moe"][layer][0], pool.B_buffer["down_proj_moe"][layer][0]
    return w13, B @ A
