"""Merging on disk: the result gives the same outputs as the unmerged adapter."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors, write_tensors
from merged_checkpoints import base_model, merge, save_adapter
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from shrunken_models import MODEL_TYPES, shrunken_model_or_skip
from stock_peft import stock_logits
from tiny_models import logits, randomize_adapter, tiny_model, token_ids

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.merge import checkpoint as merging
from peft_moe_qlora.merge import merge_checkpoint, merge_quantized
from peft_moe_qlora.merge.inputs import adapter_digest
from peft_moe_qlora.merge.report import FidelityRow, MergeReport, Verification
from peft_moe_qlora.merge.unmerged import kl_divergence


def expert_keys(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in tensors if "experts" in key and "bias" not in key and "shared" not in key}


# per expert: qwen3_moe, mixtral, deepseek_v3; fused: gpt_oss and llama4 (transposed), gemma4
@pytest.mark.parametrize(
    "model_type", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "llama4_text", "gemma4_text"]
)
def test_stock_transformers_matches_the_unmerged_adapter(model_type, tmp_path):
    """For every layout of experts on disk. Only targeted tensors change, and the report confirms it."""
    model = save_adapter(tmp_path, model_type, std=0.3)
    ids = token_ids()
    live = logits(model, ids)
    with model.disable_adapter():
        assert kl_divergence(live, logits(model, ids)) >= 0.5
    report = merge(tmp_path)
    assert kl_divergence(live, stock_logits(tmp_path / "merged", ids)) <= 1e-8
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    assert after.keys() == before.keys()
    assert expert_keys(after)
    assert all(not torch.equal(after[key], before[key]) for key in expert_keys(after))
    assert all(row.relative_error < 1e-6 and abs(row.delta_kept - 1) < 1e-6 for row in report.stacks)
    changed = sum(not torch.equal(after[key], before[key]) for key in after)
    assert report.tensors_expected == report.tensors_changed <= changed


def test_trained_adapter(trained, tmp_path):
    """The tensors of a bf16 checkpoint are within 1e-4; run in bf16, it is as close as two bf16 runs."""
    directory, ids = trained

    def live(dtype: torch.dtype) -> torch.Tensor:
        base = transformers.AutoModelForCausalLM.from_pretrained(directory / "base", dtype=dtype)
        model = PeftModel.from_pretrained(base, directory / "adapter").eval()
        found = logits(model, ids)
        with model.disable_adapter():
            assert kl_divergence(found, logits(model, ids)) >= 0.5
        return found

    exact, rounded = live(torch.float32), live(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype) / "merged"
        merge_checkpoint(directory / "base", directory / "adapter", out, dtype=dtype, progressbar=False)
    assert abs(kl_divergence(exact, stock_logits(tmp_path / "torch.float32" / "merged", ids))) <= 1e-8
    assert kl_divergence(exact, stock_logits(tmp_path / "torch.bfloat16" / "merged", ids)) <= 1e-4
    of_bf16 = kl_divergence(rounded, stock_logits(tmp_path / "torch.bfloat16" / "merged", ids, dtype=torch.bfloat16))
    assert of_bf16 <= 2 * kl_divergence(exact, rounded)


# diffusion_gemma's encoder and decoder share their stacks
@pytest.mark.parametrize("model_type", [name for name in MODEL_TYPES if name != "diffusion_gemma"])
def test_every_architecture(model_type, tmp_path):
    """Every tensor equals merging in memory and saving."""
    model = shrunken_model_or_skip(model_type, dtype=torch.float32)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = get_peft_model(model, MoeQLoraConfig(r=2, target_modules=["experts"]))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path)
    model.merge_and_unload(dtype=torch.float32).save_pretrained(tmp_path / "in-memory")
    found, expected = read_tensors(tmp_path / "merged"), read_tensors(tmp_path / "in-memory")
    assert found.keys() == expected.keys()
    for key in found:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-6)
    before = read_tensors(tmp_path / "base")
    changed = sum(not torch.equal(found[key], before[key]) for key in found)
    assert report.tensors_expected == report.tensors_changed == changed > 0
    assert report.tensors_written == len(found)


@pytest.mark.parametrize("onto", ["quantized", "base"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_linear_layers_are_merged_as_trained(onto, double_quant, tmp_path):
    """Onto the 4-bit weights used in training, or onto the base's own weights on request."""
    tiny_model().save_pretrained(tmp_path / "base")
    quantization = MoeQuantizationConfig(double_quant=double_quant)
    model = load_quantized(str(tmp_path / "base"), quantization, dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules="all-linear", double_quant=double_quant)).eval()
    randomize_adapter(model, std=0.05)
    model.save_pretrained(tmp_path / "adapter")
    # in evaluation mode on a CPU, bitsandbytes computes linear layers in bf16
    live = logits(model.train(), token_ids())
    report = merge(tmp_path, onto=onto)
    difference = kl_divergence(live, stock_logits(tmp_path / "merged", token_ids()))
    assert difference <= 1e-8 if onto == "quantized" else difference > 1e-5
    assert {row.name for row in report.others} >= {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}
    if onto == "base":
        before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
        A, B = (
            load_file(tmp_path / "adapter" / "adapter_model.safetensors")[
                f"base_model.model.model.layers.0.self_attn.q_proj.lora_{name}.weight"
            ]
            for name in "AB"
        )
        key = "model.layers.0.self_attn.q_proj.weight"
        torch.testing.assert_close(after[key] - before[key], 2 * B @ A, rtol=0, atol=1e-6)


