"""Merging into a 4-bit checkpoint, and verifying a merge."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from checkpoint_writers import read_tensors, write_tensors
from merged_checkpoints import merge as merge_on_disk
from merged_checkpoints import save_adapter
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from shrunken_models import shrunken_model_or_skip
from texts import write_text, write_tokenizer
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.layouts import convert_adapter
from peft_moe_qlora.merge import merge_quantized, verify_merge
from peft_moe_qlora.merge.partial_directory import PartialDirectory

EXPERTS_ONLY = MoeQuantizationConfig(quantize_linear=False)


def merge(directory, **options):
    return merge_quantized(
        directory / "base", directory / "adapter", directory / "merged", progressbar=False, **options
    )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("layout", ["native", "bitsandbytes"])
@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
def test_reloaded_weights_equal_merging_in_memory(model_type, layout, rounding, tmp_path):
    """Bit by bit, in either layout, and the report describes it."""
    model = save_adapter(tmp_path, model_type)
    report = merge(tmp_path, layout=layout, rounding=rounding)
    found = load_quantized(str(tmp_path / "merged"), dtype=torch.float32, device_map="cpu")
    expected = model.merge_and_unload(rounding=rounding)
    assert torch.equal(logits(found, token_ids()), logits(expected, token_ids()))
    assert len(report.stacks) == 4
    assert all(0 < row.relative_error < 0.2 and row.delta_kept > 0.9 for row in report.stacks)
    assert report.tensors_expected == report.tensors_changed > len(report.stacks)
    assert report.tensors_written == len(read_tensors(tmp_path / "merged"))
    written = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert written["tensors_written"] == report.tensors_written
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["num_local_experts"] == config["num_experts"]


def test_modules_trained_in_full_are_in_the_merged_model(tmp_path):
    """PEFT inserts them; the count of changes includes them."""
    model = save_adapter(tmp_path, "qwen3_moe", target_modules=["experts"], modules_to_save=["model.norm", "lm_head"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path, rounding="nearest")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    written = read_tensors(tmp_path / "merged")
    for name in ("model.norm.weight", "lm_head.weight"):
        before = read_tensors(tmp_path / "base")[name]
        assert torch.equal(written[name], trained[f"base_model.model.{name}"])
        assert not torch.equal(written[name], before)
    assert report.tensors_expected == report.tensors_changed == 4 + 2


@pytest.mark.parametrize("is_packed", [False, True])
def test_linear_layers_in_4_bits(is_packed, tmp_path):
    """From an unquantized base, or from one saved in 4 bits."""
    tiny_model().save_pretrained(tmp_path / "unquantized")
    quantization = MoeQuantizationConfig(double_quant=True, skip_modules=["layers.1.mlp.experts", "k_proj"])
    model = load_quantized(str(tmp_path / "unquantized"), quantization, dtype=torch.float32, device_map="cpu")
    if is_packed:
        model.save_pretrained(tmp_path / "base")
    else:
        shutil.copytree(tmp_path / "unquantized", tmp_path / "base")
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules="all-linear", double_quant=True)).eval()
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    # on a CPU with AVX512-BF16, bitsandbytes repacks the layers in a forward, and PEFT would merge them wrongly
    assert merge(tmp_path).check.problem is None
    found = load_quantized(str(tmp_path / "merged"), dtype=torch.float32, device_map="cpu")
    names = {name for name, module in found.named_modules() if type(module).__name__ == "Linear4bit"}
    assert names == {f"model.layers.{n}.self_attn.{p}_proj" for n in (0, 1) for p in "qvo"}
    assert found.model.layers[1].mlp.experts.is_dense
    expected = model.merge_and_unload()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_invalid_merges_are_rejected(tmp_path):
    """By name, and with nothing written, also in a dry run."""
    save_adapter(tmp_path, double_quant=True)
    with pytest.raises(ValueError, match=r"trained on experts in nf4/64\+dq, so .* to nf4/64\+dq or nf4; found 'fp4'"):
        merge(tmp_path, quant_type="fp4")
    with pytest.raises(ValueError, match="layout='gguf' is unknown"):
        merge(tmp_path, layout="gguf")
    report = merge(tmp_path, dry_run=True)
    assert report.tensors_written == 0
    assert not list(tmp_path.glob("merged*"))
    merge(tmp_path)
    with pytest.raises(ValueError, match="merged is not empty"):
        merge(tmp_path)
    with pytest.raises(ValueError, match="adapter is already merged into"):
        merge_quantized(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")


def test_base_with_other_weights(tmp_path):
    """Detected by the adapter's samples of an unquantized base, and by loading a quantized one."""
    save_adapter(tmp_path)
    tiny_model(std=0.3).save_pretrained(tmp_path / "base")
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="other weights than the adapter was trained on"):
            merge(tmp_path, dry_run=dry_run)
    load_quantized(str(tmp_path / "base"), EXPERTS_ONLY, dtype=torch.float32, device_map="cpu").save_pretrained(
        tmp_path / "packed"
    )
    shutil.rmtree(tmp_path / "base")
    (tmp_path / "packed").rename(tmp_path / "base")
    with pytest.raises(ValueError, match="is not the base model of"):
        merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))


