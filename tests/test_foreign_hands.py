"""Experts that something else has changed before or after: Liger's forward, sharding over processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_config, tiny_model
from torch import distributed, nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe import modeling_qwen3_moe

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_experts, load_quantized, quantize_experts

REMEDY = r"liger_kernel_config={'swiglu': False}"


class LigerExperts(nn.Module):
    """As Liger's: named so, with the same parameters, and without a declaration."""

    def __init__(self, config) -> None:
        super().__init__()
        E, H, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return hidden_states


def patch(model: nn.Module) -> None:
    """As a Trainer does it with `use_liger_kernel=True`."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.__dict__["forward"] = LigerExperts.forward.__get__(experts, type(experts))
        experts.__dict__["_get_name"] = lambda: "LigerExperts"


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers adapted", "one layer left alone"])
def test_a_forward_of_ligers_is_refused(layers):
    """When the Trainer puts the model into training mode."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2, layers_to_transform=layers)).train()
    patch(model.base_model.model)
    if layers is not None:
        del model.base_model.model.model.layers[1].mlp.experts.__dict__["forward"]
    with pytest.raises(ValueError, match=rf"replaced the forward of Qwen3MoeExperts .*{REMEDY}"):
        model.train()


def test_a_model_that_liger_has_patched_before_gets_its_own_forward():
    """Which it keeps when it is adapted."""
    model, expected = tiny_model(), get_peft_model(tiny_model(), MoeQLoraConfig(r=2))
    patch(model)
    model = get_peft_model(model, MoeQLoraConfig(r=2)).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)


def test_a_class_of_ligers_is_named(monkeypatch, tmp_path):
    """In the place of the model's own, for as long as the process runs."""
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", LigerExperts)
    message = rf"model\.layers\.0\.mlp\.experts is of class LigerExperts.*{REMEDY}"
    with pytest.raises(ValueError, match=message):
        load_quantized(str(tmp_path), MoeQuantizationConfig(), device_map="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for call in (quantize_experts, lambda model: get_peft_model(model, MoeQLoraConfig())):
        with pytest.raises(ValueError, match=message):
            call(model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match=message):
        load_experts(model, tmp_path)


@pytest.fixture
def mesh() -> Iterator[distributed.DeviceMesh]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield distributed.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def shard(experts: nn.Module, mesh: distributed.DeviceMesh) -> None:
    """By expert, as FSDP and expert parallelism do."""
    for module in experts.modules():
        for name, parameter in list(module._parameters.items()):
            sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
            module._parameters[name] = nn.Parameter(sharded, requires_grad=False)


@pytest.mark.parametrize("is_quantized", [False, True])
def test_sharded_experts_are_refused(is_quantized, mesh):
    """Whatever is to be done with them."""
    model = tiny_model()
    if is_quantized:
        quantize_experts(model, progressbar=False)
    shard(model.model.layers[1].mlp.experts, mesh)
    message = r"^model\.layers\.1\.mlp\.experts is sharded over processes; .* Load the model without"
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoeQLoraConfig(r=2))
    with pytest.raises(ValueError, match=message):
        quantize_experts(model)


def test_a_second_adapter_on_a_sharded_model_is_refused(mesh):
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2))
    shard(model.base_model.model.model.layers[1].mlp.experts, mesh)
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.experts is sharded over processes"):
        model.add_adapter("other", MoeQLoraConfig(r=2))


def test_experts_spread_over_processes_are_refused():
    model = tiny_model()
    model.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts is sharded over processes"):
        get_peft_model(model, MoeQLoraConfig(r=2))


def test_loading_sharded_into_4_bits_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = tiny_config("qwen3_moe")
    config.distributed_config = DistributedConfig()  # as from_pretrained does it with the argument of that name
    with pytest.raises(ValueError, match="distributed_config can't be used with a MoeQuantizationConfig"):
        AutoModelForCausalLM.from_pretrained(tmp_path, config=config, quantization_config=MoeQuantizationConfig())