def test_other_contents_of_an_adapter(tmp_path):
    """Embeddings, routers and norms trained in full, biases, and patterns of ranks and alphas."""
    model = save_adapter(
        tmp_path,
        "gpt_oss",
        target_modules=["experts", "embed_tokens", "q_proj"],
        modules_to_save=["norm", "router"],
        bias="all",
        use_rslora=True,
        rank_pattern={"layers.1.mlp.experts.down_proj": 2},
        alpha_pattern={"q_proj": 3},
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)))
    model.save_pretrained(tmp_path / "adapter")
    live = logits(model, token_ids())
    report = merge(tmp_path)
    assert kl_divergence(live, stock_logits(tmp_path / "merged", token_ids())) <= 1e-8
    changed = {row.name for row in report.others}
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.0.mlp.router.weight"} <= changed
    assert "model.layers.0.mlp.experts.gate_up_proj_bias" in changed


def test_shards_that_split_fused_tensors(tmp_path):
    """Gate and up projection of an expert in different files; experts of a layer too."""
    save_adapter(tmp_path)
    of_one_file = merge(tmp_path, out="whole")
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=7)
    report = merge(tmp_path, out="sharded")
    for row, expected in zip(
        (*report.stacks, *report.others), (*of_one_file.stacks, *of_one_file.others), strict=True
    ):
        assert row.name == expected.name
        assert row.relative_delta == pytest.approx(expected.relative_delta, rel=1e-6)
    expected, found = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "sharded")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) == 7
    again, whole = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("sharded", "whole")
    )
    assert torch.equal(logits(again, token_ids()), logits(whole, token_ids()))
    assert report.tensors_written == len(found)


def test_other_files_are_copied(tmp_path):
    """Tokenizer and templates, but no weights in other formats or hidden files; the config fits the new weights."""
    save_adapter(tmp_path)
    base = tmp_path / "base"
    (base / "tokenizer.json").write_text("{}")
    (base / "assets").mkdir()
    (base / "assets" / "template.jinja").write_text("{{ messages }}")
    (base / ".cache").mkdir()
    (base / ".cache" / "lock").write_text("")
    (base / "pytorch_model.bin").write_bytes(b"old")
    merge(tmp_path, dtype=torch.bfloat16)
    names = {str(path.relative_to(tmp_path / "merged")) for path in (tmp_path / "merged").rglob("*") if path.is_file()}
    assert names == {
        "assets/template.jinja",
        "config.json",
        "generation_config.json",
        "merge_report.json",
        "model.safetensors",
        "tokenizer.json",
    }
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["num_experts"] == config["num_local_experts"] == 8
    assert config["dtype"] == "bfloat16"
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "merged").values()} == {torch.bfloat16}
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["tensors_changed"] == report["tensors_expected"] > 0
    assert not (tmp_path / "merged.partial").exists()