def test_tensors_that_the_model_does_not_load_are_reported(tmp_path):
    """Such as layers for speculative decoding, which are omitted."""
    save_adapter(tmp_path)
    write_tensors(tmp_path / "base", {**read_tensors(tmp_path / "base"), "mtp.layers.0.weight": torch.ones(2)})
    assert "1 tensors that the model does not load are omitted, mtp.layers.0.weight" in merge(tmp_path).notes[0]


def test_delta_that_is_lost_in_4_bits(tmp_path):
    """An error, or a note if allowed."""
    save_adapter(tmp_path, std=1e-6)
    with pytest.raises(ValueError, match="are unchanged after the merge, model"):
        merge(tmp_path, rounding="nearest")
    assert not list(tmp_path.glob("merged*"))
    report = merge(tmp_path, rounding="nearest", allow_unchanged=True)
    assert report.tensors_changed < report.tensors_expected
    assert "stacks and layers whose deltas are lost" in report.notes[0]


def test_adapter_of_some_layers(tmp_path):
    """The report contains only the merged stacks."""
    save_adapter(tmp_path, target_modules=["experts.down_proj"], layers_to_transform=[1])
    report = merge(tmp_path)
    assert [row.name for row in report.stacks] == ["model.layers.1.mlp.experts.down_proj"]


def test_untrained_weights_are_not_expected_to_change(tmp_path):
    """One stack and one linear layer with zero B; an embedding has other names of factors, and counts."""
    model = save_adapter(tmp_path, target_modules=["experts", "q_proj", "embed_tokens"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0" in name and ("experts.down_proj.lora_B" in name or "q_proj.lora_B" in name):
                parameter.zero_()
    model.save_pretrained(tmp_path / "adapter")
    expected = merge(tmp_path, dry_run=True).tensors_expected
    report = merge(tmp_path)
    assert report.tensors_changed == report.tensors_expected == expected == 3 + 1 + 1


def test_calibration_text_determines_the_rounding(tmp_path):
    """The result equals merging in memory with the same tokens, and differs from that with random ones."""
    model = save_adapter(tmp_path, target_modules=["experts"])
    write_tokenizer(tmp_path / "base")
    write_text(tmp_path / "text.txt", token_ids())
    report = merge(tmp_path, calibration=tmp_path / "text.txt")
    assert report.storage == "nf4/64, second-order rounding"
    found = load_quantized(str(tmp_path / "merged"), dtype=torch.float32, device_map="cpu")
    random = copy.deepcopy(model).merge_and_unload()
    expected = model.merge_and_unload(calibration=token_ids().view(1, -1))
    assert torch.equal(logits(found, token_ids()), logits(expected, token_ids()))
    assert not torch.equal(logits(random, token_ids()), logits(expected, token_ids()))


def test_leftovers_of_a_killed_run(tmp_path, monkeypatch):
    """They cannot be reused, so any other merge replaces them; those of a merge into 16 bits are kept."""
    save_adapter(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PartialDirectory, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path, rounding="nearest")
        assert not (tmp_path / "merged.partial").exists()
        patch.setattr(PartialDirectory, "discard", lambda self: None)  # as if the process had been killed at once
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path, rounding="nearest")
        with pytest.raises(KeyboardInterrupt):
            merge_on_disk(tmp_path, out="other", onto="base")
    save_file({"left": torch.ones(1)}, tmp_path / "merged.partial" / "left.safetensors")
    merge(tmp_path, rounding="second-order")
    assert "left" not in read_tensors(tmp_path / "merged")
    with pytest.raises(ValueError, match="contains unfinished work of another merge"):
        merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "other", progressbar=False)


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_verifying(trained, tmp_path, capsys):
    """The command's figures equal those of a direct comparison."""
    directory, ids = trained
    shutil.copytree(directory / "base", tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    write_text(tmp_path / "text.txt", ids)
    paths = [str(tmp_path / "base"), str(directory / "adapter")]
    found = {}
    for name, options in {
        "dense": [],
        "nearest": ["--quantize", "nf4", "--rounding", "nearest"],
        "random": ["--quantize", "nf4"],
        "text": ["--quantize", "nf4", "--calibration", str(tmp_path / "text.txt"), "--layout", "bitsandbytes"],
    }.items():
        command = ["merge", *paths, str(tmp_path / name), *options, "--verify", str(tmp_path / "text.txt"), "--json"]
        assert main(command) == 0
        output = capsys.readouterr().out
        report = json.loads(output[output.index("{") :])
        assert report == json.loads((tmp_path / name / "merge_report.json").read_text())
        found[name] = report["verification"]
    assert all(one["num_tokens"] == 64 * 24 for one in found.values())
    assert all(one["kl_of_base"] >= 0.5 for one in found.values())
    assert abs(found["dense"]["kl"]) <= 1e-8
    assert found["dense"]["equal_argmax"] == 1
    assert found["random"]["kl"] <= 0.5 * found["nearest"]["kl"]
    assert found["text"]["kl"] <= 0.5 * found["nearest"]["kl"]
    assert found["nearest"]["equal_argmax"] < found["text"]["equal_argmax"] < 1

    assert main(["verify", str(tmp_path / "nearest"), str(tmp_path / "text.txt"), "--json"]) == 0
    output = capsys.readouterr().out
    assert json.loads(output[output.index("{") :])["verification"] == found["nearest"]

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, directory / "adapter").eval()
    merged = load_quantized(str(tmp_path / "nearest"), dtype=torch.float32, device_map="cpu")
    windows = ids.view(3, 512)
    live, other = (logits(one, windows).double().log_softmax(dim=-1) for one in (model, merged))
    kl = (live.exp() * (live - other)).sum(dim=-1).mean().item()
    assert found["nearest"]["kl"] == pytest.approx(kl, rel=1e-3)


