"""vLLM's own code from an adapter's directory to the buffers that its kernels read, on a CPU."""

from __future__ import annotations

import ast
import collections
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engine_sources import SourcesFinder, unpacked

REQUIREMENT = "vllm==0.33.0"
_WANTED = (
    "vllm.lora.layers.base",
    "vllm.lora.layers.fused_moe",
    "vllm.lora.lora_model",
    "vllm.lora.lora_weights",
    "vllm.lora.model_manager",
    "vllm.lora.peft_helper",
    "vllm.lora.utils",
    "vllm.model_executor.layers.fused_moe.routed_experts",
    "vllm.model_executor.layers.quantization.base_config",
    "vllm.model_executor.layers.quantization.fp8",
    "vllm.model_executor.layers.quantization.utils.quant_utils",
    "vllm.model_executor.models.utils",
)
_FILES = tuple(f"{name.replace('.', '/')}.py" for name in _WANTED)
_MODELS = "vllm/model_executor/models/"
_LORA_CONFIG = SimpleNamespace(
    max_loras=1,
    max_lora_rank=16,
    lora_dtype=torch.float32,
    fully_sharded_loras=False,
    enable_moe_shared_loras=False,
)

# class -> its file, and its name of an experts module
MODELS = {
    "DeepseekV3ForCausalLM": ("deepseek_v2", "model.layers.{}.mlp.experts"),
    "Gemma4ForCausalLM": ("gemma4", "model.layers.{}.experts"),
    "GptOssForCausalLM": ("gpt_oss", "model.layers.{}.mlp.experts"),
    "GraniteMoeForCausalLM": ("granitemoe", "model.layers.{}.block_sparse_moe.experts"),
    "Lfm2MoeForCausalLM": ("lfm2_moe", "model.layers.{}.feed_forward.experts"),
    "MiniMaxM2ForCausalLM": ("minimax_m2", "model.layers.{}.block_sparse_moe.experts"),
    "MixtralForCausalLM": ("mixtral", "model.layers.{}.block_sparse_moe.experts"),
    "NemotronHForCausalLM": ("nemotron_h", "model.layers.{}.mixer.experts"),
    "OlmoeForCausalLM": ("olmoe", "model.layers.{}.mlp.experts"),
    "PhimoeForCausalLM": ("phimoe", "model.layers.{}.block_sparse_moe.experts"),
    "Qwen2MoeForCausalLM": ("qwen2_moe", "model.layers.{}.mlp.experts"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "model.layers.{}.mlp.experts"),
    "Qwen3NextForCausalLM": ("qwen3_next", "model.layers.{}.mlp.experts"),
    "Qwen3VLMoeForConditionalGeneration": ("qwen3_vl_moe", "language_model.model.layers.{}.mlp.experts"),
    "Qwen3_5MoeForCausalLM": ("qwen3_5", "model.layers.{}.mlp.experts"),
    "Qwen3_5MoeForConditionalGeneration": ("qwen3_5", "language_model.model.layers.{}.mlp.experts"),
}
_CLASS_THERE = {"PhimoeForCausalLM": "PhiMoEForCausalLM"}