def make_hub_snapshot(directory) -> None:
    """Files are links into a folder of blobs, as huggingface_hub creates them; the directory is a link too."""
    repository = directory.with_name("models--own--base")
    snapshot, blobs = repository / "snapshots" / "0123abc", repository / "blobs"
    snapshot.parent.mkdir(parents=True)
    blobs.mkdir()
    directory.rename(snapshot)
    directory.symlink_to(snapshot)
    for number, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        file.rename(blobs / str(number))
        file.symlink_to(os.path.relpath(blobs / str(number), file.parent))


@pytest.mark.parametrize("is_snapshot", [False, True])
def test_all_other_files_of_the_base_are_copied(is_snapshot, tmp_path):
    """All other files become regular files with the same bytes, also if they were links; an adapter is not copied."""
    save_adapter(tmp_path)
    base = tmp_path / "base"
    contents = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "special_tokens_map.json": "{}",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "free",
        "README.md": "# Base",
        "modeling_own.py": "x = 1",
        "additional/config.json": '{"num_experts": 1}',
        "additional/deep/notes": "n",
    }
    left_out = {
        "adapter_config.json": "{}",
        "adapter_model.safetensors": "",
        "pytorch_model.bin.index.json": "{}",
        "model.gguf": "",
        ".git/HEAD": "",
        ".gitattributes": "",
    }
    for name, text in {**contents, **left_out}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    (base / "adapter_model.safetensors").unlink()
    contents["generation_config.json"] = (base / "generation_config.json").read_text()
    if is_snapshot:
        make_hub_snapshot(base)
        (base / "broken").symlink_to("nowhere")
    merge(tmp_path)
    merged = tmp_path / "merged"
    found = {str(path.relative_to(merged)) for path in merged.rglob("*") if not path.is_dir()}
    assert found == contents.keys() | {"config.json", "model.safetensors", "merge_report.json"}
    assert not any(path.is_symlink() for path in merged.rglob("*"))
    assert {name: (merged / name).read_text() for name in contents} == contents


def test_merging_into_a_subfolder_of_the_base(tmp_path):
    """The copy of the base doesn't contain the output."""
    save_adapter(tmp_path)
    (tmp_path / "base" / "LICENSE").write_text("free")
    merge(tmp_path, out="base/merged")
    found = {str(path.relative_to(tmp_path / "base" / "merged")) for path in (tmp_path / "base" / "merged").rglob("*")}
    assert found == {"LICENSE", "config.json", "generation_config.json", "merge_report.json", "model.safetensors"}


def test_dry_run_writes_nothing(tmp_path):
    """But reports what would change."""
    save_adapter(tmp_path)
    before = sorted(tmp_path.iterdir())
    report = merge(tmp_path, dry_run=True)
    assert report.tensors_expected > 0
    assert report.tensors_written == 0
    assert sorted(tmp_path.iterdir()) == before


