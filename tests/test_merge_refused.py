"""Merges that would give wrong results are rejected by name, without output."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_writers import read_tensors, set_bitsandbytes_config, write_tensors
from merged_checkpoints import merge, save_adapter
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from peft_moe_qlora import cli
from peft_moe_qlora.cli import main
from peft_moe_qlora.layouts import convert_adapter
from peft_moe_qlora.merge import merge_checkpoint


def test_merges_rejected_before_anything_is_written(tmp_path):
    """Options, adapters and bases that don't fit each other, with a specific message."""
    save_adapter(tmp_path)
    adapter, base = tmp_path / "adapter", tmp_path / "base"

    def refused(match: str, **options) -> None:
        with pytest.raises((ValueError, OSError), match=match):
            merge(tmp_path, **options)
        assert not (tmp_path / options.get("out", "merged")).exists()
        assert not (tmp_path / "merged.partial").exists()

    refused("onto='bases' is unknown", onto="bases")
    refused(r"dtype=torch\.int8 is not supported for merged weights", dtype=torch.int8)
    file = adapter / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    key = "base_model.model.model.layers.1.mlp.experts.down_proj.lora_A.weight"
    partner = key.replace("lora_A", "lora_B")
    layer = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.experts" not in name}
    for damaged, match in (
        ({**tensors, key: tensors[key] * float("nan")}, "down_proj.lora_A.weight contains values that are not finite"),
        (
            {**tensors, key: tensors[key].transpose(1, 2).contiguous()},
            r"lora_A and lora_B of .*down_proj have shapes .* Expected \(E, r, in\)",
        ),
        (
            {name: t for name, t in tensors.items() if name not in (key, partner)},
            r"no tensor .*1\.mlp\.experts\.down_proj.lora_A.weight",
        ),
        (layer, r"no tensor model\.layers\.1\.mlp\.experts\.gate_up_proj.lora_A.weight"),
        ({n: t for n, t in tensors.items() if "0.self_attn.q_proj" not in n}, r"no factors of .*0\.self_attn\.q_proj"),
        (
            {**tensors, "base_model.model.model.other.weight": torch.ones(2)},
            r"config does not call for the tensor model\.other\.weight",
        ),
        (
            {
                **tensors,
                key.replace("1.mlp", "7.mlp"): tensors[key],
                partner.replace("1.mlp", "7.mlp"): tensors[partner],
            },
            r"has no experts module model\.layers\.7\.mlp\.experts",
        ),
    ):
        save_file({name: tensor.clone() for name, tensor in damaged.items()}, file)
        refused(match)
    file.write_bytes(whole[:-1])
    refused(r"adapter_model\.safetensors")
    file.write_bytes(whole)

    tiny_model("mixtral").save_pretrained(tmp_path / "other")
    shutil.move(base, tmp_path / "own")
    shutil.move(tmp_path / "other", base)
    refused(r"has shape \(8, .* Expected \(4, ")
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "own", base)
    config_file = adapter / "adapter_config.json"
    config = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**config, "base": {**config["base"], "model_type": "olmoe"}}))
    refused("trained on a model of type olmoe, but .* contains a model of type qwen3_moe")
    config_file.write_text(json.dumps(config))
    shutil.rmtree(base)
    tiny_model(std=0.16).save_pretrained(base)
    refused(r"other weights than the adapter was trained on: model\.layers\.0\.mlp\.experts\.\w+ differs")
    tiny_model(num_experts=6).save_pretrained(base)
    refused(r"has shape \(8, .* Expected \(6, ")
    tiny_model(num_hidden_layers=1).save_pretrained(base)
    refused(r"has no experts module model\.layers\.1\.mlp\.experts")
    shutil.rmtree(base)
    shutil.copytree(tmp_path / "own", base)
    set_bitsandbytes_config(base, [])
    refused("is quantized by 'bitsandbytes'")


def test_merging_twice_is_rejected(tmp_path):
    """Detected by the report of the first merge, and by the weights if the report is missing."""
    save_adapter(tmp_path)
    merge(tmp_path)
    with pytest.raises(ValueError, match="merged is not empty"):
        merge(tmp_path)
    with pytest.raises(ValueError, match="adapter is already merged into"):
        merge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")
    (tmp_path / "merged" / "merge_report.json").unlink()
    with pytest.raises(ValueError, match="other weights than the adapter was trained on"):
        merge_checkpoint(tmp_path / "merged", tmp_path / "adapter", tmp_path / "twice")


def test_merge_that_loses_the_delta_is_rejected(tmp_path):
    """A checkpoint that equals its base doesn't count as merged, unless allowed."""
    save_adapter(tmp_path, quant_type=None, target_modules=["experts"], std=1e-9)
    with pytest.raises(ValueError, match=r"48 of 48 tensors .* are unchanged .*, model\.layers.* lost in rounding"):
        merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))
    report = merge(tmp_path, allow_unchanged=True)
    assert (report.tensors_expected, report.tensors_changed) == (48, 0)
    assert "48 tensors whose deltas are lost" in report.notes[0]