class Vllm:
    """The engine's modules.

    Args:
        cache: directory for its files.

    Raises:
        NotAvailable: the wheel can't be downloaded.
    """

    name = REQUIREMENT

    def __init__(self, cache: Path):
        directory = unpacked(REQUIREMENT, (*_FILES, _MODELS), cache)
        self.directory, self.models = directory, directory / _MODELS
        numbered = SimpleNamespace(build_initial_global_physical_to_logical_map=lambda n, _: list(range(n)))
        given = {
            "vllm.utils.torch_utils": {"PIN_MEMORY": False},
            "vllm.distributed.eplb.eplb_state": {"EplbState": numbered},
        }
        sys.meta_path.insert(0, SourcesFinder("vllm", directory, _WANTED, given))
        layers = importlib.import_module("vllm.lora.layers.fused_moe")
        package = importlib.import_module("vllm.lora.layers")
        package.FusedMoEWithLoRA, package.FusedMoE3DWithLoRA = layers.FusedMoEWithLoRA, layers.FusedMoE3DWithLoRA
        self.layers = layers
        for name in ("lora.model_manager", "lora.lora_model", "lora.peft_helper"):
            setattr(self, name.rpartition(".")[2], importlib.import_module(f"vllm.{name}"))
        self.model_utils = importlib.import_module("vllm.model_executor.models.utils")
        self.routed = importlib.import_module("vllm.model_executor.layers.fused_moe.routed_experts")

    def products(self, adapter: Path, class_name: str, sizes: dict[str, int]) -> dict[int, tuple[torch.Tensor, ...]]:
        """The deltas of the experts that an adapter adds, read from the buffers.

        Args:
            adapter: the directory.
            class_name: of the model in transformers.
            sizes: `layers`, `experts`, `hidden`, `intermediate`.

        Returns:
            Number of a layer -> deltas of the weights `w13` `(E, 2 I, H)` and `w2` `(E, H, I)`; the rows of w13 in the
            order of this engine's base.
        """
        file, path = MODELS[class_name]
        source = ModelSource(self.models, self.model_utils.WeightsMapper)
        is_3d = source.attribute(file, _CLASS_THERE.get(class_name, class_name), "is_3d_moe_weight") is True
        is_gated = source.expert_names(file)[2] is not None
        peft_helper = self.peft_helper.PEFTHelper.from_local_dir(str(adapter), None)
        peft_helper.validate_legal(_LORA_CONFIG)
        paths = [path.format(layer) for layer in range(sizes["layers"])]
        packed = [] if is_3d else [entry[1].rstrip(".") for entry in self._mapping(source.expert_names(file), sizes)]
        linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        mapper = source.attribute(file, _CLASS_THERE.get(class_name, class_name), "hf_to_vllm_mapper")
        lora = self.lora_model.LoRAModel.from_local_checkpoint(
            str(adapter),
            {*packed, *linear, "experts"},
            peft_helper=peft_helper,
            lora_model_id=1,
            device="cpu",
            dtype=torch.float32,
            weights_mapper=mapper.get_rename_mapper() if mapper is not None else None,
        )
        manager = self._manager({one: self._layer(is_3d, is_gated, class_name, sizes) for one in paths}, packed, is_3d)
        manager._is_non_gated_moe = not is_gated
        manager._create_merged_loras_inplace(lora)
        manager._registered_adapters = {1: lora}
        manager.activate_adapter(1)
        return {number: _products(manager.modules[one]) for number, one in enumerate(paths)}

    def _mapping(self, names: tuple[str, str, str | None], sizes: dict[str, int]) -> list[tuple]:
        build = self.routed.RoutedExperts.build_expert_params_mapping
        mapping = build(*names, sizes["experts"], is_gated=names[2] is not None)
        return [entry for entry in mapping if entry[1].startswith("experts.")]

    def _layer(self, is_3d: bool, is_gated: bool, class_name: str, sizes: dict[str, int]) -> Any:
        layer_class = self.layers.FusedMoE3DWithLoRA if is_3d else self.layers.FusedMoEWithLoRA
        layer = layer_class.__new__(layer_class)
        torch.nn.Module.__init__(layer)
        layer.moe_config = SimpleNamespace(
            hidden_dim=sizes["hidden"],
            num_local_experts=sizes["experts"],
            num_experts=sizes["experts"],
            moe_parallel_config=SimpleNamespace(ep_rank=0, use_ep=False),
            intermediate_size_per_partition=sizes["intermediate"],
            intermediate_size_per_partition_unpadded=None,
        )
        layer.tp_size, layer.tp_rank, layer.device = 1, 0, torch.device("cpu")
        layer._w13_slices = 1 if is_3d or not is_gated else 2
        layer.enable_moe_shared_loras = False
        layer.create_lora_weights(1, _LORA_CONFIG, SimpleNamespace(architectures=[class_name]))
        return layer

    def _manager(self, modules: dict[str, Any], packed: list[str], is_3d: bool) -> Any:
        manager = self.model_manager.LoRAModelManager.__new__(self.model_manager.LoRAModelManager)
        manager.modules = modules
        manager.packed_modules_mapping = {"experts": packed}
        manager.packed_modules = {}
        for name in modules:
            manager._register_packed_modules(name)
        manager.is_pooling_model = manager.supports_mm = False
        manager._enable_moe_shared_loras = manager._enable_mixed_moe_lora_format = False
        manager._is_3d_moe_model, manager._use_ep, manager.moe_ep_load_spec = is_3d, False, None
        manager.lora_index_to_id, manager._active_adapters = [None], collections.OrderedDict()
        return manager


def _products(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    w13 = torch.cat([B[0] @ A[0] for A, B in zip(layer.w13_lora_a_stacked, layer.w13_lora_b_stacked)], dim=1)
    return w13, layer.w2_lora_b_stacked[0][0] @ layer.w2_lora_a_stacked[0][0]


class ModelSource:
    """The source of the model files, parsed without running them, since they import kernels."""

    def __init__(self, directory: Path, weights_mapper: type):
        self.directory, self.weights_mapper = directory, weights_mapper

    def attribute(self, file: str, class_name: str, name: str) -> Any:
        """Value of a class attribute, also inherited, or None."""
        tree = ast.parse((self.directory / f"{file}.py").read_text())
        classes = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
        if class_name not in classes:
            imported = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1)
            for node in imported:
                if node.module and any((alias.asname or alias.name) == class_name for alias in node.names):
                    return self.attribute(node.module, class_name, name)
            return None
        for statement in classes[class_name].body:
            targets = getattr(statement, "targets", [getattr(statement, "target", None)])
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return self._value(file, statement.value)
        for base in classes[class_name].bases:
            if isinstance(base, ast.Name):
                value = self.attribute(file, base.id, name)
                if value is not None:
                    return value
        return None

    def _value(self, file: str, node: ast.expr) -> Any:
        if isinstance(node, ast.BinOp):
            return self._value(file, node.left) | self._value(file, node.right)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            return self.attribute(file, node.value.id, node.attr)
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "WeightsMapper":
            return self.weights_mapper(**{option.arg: ast.literal_eval(option.value) for option in node.keywords})
        return ast.literal_eval(node)

    def expert_names(self, file: str) -> tuple[str, str, str | None]:
        """The checkpoint's names of gate, down and up projection: `ckpt_names` of FusedMoE."""
        for node in ast.walk(ast.parse((self.directory / f"{file}.py").read_text())):
            if isinstance(node, ast.keyword) and node.arg == "ckpt_names":
                return ast.literal_eval(node.value)
        return ("gate_proj", "down_proj", "up_proj")