def test_index_with_a_single_shard(tmp_path):
    """A single shard is found and written under its own name."""
    save_adapter(tmp_path)
    base = tmp_path / "base"
    tensors = read_tensors(base)
    write_tensors(base, tensors, num_shards=2)
    for file in base.glob("*.safetensors"):
        file.unlink()
    name = "model-00001-of-00001.safetensors"
    save_file(tensors, base / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(tmp_path)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")


def test_files_of_the_same_name_in_two_folders(tmp_path):
    """Neither overwrites the other."""
    save_adapter(tmp_path)
    base = tmp_path / "base"
    tensors = read_tensors(base)
    (base / "model.safetensors").unlink()
    weight_map = {key: f"{'a' if number % 2 else 'b'}/x.safetensors" for number, key in enumerate(tensors)}
    for name in ("a", "b"):
        (base / name).mkdir()
        part = {key: tensor for key, tensor in tensors.items() if weight_map[key].startswith(name)}
        save_file(part, base / name / "x.safetensors", {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    report = merge(tmp_path)
    assert report.tensors_written == len(tensors)
    assert (tmp_path / "merged" / "a" / "x.safetensors").is_file()
    assert (tmp_path / "merged" / "b" / "x.safetensors").is_file()


def test_copied_tensors(tmp_path):
    """They keep their bits, whatever their dtype; cast, they must stay in range."""
    save_adapter(tmp_path)
    tensors = read_tensors(tmp_path / "base")
    strange = {"extra.ids": torch.tensor([1, 70000], dtype=torch.uint32), "extra.phases": torch.tensor([1 + 2j])}
    wide = {"extra.wide": torch.tensor([1.5], dtype=torch.float64)}
    write_tensors(tmp_path / "base", {**tensors, **strange, **wide})
    merge(tmp_path, dtype=torch.bfloat16)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[key], tensor) for key, tensor in strange.items())
    assert found["extra.wide"].dtype == torch.bfloat16
    assert found["model.norm.weight"].dtype == torch.bfloat16
    tensors["model.norm.weight"][0] = 1e5
    write_tensors(tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=r"norm\.weight contains values that exceed the range of torch\.float16"):
        merge(tmp_path, out="half", dtype=torch.float16)
    assert not list(tmp_path.glob("half*"))


def test_merged_weights_out_of_range(tmp_path):
    """Infinite weights would only show when the model runs."""
    save_adapter(tmp_path, quant_type=None)
    tensors = read_tensors(tmp_path / "base")
    key = "model.layers.1.mlp.experts.5.down_proj.weight"
    tensors[key][0, 0] = 1e5
    write_tensors(tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=r"experts\.5\.down_proj\.weight contains values that exceed the range of"):
        merge(tmp_path, dtype=torch.float16)
    assert not list(tmp_path.glob("merged*"))


@pytest.mark.parametrize("attribute", ["_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"])
def test_weights_kept_in_fp32(attribute, tmp_path, monkeypatch):
    """Modules that the model keeps in fp32 are not cast; narrower weights in the checkpoint are."""
    model = shrunken_model_or_skip("deepseek_v3", dtype=torch.float32)
    for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        # on the base class, from which all classes of the model inherit
        kept = ["input_layernorm"] if name == attribute else None
        monkeypatch.setattr(transformers.DeepseekV3PreTrainedModel, name, kept)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, MoeQLoraConfig(r=2))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path, dtype=torch.bfloat16)
    found = read_tensors(tmp_path / "merged")
    assert {tensor.dtype for key, tensor in found.items() if "input_layernorm" in key} == {torch.float32}
    assert found["model.norm.weight"].dtype == found["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    tensors = read_tensors(tmp_path / "base")
    narrow = {key: tensor.bfloat16() if "input_layernorm" in key else tensor for key, tensor in tensors.items()}
    write_tensors(tmp_path / "base", narrow)
    merge(tmp_path, out="wide", dtype=torch.float32)
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "wide").values()} == {torch.float32}


def test_weights_kept_in_fp32_under_checkpoint_names(tmp_path):
    """The model lists them by its own names; the checkpoint's differ."""
    model = shrunken_model_or_skip("inkling2_text", dtype=torch.float32)
    assert "e_score_correction_bias" in model._keep_in_fp32_modules_strict
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(model, MoeQLoraConfig(r=2))
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    merge(tmp_path, dtype=torch.bfloat16)
    dtypes = {key: tensor.dtype for key, tensor in read_tensors(tmp_path / "merged").items()}
    assert dtypes["model.llm.layers.0.mlp.gate.bias"] == torch.float32
    assert dtypes["model.llm.layers.0.mlp.experts.w2_weight"] == torch.bfloat16


