"""Merging into checkpoints quantized by other tools: into 16 bits, and back into their formats and layouts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors
from peft import PeftModel, get_peft_model
from published_writers import PER_EXPERT, gpt_oss, publish, publish_fused, qwen
from tiny_models import logits, randomize_adapter, tiny_model, token_ids

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.merge.checkpoint import merge_checkpoint
from peft_moe_qlora.merge.quantized import merge_quantized
from peft_moe_qlora.merge.unmerged import load_unmerged, plan_unmerged

TARGETS = ["experts", "q_proj", "o_proj"]


def save_trained(base: Path, adapter: Path, targets=TARGETS, std: float = 0.1, **options) -> torch.Tensor:
    """An adapter with random factors on a checkpoint as loaded; returns the unmerged logits."""
    model = load_quantized(base, dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules=targets, **options))
    randomize_adapter(model, std=std)
    model.save_pretrained(adapter)
    return logits(model.eval(), token_ids())


@pytest.fixture(params=PER_EXPERT, ids=list(PER_EXPERT))
def published(request, tmp_path):
    publish(qwen(), tmp_path / "base", PER_EXPERT[request.param], num_shards=2)
    return tmp_path


class TestInto16Bits:
    def test_stock_transformers_matches_the_unmerged_adapter(self, published):
        expected = save_trained(published / "base", published / "adapter")
        (published / "base" / "hf_quant_config.json").write_text("{}", encoding="utf-8")
        report = merge_checkpoint(
            published / "base", published / "adapter", published / "merged", dtype=torch.float32, progressbar=False
        )
        assert report.tensors_changed == report.tensors_expected > 0
        merged = transformers.AutoModelForCausalLM.from_pretrained(published / "merged", dtype=torch.float32)
        torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=1e-4, atol=1e-4)

    def test_no_codes_remain(self, published):
        save_trained(published / "base", published / "adapter")
        (published / "base" / "hf_quant_config.json").write_text("{}", encoding="utf-8")
        merge_checkpoint(published / "base", published / "adapter", published / "merged", progressbar=False)
        merged = published / "merged"
        assert "quantization_config" not in (merged / "config.json").read_text(encoding="utf-8")
        assert not (merged / "hf_quant_config.json").exists()
        tensors = read_tensors(merged)
        assert not [key for key in tensors if "scale" in key or "packed" in key]
        packed = [key for key in tensors if "proj" in key and key.endswith("weight")]
        assert packed
        config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
        assert {tensors[key].dtype for key in packed} == {getattr(torch, config["dtype"])}
        index = json.loads((merged / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["weight_map"].keys() == tensors.keys()

    def test_base_alone_is_decoded_exactly(self, published):
        """Experts without an adapter, in fp32."""
        save_trained(published / "base", published / "adapter", targets=r".*layers\.0\.mlp\.experts.*")
        merge_checkpoint(
            published / "base", published / "adapter", published / "merged", dtype=torch.float32, progressbar=False
        )
        model = load_quantized(published / "base", dtype=torch.float32, device_map="cpu")
        merged = transformers.AutoModelForCausalLM.from_pretrained(published / "merged", dtype=torch.float32)
        for projection in ("gate_up_proj", "down_proj"):
            stack = model.model.layers[1].mlp.experts.stack(projection)
            found = merged.model.layers[1].mlp.experts.get_parameter(projection)
            assert torch.equal(found, stack.decode(torch.float32))


class TestIntoItsOwnFormat:
    def test_written_weights_equal_the_merged_ones(self, published):
        """Codes and scales, and the unmerged tensors byte by byte."""
        save_trained(published / "base", published / "adapter")
        name = MoeQLoraConfig.from_pretrained(published / "adapter").storage
        report = merge_quantized(
            published / "base", published / "adapter", published / "merged", name, progressbar=False
        )
        assert report.tensors_changed == report.tensors_expected > 0
        before, after = read_tensors(published / "base"), read_tensors(published / "merged")
        assert {key: (one.shape, one.dtype) for key, one in before.items()} == {
            key: (one.shape, one.dtype) for key, one in after.items()
        }
        different = {key for key in before if not torch.equal(bits(before[key]), bits(after[key]))}
        reached = [key for key in before if any(name in key for name in ("experts", "q_proj", "o_proj"))]
        assert different
        assert different <= set(reached)
        for file in ("config.json", "model.safetensors.index.json"):
            assert (published / "merged" / file).read_bytes() == (published / "base" / file).read_bytes()

        live = load_quantized(published / "base", dtype=torch.float32, device_map="cpu")
        live = PeftModel.from_pretrained(live, published / "adapter")
        in_memory = live.merge_and_unload(progressbar=False)
        merged = load_quantized(published / "merged", dtype=torch.float32, device_map="cpu")
        found, expected = merged.state_dict(), in_memory.state_dict()
        assert not [key for key in expected if not torch.equal(found[key], expected[key])]

    def test_checkpoint_is_unchanged_without_a_delta(self, published):
        save_trained(published / "base", published / "adapter", std=0.0)
        name = MoeQLoraConfig.from_pretrained(published / "adapter").storage
        merge_quantized(published / "base", published / "adapter", published / "merged", name, progressbar=False)
        before, after = read_tensors(published / "base"), read_tensors(published / "merged")
        assert not [key for key in before if not torch.equal(bits(before[key]), bits(after[key]))]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


FUSED = {
    "gpt_oss": (lambda: tiny_model("gpt_oss"), gpt_oss, {"quant_method": "mxfp4"}, "mxfp4"),
}


@pytest.mark.parametrize("model_type", FUSED)
def test_fused_checkpoints(model_type, tmp_path):
    make, pack, config, name = FUSED[model_type]
    publish_fused(make(), tmp_path / "base", config, pack)
    expected = save_trained(tmp_path / "base", tmp_path / "adapter", targets=["experts"])
    merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "dense", dtype=torch.float32, progressbar=False
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=1e-4, atol=1e-4)

    merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", name, progressbar=False)
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    assert {key: (one.shape, one.dtype) for key, one in before.items()} == {
        key: (one.shape, one.dtype) for key, one in after.items()
    }
    different = {key for key in before if not torch.equal(bits(before[key]), bits(after[key]))}
    assert different
    assert all("experts" in key for key in different)
    live = PeftModel.from_pretrained(
        load_quantized(tmp_path / "base", dtype=torch.float32, device_map="cpu"), tmp_path / "adapter"
    )
    expected = live.merge_and_unload(progressbar=False).state_dict()
    found = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu").state_dict()
    assert not [key for key in expected if not torch.equal(found[key], expected[key])]


def test_command_line_and_verification(tmp_path, capsys):
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"])
    save_trained(tmp_path / "base", tmp_path / "adapter", targets=["experts"])
    places = [str(tmp_path / name) for name in ("base", "adapter")]
    assert main(["merge", *places, str(tmp_path / "own"), "--quantize", "fp8"]) == 0
    assert main(["merge", *places, str(tmp_path / "dense")]) == 0
    assert "fp8/128x128" in capsys.readouterr().out
    assert main(["merge", *places, str(tmp_path / "other"), "--quantize", "nf4"]) == 1
    error = capsys.readouterr().err
    assert "trained on experts in fp8/128x128, so a merge requantizes them to fp8/128x128 or fp8; found 'nf4'" in error
    assert main(["merge", *places, str(tmp_path / "bnb"), "--quantize", "fp8", "--layout", "bitsandbytes"]) == 1
    assert not (tmp_path / "bnb").exists()


def test_adapter_trained_on_another_storage_of_the_base(tmp_path):
    """The base in FP8, loaded into NF4: merged onto the weights used in training."""
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"])
    config = MoeQuantizationConfig(quantize_linear=False)
    model = load_quantized(tmp_path / "base", config, dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, MoeQLoraConfig(r=4))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model.eval(), token_ids())
    merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32, progressbar=False
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=1e-4, atol=1e-4)


def test_another_base_is_rejected(tmp_path):
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"])
    save_trained(tmp_path / "base", tmp_path / "adapter", targets=["experts"])
    other = qwen()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    publish(other, tmp_path / "other", PER_EXPERT["fp8"])
    for merge in (merge_checkpoint, lambda *where: merge_quantized(*where, "fp8")):
        with pytest.raises(ValueError, match="other weights"):
            merge(tmp_path / "other", tmp_path / "adapter", tmp_path / "merged")


def trained(base: Path, adapter: Path, config: MoeQuantizationConfig | None = None, **options) -> torch.Tensor:
    model = load_quantized(base, config, dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, MoeQLoraConfig(r=4, **options))
    randomize_adapter(model)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.mul_(1.25)
    model.save_pretrained(adapter)
    return logits(model.eval(), token_ids())


def test_decoded_weights_are_requantized_instead_of_cast(tmp_path):
    """A router in FP8 that is trained in full: its codes and its weight have the same key."""
    is_packed = re.compile(r"(_proj|mlp\.gate)\.weight$").search
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"], 1, lambda key: is_packed(key) is not None)
    expected = trained(tmp_path / "base", tmp_path / "adapter", modules_to_save=["gate"], target_modules=["experts"])
    merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", "fp8", progressbar=False)
    merged = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
    base = load_quantized(tmp_path / "base", dtype=torch.float32, device_map="cpu")
    gate = merged.model.layers[0].mlp.gate.weight
    torch.testing.assert_close(gate, 1.25 * base.model.layers[0].mlp.gate.weight, rtol=0.07, atol=1e-3)
    assert (logits(merged, token_ids()) - expected).abs().mean() < 0.5 * expected.abs().mean()


@pytest.mark.parametrize("layout", ["fp8", "int4 in groups of 64, fp16 scales", "nvfp4", "compressed, mxfp4"])
def test_base_layout_is_rejected_for_experts_in_another_format(layout, tmp_path):
    publish(qwen(), tmp_path / "base", PER_EXPERT[layout])
    trained(tmp_path / "base", tmp_path / "adapter", MoeQuantizationConfig(quantize_linear=False))
    places = tmp_path / "base", tmp_path / "adapter"
    with pytest.raises(ValueError, match="base that another tool has quantized in nf4/64"):
        merge_quantized(*places, tmp_path / "merged", "nf4", layout="base", progressbar=False)
    merge_quantized(*places, tmp_path / "merged", "nf4", progressbar=False)
    merged = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
    assert str(merged.model.layers[0].mlp.experts.down_proj.storage) == "nf4/64"


LOADED = {
    "as stored": None,
    "linear layers decoded": MoeQuantizationConfig(
        storage="as stored", quantize_linear=False, packed_linear="16 bits"
    ),
    "linear layers in 4 bits": MoeQuantizationConfig(storage="as stored", packed_linear="4 bits"),
    "experts in 4 bits": MoeQuantizationConfig(quantize_linear=False),
    "experts in int8": MoeQuantizationConfig(storage="int8/channel", quantize_linear=False),
}


@pytest.mark.parametrize("config", LOADED.values(), ids=LOADED.keys())
def test_base_is_reloaded_as_trained(config, tmp_path):
    """By the code that runs the unmerged adapter next to the merge."""
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"])
    expected = trained(
        tmp_path / "base",
        tmp_path / "adapter",
        config,
        target_modules=["experts", "q_proj"],
        storage=config and config.storage if config and config.storage != "as stored" else None,
    )
    model = load_unmerged(plan_unmerged(tmp_path / "base", tmp_path / "adapter", torch.float32), "cpu")
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-5, atol=1e-5)


def test_packed_linear_layers_require_the_packed_base(tmp_path):
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"])
    trained(tmp_path / "base", tmp_path / "adapter", target_modules=["experts", "q_proj"])
    qwen().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="fp8/128x128"):
        plan_unmerged(tmp_path / "dense", tmp_path / "adapter")


def test_packed_head_is_adapted_and_merged(tmp_path):
    """PEFT saves its codes together with the factors."""
    is_packed = re.compile(r"(_proj|lm_head)\.weight$").search
    publish(qwen(), tmp_path / "base", PER_EXPERT["fp8"], 1, lambda key: is_packed(key) is not None)
    expected = trained(tmp_path / "base", tmp_path / "adapter", target_modules=["experts", "lm_head"])
    merge_checkpoint(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=torch.float32, progressbar=False
    )
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=1e-4, atol=1e-4)
