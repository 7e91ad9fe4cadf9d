"""How vLLM and SGLang read a checkpoint in FP8 blocks: buffers of experts, and layers in 16 bits.

The buffers have the shapes of the engine's `Fp8MoEMethod.create_weights`. Each tensor is written into them by the
engine's name mapping and weight loader, on a CPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

_BLOCK = 128


class ServedByVllm:
    """The engine's modules, found by `engine_vllm.Vllm`."""

    def __init__(self, directory: Path):
        self.fp8 = importlib.import_module("vllm.model_executor.layers.quantization.fp8")
        self.utils = importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils")
        self.routed = importlib.import_module("vllm.model_executor.layers.fused_moe.routed_experts")

    def skips(self, declared: dict[str, Any], module: str) -> bool:
        """Whether the `quantization_config` leaves a linear layer in 16 bits."""
        ignored = self.fp8.Fp8Config.from_config(declared).ignored_layers
        return self.utils.is_layer_skipped(prefix=module, ignored_layers=ignored)

    def buffers(
        self, tensors: dict[str, torch.Tensor], path: str, names: tuple[str, str, str], sizes: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        """The contents of the buffers of one layer.

        Args:
            tensors: of the checkpoint.
            path: of the experts in it.
            names: of gate, down and up projection in the checkpoint.
            sizes: `experts`, `hidden`, `intermediate`.
        """
        layer = self.routed.RoutedExperts.__new__(self.routed.RoutedExperts)
        parallel = SimpleNamespace(tp_size=1, ep_size=1, use_ep=False)
        layer.__dict__ |= {
            "layer_name": path,
            "moe_config": SimpleNamespace(
                tp_rank=0,
                tp_size=1,
                tp_shard_with_padding=False,
                num_experts=sizes["experts"],
                num_logical_experts=sizes["experts"],
                hidden_dim=sizes["hidden"],
                hidden_dim_unpadded=sizes["hidden"],
                intermediate_size_per_partition=sizes["intermediate"],
                is_act_and_mul=True,
                moe_parallel_config=parallel,
            ),
            "expert_map_manager": SimpleNamespace(
                num_fused_shared_experts=0, map_global_to_local=lambda expert: expert
            ),
            "quant_config": None,
            "quant_method": SimpleNamespace(),
            "_fused_shared_expert_quantizer": None,
            "ckpt_gate_proj_name": names[0],
            "ckpt_down_proj_name": names[1],
            "ckpt_up_proj_name": names[2],
            "is_fused_checkpoint_transposed": False,
            "lora_base_layer_prefix": "",
        }
        layer.__dict__ |= _buffers(sizes, layer.weight_loader)
        own = {key.removeprefix(f"{path}."): one for key, one in tensors.items() if key.startswith(f"{path}.")}
        assert len(list(layer.load_weights(own.items()))) == len(own), "a tensor was not loaded"
        return {name: layer.__dict__[name] for name in _buffers(sizes, None)}


class ServedBySglang:
    """The engine's modules, found by `engine_sglang.Sglang`."""

    def __init__(self, directory: Path):
        self.fp8 = importlib.import_module("sglang.srt.layers.quantization.fp8")
        self.utils = importlib.import_module("sglang.srt.layers.quantization.utils")
        # under another name, since the adapter readers have a stub in its place
        file = directory / "sglang/srt/layers/moe/fused_moe_triton/layer.py"
        spec = importlib.util.spec_from_file_location("sglang_fused_moe_layer", file)
        self.layer = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.layer)

    def skips(self, declared: dict[str, Any], module: str) -> bool:
        """As in `ServedByVllm`."""
        return self.utils.is_layer_skipped(module, self.fp8.Fp8Config.from_config(declared).ignored_layers)

    def buffers(
        self, tensors: dict[str, torch.Tensor], path: str, names: tuple[str, str, str], sizes: dict[str, int]
    ) -> dict[str, torch.Tensor]:
        """As in `ServedByVllm`."""
        moe = self.layer.FusedMoE
        layer = moe.__new__(moe)
        nn.Module.__init__(layer)
        alone = {f"moe_{kind}_{what}": value for kind in ("tp", "ep") for what, value in (("size", 1), ("rank", 0))}
        of_layer = {
            **alone,
            "quant_config": None,
            "quant_method": SimpleNamespace(),
            "scheme": None,
            "uses_expert_location": False,
            "use_triton_kernels": False,
            "use_presharded_weights": False,
            "use_flashinfer_trtllm_moe": False,
            "num_experts": sizes["experts"],
            "num_local_experts": sizes["experts"],
            "num_fused_shared_experts": 0,
            "_expert_storage_rank": 0,
            "_has_fused_shared": False,
            "_num_global_routed": sizes["experts"],
            "_num_local_routed": sizes["experts"],
            "hidden_size": sizes["hidden"],
            "intermediate_size_per_partition": sizes["intermediate"],
            "moe_runner_config": SimpleNamespace(is_gated=True),
        }
        for name, value in of_layer.items():
            object.__setattr__(layer, name, value)
        buffers = _buffers(sizes, layer.weight_loader)
        mapping = moe.make_expert_params_mapping(*names, sizes["experts"])
        for key, tensor in tensors.items():
            if not key.startswith(f"{path}."):
                continue
            name = "experts." + key.removeprefix(f"{path}.")
            found = [entry for entry in mapping if entry[1] in name]
            assert len(found) == 1, f"{key} was loaded {len(found)} times"
            parameter, of_checkpoint, expert, shard = found[0]
            buffer = buffers[name.replace(of_checkpoint, parameter).removeprefix("experts.")]
            buffer.weight_loader(buffer, tensor, name, shard_id=shard, expert_id=expert)
        return buffers


def _buffers(sizes: dict[str, int], weight_loader: Callable | None) -> dict[str, nn.Parameter]:
    rows = {"w13": (2 * sizes["intermediate"], sizes["hidden"]), "w2": (sizes["hidden"], sizes["intermediate"])}
    found = {}
    for name, shape in rows.items():
        blocks = tuple(size // _BLOCK for size in shape)
        found[f"{name}_weight"] = torch.zeros(sizes["experts"], *shape).to(torch.float8_e4m3fn)
        found[f"{name}_weight_scale_inv"] = torch.ones(sizes["experts"], *blocks)
    parameters = {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in found.items()}
    for parameter in parameters.values():
        parameter.weight_loader, parameter.quant_method = weight_loader, "block"
    return parameters


def decoded(buffers: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """`(E, out, in)` fp32: the weights that a kernel decodes from a buffer and its scales."""
    scales = buffers[f"{name}_weight_scale_inv"].repeat_interleave(_BLOCK, dim=1).repeat_interleave(_BLOCK, dim=2)
    return buffers[f"{name}_weight"].float() * scales