def test_adapter_of_another_tool(tmp_path):
    """A PEFT adapter, trained on the checkpoint's weights, is merged onto these."""
    base_model("qwen3_moe").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=names)).eval()
    randomize_adapter(model)
    live = logits(model, token_ids())
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path)
    assert kl_divergence(live, stock_logits(tmp_path / "merged", token_ids())) <= 1e-8
    assert "does not record the storage of its base" in report.notes[0]
    assert report.notes[0] in str(report)
    with pytest.raises(ValueError, match="Convert it first"):
        merge_quantized(tmp_path / "base", tmp_path / "adapter", tmp_path / "packed")


def test_untrained_expert(tmp_path):
    """It is not expected to change; a dry run reports the same numbers."""
    model = save_adapter(tmp_path, target_modules=["experts"], quant_type=None)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts." in name and ".lora_B." in name:
                parameter[3] = 0
    model.save_pretrained(tmp_path / "adapter")
    expected = merge(tmp_path, dry_run=True).tensors_expected
    report = merge(tmp_path)
    assert report.tensors_changed == report.tensors_expected == expected == 2 * 7 * 3


def test_only_changed_modules_trained_in_full_are_counted(tmp_path):
    """The norm was trained, the head was only saved."""
    model = save_adapter(
        tmp_path, target_modules=["experts"], quant_type=None, modules_to_save=["model.norm", "lm_head"]
    )
    with torch.no_grad():
        model.base_model.model.model.norm.modules_to_save["default"].weight.add_(1)
    model.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path)
    before, after = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    assert report.tensors_expected == report.tensors_changed == 2 * 8 * 3 + 1
    assert {row.name for row in report.others} == {"model.norm.weight"}
    assert {row.name for row in report.stacks} == {
        f"model.layers.{layer}.mlp.experts.{projection}"
        for layer in (0, 1)
        for projection in ("gate_up_proj", "down_proj")
    }


def test_metadata_of_the_written_files(tmp_path):
    """The index has the total size of the new files, and the files have the metadata of the base's."""
    save_adapter(tmp_path)
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=3)
    merge(tmp_path, dtype=torch.bfloat16)
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    found = read_tensors(tmp_path / "merged")
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    for file in (tmp_path / "merged").glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}


@pytest.mark.parametrize("onto", ["quantized", "base"])
def test_report_of_the_merge(onto, tmp_path):
    """It records base and adapter by path and digest, the base's weights and the storage."""
    save_adapter(tmp_path)
    report = merge(tmp_path, onto=onto)
    assert (report.base, report.adapter) == (str(tmp_path / "base"), str(tmp_path / "adapter"))
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert report.adapter_sha256 == hashlib.sha256(weights).hexdigest()
    assert (report.onto, report.storage) == (onto, "the checkpoint's dtypes")
    assert MergeReport.from_dict(json.loads((tmp_path / "merged" / "merge_report.json").read_text())) == report


def test_digest_is_of_the_whole_file(tmp_path):
    """Two adapters with the same beginning differ; the digest detects a repeated merge."""
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "adapter_config.json").write_text("{}")
        (tmp_path / str(number) / "adapter_model.safetensors").write_bytes(bytes(3 * 2**20) + bytes([number]))
    assert adapter_digest(tmp_path / "1") != adapter_digest(tmp_path / "2")


def test_config_has_both_names_of_the_number_of_experts():
    """In every part that has one. The new dtype replaces an existing one, and is not added elsewhere."""
    config = {
        "num_experts": 8,
        "torch_dtype": "float32",
        "text_config": {"num_local_experts": 4, "dtype": "float32", "rope": {"theta": 1}},
        "vision_config": {"hidden_size": 3},
    }
    assert merging.config_for_all(config, torch.bfloat16) == {
        "num_experts": 8,
        "num_local_experts": 8,
        "torch_dtype": "bfloat16",
        "text_config": {"num_local_experts": 4, "num_experts": 4, "dtype": "bfloat16", "rope": {"theta": 1}},
        "vision_config": {"hidden_size": 3},
    }
    assert merging.config_for_all(config, None)["torch_dtype"] == "float32"


