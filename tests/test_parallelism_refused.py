"""Kinds of parallelism that packed experts do not support are rejected by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, QuantizedExperts, quantize_experts

ROUTES = ["file", "memory", "injected"]


def base(route: str, directory) -> torch.nn.Module:
    model = tiny_model()
    if route == "file":
        model.save_pretrained(directory)
        storage = MoeQuantizationConfig(quantize_linear=False)
        return AutoModelForCausalLM.from_pretrained(directory, quantization_config=storage)
    if route == "memory":
        quantize_experts(model, progressbar=False)
    return model


@pytest.fixture
def accelerate_fsdp(monkeypatch):
    """Sets accelerate's state to a version of FSDP, for which it requires GPUs."""

    def set_up(version: int) -> None:
        state = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": SimpleNamespace(fsdp_version=version)}
        PartialState()
        monkeypatch.setattr(PartialState, "_shared_state", {**PartialState._shared_state, **state})
        whole = {**PartialState._shared_state, "_mixed_precision": "no"}  # this marks it as set up
        monkeypatch.setattr(AcceleratorState, "_shared_state", whole)

    return set_up


FSDP1 = r"accelerate is configured for FSDP1 \(fsdp_version: 1\).* Set fsdp_version: 2"


@pytest.mark.parametrize("route", ROUTES)
def test_fsdp1_is_rejected_by_an_adapter(route, tmp_path, accelerate_fsdp):
    """As in a script that creates its Accelerator first."""
    model = base(route, tmp_path)
    accelerate_fsdp(1)
    with pytest.raises(ValueError, match=FSDP1):
        get_peft_model(model, MoeQLoraConfig(r=2))
    accelerate_fsdp(2)
    get_peft_model(model, MoeQLoraConfig(r=2))


@pytest.mark.parametrize("route", ROUTES)
def test_fsdp1_is_rejected_by_a_trainer(route, tmp_path, accelerate_fsdp, monkeypatch):
    model = get_peft_model(base(route, tmp_path), MoeQLoraConfig(r=2))
    args = TrainingArguments(tmp_path / "out", use_cpu=True, report_to=[])
    create_accelerator = Trainer.create_accelerator_and_postprocess

    def create_for_fsdp1(self: Trainer) -> None:
        create_accelerator(self)
        accelerate_fsdp(1)

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_for_fsdp1)
    with pytest.raises(ValueError, match=FSDP1):
        Trainer(model, args)


def test_16_bit_experts_are_accepted_with_fsdp1(accelerate_fsdp):
    accelerate_fsdp(1)
    get_peft_model(tiny_model(), MoeQLoraConfig(r=2, quant_type=None))


@pytest.mark.parametrize("route", ROUTES)
def test_trainer_uses_one_of_several_gpus(route, tmp_path):
    """A Trainer wraps a model in nn.DataParallel unless it is marked as 4-bit."""
    model = get_peft_model(base(route, tmp_path), MoeQLoraConfig(r=2))
    assert model.is_loaded_in_4bit


@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_replicas_are_rejected(quant_type):
    """`nn.DataParallel` creates them, whoever wraps the model."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2, quant_type=quant_type))
    experts = next(module for module in model.modules() if isinstance(module, QuantizedExperts))
    rows, ids = torch.randn(3, 64), torch.zeros(3, 2, dtype=torch.long)
    experts(rows, ids, torch.ones(3, 2))
    with pytest.raises(ValueError, match=r"Qwen3MoeExperts is a replica of nn\.DataParallel, .* one process per GPU"):
        experts._replicate_for_data_parallel()(rows, ids, torch.ones(3, 2))
    assert model(input_ids=token_ids()).logits.isfinite().all()


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2}, {"tp_size": 2, "ep_size": 2}])
def test_distributed_config_is_rejected(sizes, tmp_path):
    """With any kind of sharding, when the model is loaded in 4 bits and when an adapter is added later."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    try:
        distributed_config = DistributedConfig(**sizes)
    except TypeError:
        pytest.skip("this transformers has no expert parallelism of its own")
    model.config.distributed_config = distributed_config  # as from_pretrained does, which requires several processes
    with pytest.raises(ValueError, match=r"distributed_config is not supported with .* shard it after all adapters"):
        AutoModelForCausalLM.from_pretrained(
            tmp_path, config=model.config, quantization_config=MoeQuantizationConfig()
        )
    for quant_type in ("nf4", None):
        with pytest.raises(ValueError, match=r"^Qwen3MoeForCausalLM was loaded with a distributed_config; experts"):
            get_peft_model(model, MoeQLoraConfig(r=2, quant_type=quant_type))
    with pytest.raises(ValueError, match=r"^Qwen3MoeForCausalLM was loaded with a distributed_config; experts"):
        quantize_experts(model, progressbar=False)
