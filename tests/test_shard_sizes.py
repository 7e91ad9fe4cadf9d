"""The computed bytes of a rank, compared with those of a model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_models import VOCABULARY, tiny_model
from torch import distributed
from torch.distributed.tensor import Shard as ShardOf
from torch.distributed.tensor import distribute_tensor

from peft_moe_qlora import MoeQLoraConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from shard_sizes import MODELS, ModelSizes, shard, table

EXPERT_R = 4


def nbytes_of(model: torch.nn.Module, ranks: int) -> dict[str, int]:
    """Bytes on a rank if each parameter is sharded along its first dimension."""
    found = dict.fromkeys(("codes", "scales", "factors", "others"), 0)
    mesh = distributed.init_device_mesh("cpu", (ranks,))
    for name, parameter in model.named_parameters():
        kind = "codes" if name.endswith(".codes") else "others" if parameter.is_floating_point() else "scales"
        kind = "factors" if ".lora_" in name else kind
        local = distribute_tensor(parameter.detach(), mesh, [ShardOf(0)], src_data_rank=None).to_local()
        found[kind] += local.nbytes
    return found


@pytest.fixture
def group(request):
    """Rank 0 of a group of nonexistent processes: nothing is sent."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    distributed.destroy_process_group()


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("group", [1, 2, 4], indirect=True)
def test_bytes_match_a_model(group, double_quant):
    config = MoeQLoraConfig(r=EXPERT_R, target_modules=["experts"], double_quant=double_quant)
    model = get_peft_model(tiny_model(), config)
    whole = sum(p.numel() for name, p in model.named_parameters() if p.is_floating_point() and ".lora_" not in name)
    sizes = ModelSizes(2, 2, 8, 64, 32, 2, VOCABULARY, whole)
    computed = shard(sizes, group, tokens=24, expert_r=EXPERT_R, double_quant=double_quant, other_bytes=4)
    found = nbytes_of(model, group)
    assert {kind: getattr(computed, kind) for kind in found} == found


def test_optimizer_and_gradients_match_a_step():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=EXPERT_R, target_modules=["experts"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    computed = shard(ModelSizes(2, 2, 8, 64, 32, 2, VOCABULARY, 0), 1, tokens=4, expert_r=EXPERT_R)
    assert computed.gradients == sum(parameter.grad.nbytes for parameter in trained)
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    assert computed.optimizer == sum(value.nbytes for value in moments)


def test_bytes_scale_with_the_number_of_ranks():
    eight, sixteen = (shard(MODELS["deepseek-v3"], ranks, 4096) for ranks in (8, 16))
    assert eight.resident == pytest.approx(2 * sixteen.resident)
    assert eight.gathered == sixteen.gathered
    assert "deepseek-v3" in table({"deepseek-v3": eight})