def rows(*values: tuple[float, float | None]) -> tuple[FidelityRow, ...]:
    return tuple(FidelityRow(f"row {number}", 0.5, *value) for number, value in enumerate(values))


def test_table_shows_the_worst_of_the_other_tensors():
    """Largest error and smallest share of the delta; a tensor without a delta has no share."""
    report = MergeReport(
        "b", "a", "0", "base", "bfloat16", 9, 8, 7, others=rows((0.1, 0.9), (0.3, 0.8), (0.2, 0.4), (0.2, None))
    )
    shown = [line for line in str(report).splitlines() if line.startswith("row")]
    assert [line.split()[1] for line in shown] == ["1", "2"]
    assert "4 other tensors" in str(report)
    assert "9 tensors expected to change, 8 changed, 7 written" in str(report)
    only_replaced = dataclasses.replace(report, others=rows((0.1, None)))
    assert "row 0" in str(only_replaced)


def test_table_of_stacks_and_verification():
    """Each figure is in its column; shares of tokens are percentages."""
    verification = Verification(num_tokens=200, kl=0.001, equal_argmax=0.75, kl_of_base=0.5)
    report = MergeReport(
        "b", "a", "0", "base", "bfloat16", 9, 8, 7, stacks=rows((0.125, 0.9)), verification=verification
    )
    lines = str(report).splitlines()
    assert next(line for line in lines if "row 0" in line).split() == ["row", "0", "5.00e-01", "1.25e-01", "0.9000"]
    assert "1.00e-03 (base without adapter: 5.00e-01), top-1 agreement: 75.00% of 200 positions" in lines[-1]
    assert MergeReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_merge_command(tmp_path, capsys):
    """Prints the report; an error is one line and an exit code."""
    save_adapter(tmp_path)
    paths = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    assert main(["merge", *paths, "--dtype", "bfloat16"]) == 0
    output = capsys.readouterr().out
    assert "model.layers.0.mlp.experts.gate_up_proj" in output
    assert "merged onto quantized weights as bfloat16" in output
    assert main(["merge", *paths]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert main(["merge", *paths[:2], str(tmp_path / "again"), "--rounding", "nearest"]) == 1
    assert "--rounding is only valid with --quantize" in capsys.readouterr().err


def test_peak_memory_is_one_shard(tmp_path):
    """Only one shard of a checkpoint is in memory, whatever the total size."""
    model = tiny_model(hidden_size=512, moe_intermediate_size=256, num_experts=64, num_hidden_layers=2)
    model.save_pretrained(tmp_path / "base", max_shard_size="16MB")
    model = get_peft_model(model, MoeQLoraConfig(r=2)).eval()
    randomize_adapter(model)
    model.save_pretrained(tmp_path / "adapter")
    del model
    script = """
        import sys, resource
        import peft_moe_qlora
        from peft_moe_qlora.merge import merge_checkpoint
        directory = sys.argv[1]
        def anonymous():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024
        import threading, time
        peak, done = [], threading.Event()
        def watch():
            while not done.is_set():
                peak.append(anonymous())
                time.sleep(0.002)
        merge_checkpoint(f"{directory}/base", f"{directory}/adapter", f"{directory}/warm", dry_run=True)
        before = anonymous()
        watcher = threading.Thread(target=watch)
        watcher.start()
        merge_checkpoint(f"{directory}/base", f"{directory}/adapter", f"{directory}/merged", progressbar=False)
        done.set()
        watcher.join()
        print(max(peak) - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    total = sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors")) / 2**20
    assert total > 190
    assert float(output.splitlines()[-1]) < 90  # a shard of 16 MB, copied when it is written, and one expert