def test_text_of_one_word(tmp_path, capsys):
    """Too short to compare anything: reported before the merge."""
    save_adapter(tmp_path)
    write_tokenizer(tmp_path / "base")
    (tmp_path / "text.txt").write_text("w5")
    paths = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *paths, "--verify", str(tmp_path / "text.txt")]) == 1
    assert "has 1 tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("merged*"))  # reported before the work
    assert main(["merge", *paths, "--verify-dtype", "float32"]) == 1
    assert "--verify-dtype is only valid with --verify" in capsys.readouterr().err
    assert main(["merge", *paths, "--quantize", "nf4", "--quant-type", "nf4"]) == 1
    assert "--quant-type is only valid with a merge without --quantize" in capsys.readouterr().err
    assert main(["merge", *paths, "--quant-type", "none"]) == 1
    assert "quant_type='none' does not apply to an adapter of this package" in capsys.readouterr().err


def test_routers_with_buffers_trained_in_full(tmp_path):
    """Their correction biases are not parameters."""
    save_adapter(tmp_path, "deepseek_v3", target_modules=["experts"], modules_to_save=["gate"])
    report = merge(tmp_path, rounding="nearest")
    trained = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    in_full = [key for key in trained if ".gate." in key]
    assert any(key.endswith("e_score_correction_bias") for key in in_full)
    assert report.tensors_expected == report.tensors_changed == 2 + len(in_full)


def test_zero_factors_are_no_delta(tmp_path):
    """As before B's first training step, or after combining an adapter with weight 0."""
    model = save_adapter(tmp_path, target_modules=["experts", "q_proj"])
    layer = model.base_model.model.model.layers[0]
    nn.init.zeros_(layer.mlp.experts.down_proj.lora_A["default"].weight)
    nn.init.zeros_(layer.self_attn.q_proj.lora_A["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path, rounding="nearest")
    assert report.tensors_expected == report.tensors_changed == 3 + 1


def test_dry_run_rejects_what_cannot_be_loaded_unmerged(tmp_path):
    save_adapter(tmp_path)
    convert_adapter(tmp_path / "adapter", tmp_path / "converted", "per-expert", tmp_path / "base")
    shutil.rmtree(tmp_path / "adapter")
    (tmp_path / "converted").rename(tmp_path / "adapter")
    with pytest.raises(ValueError, match="Convert it first"):
        merge(tmp_path, dry_run=True)


def test_stacks_shared_by_two_modules(tmp_path):
    """After reloading, one of the two merged stacks would replace the other."""
    model = shrunken_model_or_skip("diffusion_gemma", dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = load_quantized(str(tmp_path / "base"), EXPERTS_ONLY, dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, MoeQLoraConfig(r=2))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"is shared by two modules of the base.* Merge into 16 bits in memory"):
        merge(tmp_path, dry_run=True)


def test_experts_of_layers_missing_in_the_model_are_counted(tmp_path):
    """They have the same names as those of other layers."""
    save_adapter(tmp_path)
    tensors = read_tensors(tmp_path / "base")
    left = {key.replace("layers.1.", "layers.2."): tensor for key, tensor in tensors.items() if "layers.1.mlp" in key}
    write_tensors(tmp_path / "base", {**tensors, **left})
    assert merge(tmp_path, dry_run=True).notes[0].startswith(f"{len(left)} tensors that the model does not load")


def test_verifying_with_another_adapter(tmp_path):
    """An adapter that was trained further does not verify the merge."""
    model = save_adapter(tmp_path)
    write_tokenizer(tmp_path / "base")
    write_text(tmp_path / "text.txt", torch.arange(3, 60))
    merge_on_disk(tmp_path)
    randomize_adapter(model, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="has changed since it was merged"):
        verify_merge(tmp_path / "merged", tmp_path / "text.txt")
    shutil.rmtree(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter does not exist, but the report in .*merged names it"):
        verify_merge(tmp_path / "merged", tmp_path / "text.txt")