def test_delta_that_is_lost_in_16_bits_only(tmp_path):
    """In fp32 it would be kept."""
    save_adapter(tmp_path, quant_type=None, target_modules=["experts"], std=1e-4)
    with pytest.raises(ValueError, match=r"of 48 tensors .* are unchanged after the merge"):
        merge(tmp_path, dtype=torch.bfloat16)
    report = merge(tmp_path, dtype=torch.float32)
    assert report.tensors_expected == report.tensors_changed == 48


def test_output_that_cannot_be_created(tmp_path, monkeypatch):
    """A file has the name already, or it is a mount point, which a folder can't be renamed to."""
    save_adapter(tmp_path)
    (tmp_path / "merged").write_text("mine")
    with pytest.raises(ValueError, match=r"is a file\. Choose another"):
        merge(tmp_path)
    assert (tmp_path / "merged").read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_mount", lambda path: path.name == "mount")
        with pytest.raises(ValueError, match="mount is a mount point"):
            merge(tmp_path, out="mount")
    (tmp_path / "empty").mkdir()
    merge(tmp_path, out="empty")


def test_base_weights_that_are_not_finite(tmp_path):
    """They would be written as if intended."""
    save_adapter(tmp_path)
    (tmp_path / "merged").mkdir()
    for key in ("model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"):
        tensors = read_tensors(tmp_path / "base")
        tensors[key][0, 0] = float("nan")
        write_tensors(tmp_path / "base", tensors)
        with pytest.raises(ValueError, match=r"weights that are not finite\. The checkpoint is damaged"):
            merge(tmp_path)
        tensors[key][0, 0] = 0.1
        write_tensors(tmp_path / "base", tensors)


@pytest.mark.parametrize("module", ["experts.down_proj", "q_proj"])
def test_deltas_that_are_not_finite(module, tmp_path):
    """Each factor is finite, the product is not."""
    save_adapter(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(file)
    for key, factor in factors.items():
        if f"layers.1.mlp.{module}." in key or f"layers.1.self_attn.{module}." in key:
            factor.fill_(1e30)
    save_file(factors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"merged weights of model.layers.1.\w*.{module}\S* exceed the range"):
        merge(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["adapter", "base"]


def test_adapter_merged_two_merges_ago(tmp_path):
    """Adapters of other tools don't name their base; reports pass on which adapters were merged."""
    for name in ("first", "second"):
        save_adapter(tmp_path, quant_type=None, target_modules=["experts"], std=0.1 if name == "first" else 0.2)
        convert_adapter(tmp_path / "adapter", tmp_path / name, "peft-lora", tmp_path / "base")
    merge_checkpoint(tmp_path / "base", tmp_path / "first", tmp_path / "one", progressbar=False)
    report = merge_checkpoint(tmp_path / "one", tmp_path / "second", tmp_path / "two", progressbar=False)
    assert len(report.merged_before) == 1
    with pytest.raises(ValueError, match="adapter is already merged into"):
        merge_checkpoint(tmp_path / "two", tmp_path / "first", tmp_path / "three", progressbar=False)


def test_unreadable_report(tmp_path):
    """Without it, a second merge of the same adapter couldn't be detected."""
    save_adapter(tmp_path)
    for text in ("{", "[]", '{"stacks": 3}'):
        (tmp_path / "base" / "merge_report.json").write_text(text)
        with pytest.raises(ValueError, match=r"merge_report\.json is unreadable .* do not merge an adapter twice"):
            merge(tmp_path)


def test_folder_of_adapters_is_rejected(tmp_path):
    save_adapter(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "one")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "one").rename(tmp_path / "adapter" / "one")
    with pytest.raises(ValueError, match=r"no adapter_config\.json.* subdirectories that contain adapters: one\."):
        merge(tmp_path)


def test_adapter_without_a_delta_is_noted(tmp_path):
    save_adapter(tmp_path, target_modules=["experts"], std=0.0)
    assert "The adapter changes no weight" in merge(tmp_path).notes[0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--device", "cpu:0"], "--device is only valid with --quantize or --verify"),
        (["--device", "nowhere", "--quantize", "nf4"], "--device nowhere is not available"),
        (["--partial", "--quantize", "nf4"], "--partial is only valid with a merge without --quantize"),
        (["--written-by", "peft==0.18.1"], "does not apply to an adapter of this package"),
    ],
)
def test_options_without_effect(options, match, tmp_path, capsys):
    save_adapter(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *paths, *options]) == 1
    assert match in capsys.readouterr().err


def test_interruption_says_how_to_resume(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "merge_checkpoint", interrupt)
    assert main(["merge", "base", "adapter", "merged"]) == 130
    assert "interrupted. Rerun the same command to resume" in capsys.readouterr().err
