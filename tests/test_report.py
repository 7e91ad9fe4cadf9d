"""The report matches the model."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model

from peft_moe_qlora import MoeQLoraConfig, experts_report, quantize_experts
from peft_moe_qlora.experts import quantized


@pytest.mark.parametrize(
    ("options", "bits"),
    [({}, 4 + 32 / 64), ({"blocksize": 128}, 4 + 32 / 128), ({"quant_type": "fp4"}, 4 + 32 / 64)],
    ids=str,
)
def test_sizes_follow_from_the_format(options, bits):
    report = quantize_experts(tiny_model(dtype=torch.bfloat16), progressbar=False, **options)
    assert report.num_weights == 2 * 8 * (64 * 64 + 64 * 32)
    assert report.nbytes == report.num_weights * bits / 8
    assert report.dense_nbytes == report.num_weights * 2


def test_report_counts_adapters_and_names_the_path():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(expert_r=3, layers_to_transform=[1]))
    model.add_adapter("other", MoeQLoraConfig(expert_r=2, target_modules=["down_proj"]))
    report = model.experts_report()
    stacks = {(stack.path, stack.projection): stack for stack in report.stacks}
    assert len(stacks) == 4
    plain = stacks["model.layers.0.mlp.experts", "gate_up_proj"]
    assert plain.ranks == {}
    adapted = stacks["model.layers.1.mlp.experts", "down_proj"]
    assert adapted.ranks == {"default": 3, "other": 2}
    assert adapted.num_adapter_parameters == {"default": 8 * 3 * (64 + 32), "other": 8 * 2 * (64 + 32)}
    assert adapted.trainable == ("default",)
    assert adapted.storage == "nf4/64"
    assert adapted.architecture == "Qwen3MoeExperts"
    assert adapted.compute_path.startswith("loop (")
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.num_trainable_parameters == trainable
    assert json.loads(json.dumps(report.to_dict()))["stacks"][0]["storage"] == "nf4/64"


@pytest.fixture
def fusing(monkeypatch) -> None:
    """As if on a GPU that the kernels support."""
    monkeypatch.setattr(quantized, "why_no_kernels", lambda device, dtype: None)
    monkeypatch.setattr(quantized, "tiles_origin", lambda device, dtype: "some tiles")


def paths_and_what_ran(model: PeftModel, monkeypatch) -> tuple[set[str], bool]:
    """The paths that the report names, and whether a forward then uses the fused layer."""
    ran = []

    def fused(self, hidden_states, *_):
        ran.append(self)
        return torch.zeros_like(hidden_states)

    paths = {stack.compute_path for stack in model.experts_report().stacks}
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(quantized.QuantizedExperts, "_fused", fused)
        model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    return paths, bool(ran)


@pytest.mark.usefixtures("fusing")
def test_path_of_the_active_adapters_in_the_current_mode(monkeypatch):
    """The reported path is the one that runs."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, lora_dropout=0.1)).eval()
    model.add_adapter("large", MoeQLoraConfig(r=129))
    model.add_adapter("plain", MoeQLoraConfig(r=128))

    def path_of(adapter_name: str) -> str:
        model.set_adapter(adapter_name)
        (path,), ran_fused = paths_and_what_ran(model, monkeypatch)
        assert path.startswith("fused (") == ran_fused
        return path

    assert path_of("plain") == "fused (silu gate, some tiles)"
    assert path_of("default") == "fused (silu gate, some tiles; not fused in training: LoRA dropout)"
    assert path_of("large").endswith(
        "; not fused: the adapters' ranks add up to 129; the kernels support at most 128)"
    )
    model.train()
    assert path_of("plain") == "fused (silu gate, some tiles)"
    assert path_of("default").endswith("; not fused: LoRA dropout)")
    with model.disable_adapter():
        assert paths_and_what_ran(model, monkeypatch) == ({"fused (silu gate, some tiles)"}, True)
    model.merge_adapter()
    assert paths_and_what_ran(model, monkeypatch) == ({"fused (silu gate, some tiles)"}, True)


def test_printed_report_shows_every_stack_and_the_totals():
    model = get_peft_model(tiny_model(), MoeQLoraConfig(expert_r=3))
    model.merge_adapter()
    text = str(model.experts_report())
    for path in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        assert path in text
    assert "default: 3" in text
    assert f"{model.experts_report().num_weights:,} weights" in text


def test_unconverted_model_is_reported_unchanged():
    report = experts_report(tiny_model(dtype=torch.bfloat16))
    assert {stack.storage for stack in report.stacks} == {"bfloat16"}
    assert report.nbytes == report.dense_nbytes
