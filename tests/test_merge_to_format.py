"""Merging into quantized checkpoints for serving: the written tensors, their readers, and what is rejected."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors, write_tensors
from peft import get_peft_model
from published_writers import E4M3, PER_EXPERT, in_fp8, publish, qwen
from shrunken_models import shrunken_config
from texts import write_text, write_tokenizer
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin

from peft_moe_qlora import MoeQLoraConfig, load_quantized
from peft_moe_qlora.cli import main
from peft_moe_qlora.loading.disk.for_engines import ENGINE_LAYOUTS
from peft_moe_qlora.merge import checkpoint as merging
from peft_moe_qlora.merge.checkpoint import merge_checkpoint
from peft_moe_qlora.quantization import QuantizedStack
from peft_moe_qlora.quantized_linear import QuantizedLinear

WIDTHS = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 128, "head_dim": 64, "intermediate_size": 256},
    "mixtral": {"intermediate_size": 256, "head_dim": 64},
    "deepseek_v3": {
        "moe_intermediate_size": 128,
        "intermediate_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 128,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "head_dim": 128,
    },
}
LINEAR = {
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "deepseek_v3": {
        *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    },
}
"""Last parts of the names of quantized linear layers."""


def wide(model_type: str = "qwen3_moe", **sizes) -> nn.Module:
    return tiny_model(model_type, dtype=torch.bfloat16, **{"hidden_size": 256, **WIDTHS[model_type], **sizes})


def save_trained(
    directory: Path, model: nn.Module, std: float = 0.1, save_original_format: bool = True, **options
) -> None:
    """Saves a model as `base`, and random factors on it as `adapter`."""
    model.save_pretrained(directory / "base", save_original_format=save_original_format)
    options = {"r": 4, "target_modules": ["experts", "o_proj"], "quant_type": None, **options}
    model = get_peft_model(model, MoeQLoraConfig(**options))
    randomize_adapter(model, std=std)
    model.save_pretrained(directory / "adapter")


def merge(directory: Path, out: str = "merged", **options):
    places = (directory / name for name in ("base", "adapter", out))
    return merge_checkpoint(*places, progressbar=False, **{"serve_as": "fp8", **options})


def exact(directory: Path) -> dict[str, torch.Tensor]:
    """The merged weights in fp32, by the keys of the base."""
    merge(directory, "exact", serve_as=None, dtype=torch.float32)
    return read_tensors(directory / "exact")


def quantized(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {key for key, tensor in tensors.items() if tensor.dtype == E4M3}


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


@pytest.fixture(params=WIDTHS)
def trained(request, tmp_path):
    save_trained(tmp_path, wide(request.param))
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=3)
    return request.param, tmp_path


class TestInBlocks:
    def test_codes_and_scales_equal_the_quantized_exact_weights(self, trained):
        """By the definition of the format, in fp64; all other tensors equal those of a merge into 16 bits."""
        model_type, directory = trained
        report = merge(directory)
        assert report.tensors_changed == report.tensors_expected > 0
        assert report.storage == "fp8/128x128"
        true, found = exact(directory), read_tensors(directory / "merged")
        merge(directory, "dense", serve_as=None)
        kept = read_tensors(directory / "dense")
        of_experts = {key for key in true if re.search(r"experts\.\d+\.\w+\.weight$", key)}
        of_linear = {key for key in true if key.split(".")[-2] in LINEAR[model_type]}
        assert quantized(found) == of_experts | of_linear
        assert of_experts
        for key in quantized(found):
            codes, scales, _ = in_fp8(true[key], (128, 128))
            assert torch.equal(found[key].view(torch.uint8), codes.view(torch.uint8)), key
            assert found[f"{key}_scale_inv"].dtype == torch.float32
            assert torch.equal(found[f"{key}_scale_inv"], scales), key
        others = true.keys() - quantized(found)
        assert found.keys() == true.keys() | {f"{key}_scale_inv" for key in quantized(found)}
        assert all(found[key].dtype == kept[key].dtype == torch.bfloat16 for key in others)
        assert all(torch.equal(found[key], kept[key]) for key in others)

    def test_config_and_index_describe_the_checkpoint(self, trained):
        _, directory = trained
        report = merge(directory)
        found = read_tensors(directory / "merged")
        assert report.tensors_written == len(found)
        index = json.loads((directory / "merged" / "model.safetensors.index.json").read_text(encoding="utf-8"))
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
        assert index["weight_map"].keys() == found.keys()
        for key in found:  # codes and their scales are in the same file
            assert index["weight_map"][key] == index["weight_map"][key.removesuffix("_scale_inv")]
        config = config_of(directory / "merged")["quantization_config"]
        kept = config.pop("modules_to_not_convert")
        assert config == {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
        modules = {key.removesuffix(".weight") for key, tensor in found.items() if tensor.dim() > 1}
        of_codes = {key.removesuffix(".weight") for key in quantized(found)}
        assert set(kept) == {one for one in modules - of_codes if not one.endswith("_scale_inv")}
        assert "lm_head" in kept

    def test_loaded_by_this_package_and_by_transformers(self, trained):
        """Both equal the decoded weights, in fp32."""
        _, directory = trained
        merge(directory)
        model = load_quantized(directory / "merged", dtype=torch.float32, device_map="cpu")
        stacks = [module for module in model.modules() if isinstance(module, QuantizedStack)]
        assert {str(stack.storage) for stack in stacks} == {"fp8/128x128"}
        assert any(isinstance(module, QuantizedLinear) for module in model.modules())
        found = logits(model, token_ids())
        stock = stock_model(directory / "merged", transformers.FineGrainedFP8Config(dequantize=True))
        torch.testing.assert_close(found, logits(stock, token_ids()), rtol=1e-4, atol=1e-4)
        write_decoded(directory)
        dense = transformers.AutoModelForCausalLM.from_pretrained(directory / "decoded", dtype=torch.float32)
        torch.testing.assert_close(found, logits(dense, token_ids()), rtol=1e-4, atol=1e-4)


def stock_model(directory: Path, config: QuantizationConfigMixin) -> transformers.PreTrainedModel:
    """A checkpoint as transformers reads and dequantizes it; some versions leave the router in bfloat16."""
    options = {"dtype": torch.float32, "quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).float()


def write_decoded(directory: Path) -> None:
    """The decoded weights of `merged`, by the definition of the format, as a floating-point checkpoint."""
    shutil.copytree(directory / "base", directory / "decoded")
    true, tensors = exact(directory), read_tensors(directory / "merged")
    weights = {key: tensor.float() for key, tensor in tensors.items() if not key.endswith("_scale_inv")}
    weights |= {key: in_fp8(true[key], (128, 128))[2] for key in quantized(tensors)}
    write_tensors(directory / "decoded", weights)


class TestReport:
    @pytest.mark.parametrize("onto", ["quantized", "base"])
    @pytest.mark.parametrize("storage", [None, "nf4/64"])
    def test_error_of_the_format_and_kept_delta(self, storage, onto, tmp_path):
        """For Gaussian weights, also if the adapter was trained on them in 4 bits."""
        model = wide()
        model.save_pretrained(tmp_path / "base")
        adapted = get_peft_model(
            model, MoeQLoraConfig(r=4, target_modules=["experts", "o_proj"], storage=storage, quant_type=None)
        )
        randomize_adapter(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
        report = merge(tmp_path, onto=onto)
        assert [row.name for row in report.stacks] == [
            f"model.layers.{layer}.mlp.experts.{projection}"
            for layer in range(2)
            for projection in ("down_proj", "gate_up_proj")
        ]
        assert len(report.others) == 8
        for row in (*report.stacks, *report.others):
            assert row.relative_error == pytest.approx(0.0264, abs=0.002), row
            assert (row.delta_kept is None) == (row.relative_delta == 0)
            assert row.delta_kept is None or row.delta_kept == pytest.approx(1, abs=0.05)
        true, found = exact(tmp_path) if onto == "quantized" else {}, read_tensors(tmp_path / "merged")
        for key in quantized(found) if true else ():
            assert torch.equal(found[key].view(torch.uint8), in_fp8(true[key], (128, 128))[0].view(torch.uint8))

    def test_unadapted_weights_are_quantized_too(self, tmp_path):
        save_trained(tmp_path, wide(), target_modules=["experts.down_proj"])
        report = merge(tmp_path)
        assert report.tensors_expected == report.tensors_changed == 2 * 4
        assert [row.delta_kept is None for row in report.stacks] == [False, True] * 2
        before, found = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "merged")
        keys = [key for key in quantized(found) if not key.endswith("down_proj.weight")]
        assert len(keys) == 2 * (2 * 4 + 4)
        for key in keys:
            codes, scales, _ = in_fp8(before[key].float(), (128, 128))
            assert torch.equal(found[key].view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(found[f"{key}_scale_inv"], scales)

    def test_lost_deltas(self, tmp_path):
        """A delta that changes no code is reported, with the remedy."""
        save_trained(tmp_path, wide(), std=1e-5)
        with pytest.raises(ValueError, match=r"are unchanged after the merge, .* \(without serve_as, --serve-as\)"):
            merge(tmp_path)
        assert not (tmp_path / "merged").exists()
        report = merge(tmp_path, allow_unchanged=True)
        assert report.tensors_changed < report.tensors_expected
        assert "lost in rounding" in report.notes[-1]

    def test_required_disk_space(self, tmp_path, monkeypatch):
        save_trained(tmp_path, wide())
        merge(tmp_path)
        needed = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "merged").values())
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
        merge(tmp_path, "again")
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
        with pytest.raises(OSError, match="GB of free disk space, but the merged checkpoint requires"):
            merge(tmp_path, "third")


class TestLinearLayers:
    def test_layers_fused_by_engines_have_the_same_storage(self, tmp_path):
        """A head of 64 is half a block, so keys, queries and values are not quantized."""
        save_trained(tmp_path, wide(num_key_value_heads=1))
        report = merge(tmp_path)
        found = read_tensors(tmp_path / "merged")
        linear = {key.split(".")[-2] for key in quantized(found) if "self_attn" in key}
        assert linear == {"o_proj"}
        kept = config_of(tmp_path / "merged")["quantization_config"]["modules_to_not_convert"]
        assert {f"model.layers.1.self_attn.{name}_proj" for name in "qkv"} <= set(kept)
        assert not [name for name in kept if "o_proj" in name or "experts." in name]
        assert report.notes[-1].startswith("6 linear layers stay in floating point")
        model = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
        assert type(model.model.layers[0].self_attn.k_proj) is nn.Linear
        stock = stock_model(tmp_path / "merged", transformers.FineGrainedFP8Config(dequantize=True))
        torch.testing.assert_close(logits(model, token_ids()), logits(stock, token_ids()), rtol=1e-4, atol=1e-4)

    def test_last_block_may_be_partial(self, tmp_path):
        """As in DeepSeek-V3, whose latent keys are 576 wide."""
        save_trained(tmp_path, wide("deepseek_v3", qk_rope_head_dim=64, qk_nope_head_dim=64, head_dim=64))
        merge(tmp_path)
        found = read_tensors(tmp_path / "merged")
        key = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
        assert found[key].shape == (192, 256)
        assert found[f"{key}_scale_inv"].shape == (2, 2)
        model = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
        write_decoded(tmp_path)
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "decoded", dtype=torch.float32)
        torch.testing.assert_close(logits(model, token_ids()), logits(dense, token_ids()), rtol=1e-4, atol=1e-4)

    def test_tied_head_is_excluded_by_name(self, tmp_path):
        """It has no tensor, but some readers would quantize it."""
        save_trained(tmp_path, wide(tie_word_embeddings=True))
        merge(tmp_path)
        assert "lm_head.weight" not in read_tensors(tmp_path / "merged")
        kept = config_of(tmp_path / "merged")["quantization_config"]["modules_to_not_convert"]
        assert {"lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"} <= set(kept)

    def test_layers_for_speculative_decoding(self, tmp_path):
        """They are in the files but not in the model; engines apply the same config to them."""
        save_trained(tmp_path, wide())
        tensors = read_tensors(tmp_path / "base")
        of_last = {key: tensor for key, tensor in tensors.items() if key.startswith("model.layers.1.")}
        more = {key.replace("layers.1.", "layers.2."): tensor for key, tensor in of_last.items()}
        more |= {"model.layers.2.eh_proj.weight": torch.randn(256, 512, dtype=torch.bfloat16)}
        write_tensors(tmp_path / "base", tensors | more)
        merge(tmp_path)
        found = read_tensors(tmp_path / "merged")
        for key in of_last:
            other = key.replace("layers.1.", "layers.2.")
            assert found[other].dtype == found[key].dtype
            assert (f"{other}_scale_inv" in found) == (f"{key}_scale_inv" in found)
        kept = config_of(tmp_path / "merged")["quantization_config"]["modules_to_not_convert"]
        assert {"model.layers.2.eh_proj", "model.layers.2.mlp.gate"} <= set(kept)
        assert not [name for name in kept if "layers.2.self_attn.q_proj" in name or "layers.2.mlp.experts" in name]


def shrunken(model_type: str, **sizes) -> nn.Module:
    config = shrunken_config(model_type)
    values = config.to_dict()
    for part in (values, values.get("text_config", {})):
        part.update({name: size for name, size in sizes.items() if name in part})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
        config = type(config)(**values)
        auto = next(one for one in classes if type(config) in one._model_mapping)
        model = auto.from_config(config, dtype=torch.bfloat16).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.1)
    return model


class TestFusedIn16Bits:
    @pytest.mark.parametrize(
        ("model_type", "is_transposed"),
        [("qwen3_5_moe_text", False), ("qwen3_5_moe", False), ("qwen3_vl_moe", False), ("qwen3_vl_moe", True)],
    )
    def test_experts_are_written_one_by_one(self, model_type, is_transposed, tmp_path):
        """As in the published checkpoints; towers are not changed."""
        sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "mlp_only_layers": []}
        model = shrunken(model_type, **sizes)
        save_trained(tmp_path, model, target_modules=["experts"], save_original_format=False)
        before = read_tensors(tmp_path / "base")
        fused = [key for key in before if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        assert len(fused) == 4
        if is_transposed:  # as published
            write_tensors(tmp_path / "base", before | {key: before[key].transpose(1, 2) for key in fused})
        merge(tmp_path)
        true, found = exact(tmp_path), read_tensors(tmp_path / "merged")
        for key in fused:
            path, _, name = key.rpartition(".")
            for expert, matrix in enumerate(true[key]):
                out_in = matrix if matrix.shape[1] == (128 if name == "gate_up_proj" else 256) else matrix.T
                parts = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
                for part, one in zip(parts, out_in.chunk(len(parts))):
                    codes, scales, _ = in_fp8(one.contiguous(), (128, 128))
                    place = f"{path}.{expert}.{part}.weight"
                    assert torch.equal(found.pop(place).view(torch.uint8), codes.view(torch.uint8))
                    assert torch.equal(found.pop(f"{place}_scale_inv"), scales)
        assert not [key for key in found if ".experts." in key or ("visual" in key and found[key].dtype == E4M3)]
        kept = config_of(tmp_path / "merged")["quantization_config"]["modules_to_not_convert"]
        assert any("visual" in name for name in kept) == any("visual" in key for key in before)
        live = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
        stacks = [module for module in live.modules() if isinstance(module, QuantizedStack)]
        assert len(stacks) == 4
        assert {str(stack.storage) for stack in stacks} == {"fp8/128x128"}

    def test_mxfp4_of_gpt_oss(self, tmp_path):
        """Under its own names; stock transformers decodes the same weights."""
        save_trained(tmp_path, tiny_model("gpt_oss", dtype=torch.bfloat16), target_modules=["experts", "o_proj"])
        report = merge(tmp_path, serve_as="mxfp4")
        assert report.storage == "mxfp4"
        assert {row.relative_error < 0.12 for row in report.stacks} == {True}
        true, found = exact(tmp_path), read_tensors(tmp_path / "merged")
        for layer in range(2):
            for name in ("gate_up_proj", "down_proj"):
                key = f"model.layers.{layer}.mlp.experts.{name}"
                assert key not in found
                stack = true[key].transpose(1, 2)
                blocks, scales = found[f"{key}_blocks"], found[f"{key}_scales"]
                assert blocks.shape == (*stack.shape[:2], stack.shape[2] // 32, 16)
                for expert, matrix in enumerate(stack):
                    storage = ENGINE_LAYOUTS["mxfp4"].storage
                    expected = storage.quantize(matrix.contiguous())
                    assert torch.equal(blocks[expert].flatten(1), expected["codes"])
                    assert torch.equal(scales[expert], expected["block_scales"])
        assert not [key for key in found if "o_proj" in key and found[key].dtype != torch.bfloat16]
        config = config_of(tmp_path / "merged")["quantization_config"]
        assert config["quant_method"] == "mxfp4"
        assert {"lm_head", "model.layers.0.self_attn.o_proj"} <= set(config["modules_to_not_convert"])
        model = load_quantized(tmp_path / "merged", dtype=torch.float32, device_map="cpu")
        stock = stock_model(tmp_path / "merged", transformers.Mxfp4Config(dequantize=True))
        torch.testing.assert_close(logits(model, token_ids()), logits(stock, token_ids()), rtol=1e-4, atol=1e-4)


class TestRejected:
    @pytest.mark.parametrize(
        ("sizes", "problem"),
        [({"moe_intermediate_size": 96}, "96 is not a multiple of 128"), ({"hidden_size": 192}, "192 is not a mult")],
    )
    def test_sizes_that_engines_reject(self, sizes, problem, tmp_path):
        save_trained(tmp_path, wide(**sizes))
        with pytest.raises(ValueError, match=rf"experts\.0\.\w+_proj\.weight .*{problem}.* Merge into 16 bits"):
            merge(tmp_path)
        assert not list(tmp_path.glob("merged*"))

    @pytest.mark.parametrize(
        ("make", "serve_as", "name"),
        [
            (lambda: tiny_model("gpt_oss", hidden_size=128), "fp8", "GptOssExperts"),
            (lambda: shrunken("granitemoe", hidden_size=128, intermediate_size=128), "fp8", "GraniteMoe"),
            (wide, "mxfp4", "Qwen3MoeExperts"),
        ],
    )
    def test_experts_without_a_known_layout(self, make, serve_as, name, tmp_path):
        save_trained(tmp_path, make().to(torch.bfloat16), target_modules=["experts"])
        with pytest.raises(ValueError, match=rf"layout that engines read for {name}\w* in {serve_as}.* is not known"):
            merge(tmp_path, serve_as=serve_as)
        assert not list(tmp_path.glob("merged*"))

    def test_unknown_name(self, tmp_path):
        with pytest.raises(ValueError, match=r"'fp7' is not a format for serving. Choose one of \('fp8', 'mxfp4'\)"):
            merge(tmp_path, serve_as="fp7")

    def test_serve_as_with_quantize(self, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["merge", "base", "adapter", "out", "--serve-as", "fp8", "--quantize", "nf4"])
        assert "not allowed with" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["fp8", "int8"])
def test_base_quantized_by_another_tool(layout, tmp_path):
    """Decoded, and quantized again."""
    sizes = {"moe_intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    publish(qwen(**sizes), tmp_path / "base", PER_EXPERT[layout], num_shards=2)
    (tmp_path / "base" / "hf_quant_config.json").write_text("{}", encoding="utf-8")
    model = load_quantized(tmp_path / "base", dtype=torch.float32, device_map="cpu")
    adapted = get_peft_model(model, MoeQLoraConfig(r=4, target_modules=["experts"]))
    randomize_adapter(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    report = merge(tmp_path)
    assert any("--quantize" in note for note in report.notes) == (layout == "fp8")
    true, found = exact(tmp_path), read_tensors(tmp_path / "merged")
    assert quantized(found) == {key for key in true if re.search(r"_proj\.weight$", key)}
    for key in quantized(found):
        assert torch.equal(found[key].view(torch.uint8), in_fp8(true[key], (128, 128))[0].view(torch.uint8))
    assert config_of(tmp_path / "merged")["quantization_config"]["quant_method"] == "fp8"
    assert not (tmp_path / "merged" / "hf_quant_config.json").exists()


def test_interrupted_merge_is_resumed(tmp_path, monkeypatch):
    """By the same call only."""
    save_trained(tmp_path, wide())
    write_tensors(tmp_path / "base", read_tensors(tmp_path / "base"), num_shards=3)
    report = merge(tmp_path, "at-once")
    written = merging.save_file

    def fail_at_second_shard(tensors, path, metadata):
        if "00002" in str(path):
            raise OSError("no space left on device")
        written(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(merging, "save_file", fail_at_second_shard)
        with pytest.raises(OSError, match="no space left"):
            merge(tmp_path)
    with pytest.raises(ValueError, match="unfinished work of another merge"):
        merge(tmp_path, serve_as=None)
    first = next((tmp_path / "merged.partial").glob("*-00001-*.safetensors"))
    time_of_first = first.stat().st_mtime_ns
    assert merge(tmp_path) == report
    assert (tmp_path / "merged" / first.name).stat().st_mtime_ns == time_of_first
    found, expected = (read_tensors(tmp_path / name) for name in ("merged", "at-once"))
    assert all(torch.equal(found[key].float(), expected[key].float()) for key in expected)


def test_written_file_without_scales(tmp_path, monkeypatch):
    """The file on disk is checked before it counts as finished."""
    save_trained(tmp_path, wide())
    written, lost = merging.save_file, "model.layers.0.self_attn.o_proj.weight_scale_inv"

    def save_without_scales(tensors, path, metadata):
        written({key: tensor for key, tensor in tensors.items() if key != lost}, path, metadata)

    monkeypatch.setattr(merging, "save_file", save_without_scales)
    with pytest.raises(ValueError, match=r"inconsistent for .*weight_scale_inv: .* the result has no such tensor"):
        merge(tmp_path)
    assert not list(tmp_path.glob("merged*"))


def test_command_line_and_verification(tmp_path, capsys):
    save_trained(tmp_path, wide())
    write_tokenizer(tmp_path / "base")
    write_text(tmp_path / "text.txt", torch.randint(3, 60, (40,), generator=torch.Generator().manual_seed(5)))
    places = [str(tmp_path / name) for name in ("base", "adapter", "merged")]
    capsys.readouterr()  # removes output that libraries such as DeepSpeed print at import
    assert main(["merge", *places, "--serve-as", "fp8", "--verify", str(tmp_path / "text.txt"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["storage"] == "fp8/128x128"
    assert 0 < report["verification"]["kl"] < 0.2 * report["verification"]["kl_of_base"]
