"""Experts modules that other tools have changed before: sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from peft import get_peft_model
from tiny_models import tiny_config, tiny_model
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, quantize_experts


@pytest.fixture
def mesh() -> Iterator[distributed.DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(experts: nn.Module, mesh: distributed.DeviceMesh) -> None:
    """By expert, as FSDP and expert parallelism shard."""
    for module in experts.modules():
        for name, parameter in list(module._parameters.items()):
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module._parameters[name] = nn.Parameter(sharded, requires_grad=False)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_sharded_experts_are_rejected(is_quantized, mesh):
    """By every operation."""
    model = tiny_model()
    if is_quantized:
        quantize_experts(model, progressbar=False)
    shard(model.model.layers[1].mlp.experts, mesh)
    message = r"^model\.layers\.1\.mlp\.experts is sharded over processes; .* Load the model without"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoeQLoraConfig(r=2))
    with pytest.raises(ValueError, match=message):
        quantize_experts(model)


def test_second_adapter_on_a_sharded_model_is_rejected(mesh):
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2))
    shard(model.base_model.model.model.layers[1].mlp.experts, mesh)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts is sharded over processes"):
        model.add_adapter("other", MoeQLoraConfig(r=2))


def test_expert_parallel_experts_are_rejected():
    model = tiny_model()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts is sharded over processes"):
        get_peft_model(model, MoeQLoraConfig(r=2))


def test_sharded_loading_into_4_bits_is_rejected(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = tiny_config("qwen3_moe")
    config.distributed_config = DistributedConfig()  # as from_pretrained does with this argument
    with pytest.raises(ValueError, match="distributed_config is not supported with a MoeQuantizationConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config, quantization_config=MoeQuantizationConfig())
