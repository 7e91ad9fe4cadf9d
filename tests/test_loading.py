"""Loading into 4 bits equals quantizing after loading bit by bit, for every architecture, also saved and reloaded."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_writers import read_tensors, write_tensors
from peft import PeftModel, get_peft_model
from shrunken_models import MODEL_TYPES, shrunken_model, shrunken_model_or_skip
from tiny_models import assert_same_bytes, logits, packed_bytes, randomize_adapter, tiny_model, token_ids
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from peft_moe_qlora import (
    CheckpointError,
    MoeQLoraConfig,
    MoeQuantizationConfig,
    QuantizedExperts,
    experts_report,
    load_experts,
    load_quantized,
    quantize_experts,
    save_bitsandbytes,
)
from peft_moe_qlora.loading import Checkpoint
from peft_moe_qlora.loading.expert_shapes import read_expert_shapes
from peft_moe_qlora.loading.finder import SourceFinder
from peft_moe_qlora.loading.streaming import in_order_of_reading
from peft_moe_qlora.merge.inputs import checkpoint_directory
from peft_moe_qlora.quantization import DenseStack, FourBitFormat, QuantizedStack

EXPERTS_ONLY = MoeQuantizationConfig(quantize_linear=False)


def in_4_bits(path, config: MoeQuantizationConfig | None = None, dtype: torch.dtype = torch.bfloat16, **kwargs):
    return load_quantized(str(path), config or EXPERTS_ONLY, dtype=dtype, **{"device_map": "cpu", **kwargs})


def loaded_again(path, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Module:
    """As transformers loads any saved model."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, device_map="cpu").eval()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_architecture(model_type, tmp_path):
    """Saved by transformers in the hub's layout; the same directly or through 16 bits, and again from 4 bits."""
    model = shrunken_model_or_skip(model_type)
    model_class = type(model)
    model.save_pretrained(tmp_path / "dense")
    expected = model_class.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    quantize_experts(expected, progressbar=False)
    options = {"dtype": torch.bfloat16, "output_loading_info": True, "device_map": "cpu"}
    found, info = model_class.from_pretrained(tmp_path / "dense", quantization_config=EXPERTS_ONLY, **options)
    assert_same_bytes(packed_bytes(found), packed_bytes(expected))
    assert not any(info.values())
    found.save_pretrained(tmp_path / "packed")
    again, info = model_class.from_pretrained(tmp_path / "packed", **options)
    assert_same_bytes(packed_bytes(again), packed_bytes(expected))
    assert not any(info.values())
    assert not any(p.requires_grad for name, p in again.named_parameters() if name.endswith("absmax"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe"])
@pytest.mark.parametrize("storage", [("nf4", 64, False), ("fp4", 128, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_logits_equal_quantizing_after_loading(model_type, storage, dtype, tmp_path):
    tiny_model(model_type, dtype=torch.bfloat16).save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    quantize_experts(expected, *storage, progressbar=False)
    found = in_4_bits(tmp_path, MoeQuantizationConfig(*storage, quantize_linear=False), dtype)
    assert torch.equal(logits(found, token_ids()), logits(expected, token_ids()))


@pytest.mark.parametrize("save", [None, save_bitsandbytes], ids=["save_pretrained", "bitsandbytes"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "phimoe"])
@pytest.mark.parametrize("quantize_linear", [False, True], ids=["experts", "all"])
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "nested"])
def test_saved_and_loaded_again(save, model_type, quantize_linear, double_quant, tmp_path):
    width = "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
    tiny_model(model_type, dtype=torch.bfloat16, **{width: 64}).save_pretrained(tmp_path / "dense")
    config = MoeQuantizationConfig(double_quant=double_quant, quantize_linear=quantize_linear)
    model = in_4_bits(tmp_path / "dense", config)
    if save is None:
        model.save_pretrained(tmp_path / "packed", max_shard_size="40KB")
    else:
        save(model, tmp_path / "packed", max_shard_size="40KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    again = load_quantized(str(tmp_path / "packed"), device_map="cpu")
    again.save_pretrained(tmp_path / "again")
    third = load_quantized(str(tmp_path / "again"), device_map="cpu")
    expected = logits(model, token_ids())
    assert torch.equal(logits(again, token_ids()), expected)
    assert torch.equal(logits(third, token_ids()), expected)
    if save is None:
        assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


@pytest.mark.parametrize("model_type", ["gemma4", "jamba", "llama4", "nemotron_h", "qwen3_next", "qwen4_exp"])
def test_other_architectures_with_linear_layers_in_4_bits(model_type, tmp_path):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers doesn't have it")
    model = shrunken_model(model_type)
    model.save_pretrained(tmp_path / "dense")
    options = {"dtype": torch.bfloat16, "output_loading_info": True, "device_map": "cpu"}
    expected, info = type(model).from_pretrained(
        tmp_path / "dense", quantization_config=MoeQuantizationConfig(), **options
    )
    assert not any(info.values())
    assert any(type(module).__name__ == "Linear4bit" for module in expected.modules())
    expected.save_pretrained(tmp_path / "packed")
    found, info = type(model).from_pretrained(tmp_path / "packed", **options)
    assert not any(info.values())
    assert_same_bytes(dict(found.state_dict()), dict(expected.state_dict()))


def test_bitsandbytes_layout_has_the_original_names(tmp_path):
    tiny_model("mixtral", dtype=torch.bfloat16, intermediate_size=64).save_pretrained(tmp_path / "dense")
    save_bitsandbytes(in_4_bits(tmp_path / "dense"), tmp_path / "packed")
    names = {key for key in read_tensors(tmp_path / "packed") if not key.endswith(("map", "absmax", "__nf4"))}
    assert names == read_tensors(tmp_path / "dense").keys()


def test_experts_quantized_in_memory_are_saved_too(tmp_path):
    model = tiny_model()
    quantize_experts(model, "fp4", progressbar=False)
    model.save_pretrained(tmp_path)
    again = loaded_again(tmp_path, torch.float32)
    assert_same_bytes(packed_bytes(again), packed_bytes(model))
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("skipped", ["model.layers.1.mlp.experts", "layers.1.mlp.experts", r"model\.layers\.1.*"])
def test_skipped_modules_stay_in_16_bits(skipped, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, MoeQuantizationConfig(skip_modules=[skipped, "q_proj"]))
    stacks = [stack.storage for stack in experts_report(model).stacks]
    assert stacks == ["nf4/64", "nf4/64", "bfloat16", "bfloat16"]
    kinds = {name.rpartition(".")[2]: type(m).__name__ for name, m in model.model.layers[0].self_attn.named_modules()}
    assert (kinds["q_proj"], kinds["k_proj"]) == ("Linear", "Linear4bit")


def test_linear_layers_in_4_bits_and_experts_in_16(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, MoeQuantizationConfig(quant_type=None))
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, DenseStack)
    assert isinstance(experts.down_proj, DenseStack)
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


def test_routers_and_head_are_not_quantized(tmp_path):
    shrunken_model("afmoe").save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, MoeQuantizationConfig())
    kept = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert kept == {"lm_head", "model.layers.1.mlp.router.gate"}
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, device_map=device_map)
    assert logits(model, token_ids(str(model.device))).isfinite().all()


@pytest.mark.parametrize("device_map", [{"model": 0, "lm_head": "cpu"}, {"": "disk"}])
def test_offloading_is_rejected(device_map, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="device_map offloads modules"):
        in_4_bits(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")


def test_dense_models_are_rejected(tmp_path):
    config = transformers.AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="No routed experts found in LlamaForCausalLM"):
        in_4_bits(tmp_path)


@pytest.mark.parametrize("quantize_linear", [False, True], ids=["experts", "all"])
def test_training_saving_and_merging_an_adapter(quantize_linear, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    config = MoeQuantizationConfig(quantize_linear=quantize_linear)
    model = in_4_bits(tmp_path / "dense", config)
    before = packed_bytes(model)
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules="all-linear"))
    model.train()
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad)
    randomize_adapter(model, std=0.05)
    assert_same_bytes(
        {n.removeprefix("base_model.model.").replace(".base_layer", ""): t for n, t in packed_bytes(model).items()},
        before,
    )
    model.eval().save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(in_4_bits(tmp_path / "dense", config), tmp_path / "adapter").eval()
    live = logits(model, token_ids())
    assert torch.equal(logits(again, token_ids()), live)

    merged = again.merge_and_unload(dtype=torch.bfloat16)
    merged.save_pretrained(tmp_path / "merged")
    # stock layers; in evaluation mode bitsandbytes rounds their scales on CPUs with AVX512-BF16
    plain = loaded_again(tmp_path / "merged").train()
    assert not any(isinstance(module, QuantizedExperts) for module in plain.modules())
    assert hasattr(plain.config, "quantization_config") == quantize_linear
    assert torch.equal(logits(plain, token_ids()), logits(merged, token_ids()))


def test_merging_into_4_bits_saving_and_loading(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = get_peft_model(in_4_bits(tmp_path / "dense"), MoeQLoraConfig(r=4))
    randomize_adapter(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = load_quantized(str(tmp_path / "merged"), device_map="cpu")
    assert_same_bytes(packed_bytes(again), packed_bytes(merged))


@pytest.mark.parametrize("quantize_linear", [False, True], ids=["experts", "all"])
def test_dequantizing_a_loaded_model(quantize_linear, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense", MoeQuantizationConfig(quantize_linear=quantize_linear))
    model = model.dequantize()
    expected = logits(model, token_ids())
    model.save_pretrained(tmp_path / "plain")
    again = loaded_again(tmp_path / "plain")
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(logits(again, token_ids()), expected)


def test_trainer_and_generation(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense", MoeQuantizationConfig(compute_dtype="float32"), dtype=torch.float32)
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules="all-linear"))
    data = [{"input_ids": row, "labels": row} for row in token_ids(batch=16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=6, learning_rate=2e-2, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    generated = model.generate(input_ids=token_ids(length=4), max_new_tokens=3, do_sample=False)
    assert generated.shape == (2, 7)


def test_model_without_an_adapter_is_not_trained(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(
            in_4_bits(tmp_path / "dense"), transformers.TrainingArguments(str(tmp_path), use_cpu=True)
        )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "phimoe"])
@pytest.mark.parametrize("from_packed", [None, "native", "bitsandbytes"])
def test_loading_experts_onto_a_meta_model(model_type, from_packed, tmp_path):
    width = "moe_intermediate_size" if model_type == "qwen3_moe" else "intermediate_size"
    tiny_model(model_type, dtype=torch.bfloat16, **{width: 64}).save_pretrained(tmp_path)
    expected = in_4_bits(tmp_path)
    if from_packed == "native":
        expected.save_pretrained(tmp_path / "packed")
    elif from_packed == "bitsandbytes":
        save_bitsandbytes(expected, tmp_path / "packed")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(expected.config, dtype=torch.bfloat16)
    load_experts(model, tmp_path / "packed" if from_packed else tmp_path, FourBitFormat(), progressbar=False)
    assert_same_bytes(packed_bytes(model), packed_bytes(expected))
    assert model.lm_head.weight.is_meta
    experts = model.model.layers[1].mlp.experts
    assert not any(parameter.is_meta for parameter in experts.parameters())
    if model_type == "gpt_oss":
        assert torch.equal(experts.down_proj_bias, expected.model.layers[1].mlp.experts.down_proj_bias)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "int4"}, "quant_type='int4' is unknown"),
        ({"blocksize": 48}, "blocksize=48 is not supported"),
        ({"load_in_4bit": True}, "no option 'load_in_4bit'"),
        ({"quant_type": None, "quantize_linear": False}, "nothing to quantize"),
        ({"compute_dtype": "bfloat17"}, "expected a torch dtype"),
        ({"format_version": 99}, "format_version 99"),
        ({"quant_method": "bitsandbytes"}, "MoeQuantizationConfig expects"),
    ],
)
def test_invalid_configurations(options, message):
    with pytest.raises(ValueError, match=message):
        MoeQuantizationConfig(**options)


@pytest.mark.parametrize(
    "model_type", ["qwen3_vl_moe", "ernie4_5_vl_moe", "granitemoe", "inkling2_text", "nemotron_h", "gemma4"]
)
def test_bitsandbytes_layout_for_other_architectures(model_type, tmp_path):
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this version of transformers doesn't have it")
    shrunken_model(model_type).save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense")
    save_bitsandbytes(model, tmp_path / "packed")
    found = load_quantized(str(tmp_path / "packed"), device_map="cpu")
    assert_same_bytes(packed_bytes(found), packed_bytes(model))


def test_bitsandbytes_layout_rejects_adapters(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = get_peft_model(in_4_bits(tmp_path), MoeQLoraConfig(r=4))
    with pytest.raises(ValueError, match=r"has adapters.*save it in full"):
        save_bitsandbytes(model.base_model.model, tmp_path / "packed")
    with pytest.raises(ValueError, match="has no quantized experts to save"):
        save_bitsandbytes(tiny_model(), tmp_path / "packed")


def test_4_bit_layers_that_checkpoints_store_in_another_shape(tmp_path):
    shrunken_model("minimax_m3_vl").save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense", MoeQuantizationConfig())
    for save in (model.save_pretrained, lambda path: save_bitsandbytes(model, path)):
        with pytest.raises(ValueError, match="is in 4 bits, but its layout in checkpoints of MiniMaxM3"):
            save(tmp_path / "packed")


def test_submodels_are_saved(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense")
    model.model.save_pretrained(tmp_path / "part")
    part = transformers.AutoModel.from_pretrained(tmp_path / "part", device_map="cpu")
    assert_same_bytes(packed_bytes(part), packed_bytes(model.model))
    assert model.model.dequantize() is model.model


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_dequantizing_after_saving(dtype, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense", MoeQuantizationConfig())
    model.save_pretrained(tmp_path / "packed")
    model = model.dequantize(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype or torch.bfloat16}
    assert logits(model, token_ids()).isfinite().all()
    model.save_pretrained(tmp_path / "plain")
    assert read_tensors(tmp_path / "plain").keys() == read_tensors(tmp_path / "dense").keys()


def test_merging_after_saving_in_memory(tmp_path):
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path / "dense")
    model = get_peft_model(model, MoeQLoraConfig(r=4)).unload()
    model.save_pretrained(tmp_path / "packed")
    model.dequantize().save_pretrained(tmp_path / "plain")
    assert read_tensors(tmp_path / "plain").keys() == read_tensors(tmp_path / "dense").keys()


def test_adapter_on_a_model_with_skipped_modules(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    config = MoeQuantizationConfig(skip_modules=["layers.1.mlp.experts"], quantize_linear=False)
    model = get_peft_model(in_4_bits(tmp_path, config), MoeQLoraConfig(r=4))
    randomize_adapter(model)
    live = logits(model, token_ids())
    model.save_pretrained(tmp_path / "adapter")
    second = PeftModel.from_pretrained(in_4_bits(tmp_path, config), tmp_path / "adapter").eval()
    assert torch.equal(logits(second, token_ids()), live)
    second.add_adapter("other", MoeQLoraConfig(r=2))
    assert len(second.unload().model.layers[1].mlp.experts.gate_up_proj.weight) == 8


@pytest.mark.parametrize("skipped", ["layers.9.mlp.experts", "gate_up_proj"])
def test_unmatched_skip_modules(skipped, tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"skip_modules contains '{skipped}'"):
        in_4_bits(tmp_path, MoeQuantizationConfig(skip_modules=[skipped]))


def test_config_overrides(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, num_experts_per_tok=1)
    assert model.config.num_experts_per_tok == model.model.layers[0].mlp.gate.top_k == 1


def test_config_overrides_of_a_submodel(tmp_path):
    shrunken_model("qwen3_vl_moe").save_pretrained(tmp_path)
    model = in_4_bits(tmp_path, text_config={"num_experts_per_tok": 1})
    assert model.config.text_config.num_experts_per_tok == 1
    assert model.config.text_config.hidden_size == model.get_input_embeddings().weight.shape[1]


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "float32"}, torch.float32),
        ({"torch_dtype": "auto"}, torch.float16),
        ({"dtype": torch.float32, "torch_dtype": torch.float16}, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_config", [False, True])
def test_dtype_and_torch_dtype(has_config, kwargs, expected, tmp_path):
    tiny_model(dtype=torch.float16).save_pretrained(tmp_path)
    if has_config:
        kwargs = {**kwargs, "config": transformers.AutoConfig.from_pretrained(tmp_path)}
    model = load_quantized(tmp_path, device_map="cpu", **kwargs)
    assert model.dtype == model.config.dtype == model.model.layers[0].mlp.experts.down_proj.dtype == expected


def test_callers_configuration_is_not_modified(tmp_path):
    tiny_model(dtype=torch.bfloat16, moe_intermediate_size=64).save_pretrained(tmp_path / "dense")
    save_bitsandbytes(
        in_4_bits(tmp_path / "dense", MoeQuantizationConfig("fp4", quantize_linear=False)), tmp_path / "packed"
    )
    file = tmp_path / "packed" / "config.json"
    plain = json.loads(file.read_text())
    del plain["quantization_config"]
    file.write_text(json.dumps(plain))
    config = MoeQuantizationConfig("nf4", 128, quantize_linear=False)
    before = config.to_dict()
    found = in_4_bits(tmp_path / "packed", config)
    assert found.config.quantization_config.format == FourBitFormat("fp4", 64)
    assert config.to_dict() == before


def test_experts_on_a_meta_model_keep_the_checkpoints_storage(tmp_path):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    expected = in_4_bits(tmp_path / "dense", MoeQuantizationConfig("fp4", quantize_linear=False))
    expected.save_pretrained(tmp_path / "packed")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(expected.config, dtype=torch.bfloat16)
    load_experts(model, tmp_path / "packed", None, progressbar=False)
    assert model.model.layers[0].mlp.experts.down_proj.storage == FourBitFormat("fp4", 64)
    assert_same_bytes(packed_bytes(model), packed_bytes(expected))
    (tmp_path / "packed" / "config.json").unlink()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(expected.config, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_experts(model, tmp_path / "packed", progressbar=False)


def test_shards_are_read_in_order(tmp_path):
    tensors = read_tensors_of_tiny(tmp_path)
    write_tensors(tmp_path, tensors, num_shards=5)
    checkpoint = Checkpoint.open(tmp_path)
    with torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(tmp_path)
        model = transformers.AutoModelForCausalLM.from_config(config)
    sources = SourceFinder(model, checkpoint).find()
    order = in_order_of_reading(sources, checkpoint)
    assert len(order) == 4
    first = [min(checkpoint.position(key) for key in sources[path][projection].keys) for path, projection in order]
    assert first == sorted(first)
    assert_same_bytes(packed_bytes(in_4_bits(tmp_path)), packed_bytes(in_4_bits(tmp_path / "one")))


def read_tensors_of_tiny(directory) -> dict[str, torch.Tensor]:
    model = tiny_model(dtype=torch.bfloat16)
    model.save_pretrained(directory)
    model.save_pretrained(directory / "one")
    return read_tensors(directory)


def test_loaded_experts_do_not_change_with_the_file(tmp_path):
    tiny_model("gpt_oss", dtype=torch.bfloat16).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))
    load_experts(model, tmp_path, dtype=torch.bfloat16, progressbar=False)
    bias = model.model.layers[0].mlp.experts.gate_up_proj_bias
    before = bias.clone()
    file = tmp_path / "model.safetensors"
    with open(file, "r+b") as opened:
        start = 8 + int.from_bytes(opened.read(8), "little")
        opened.seek(start)
        opened.write(b"\x11" * (file.stat().st_size - start))
    assert torch.equal(bias, before)


def test_stacks_of_other_orientation_in_a_submodel(tmp_path):
    """Codes are flat, so no shape reveals the orientation; it follows from the saved names."""
    dense = shrunken_model("llama4_text")
    dense.save_pretrained(tmp_path / "dense")
    model = in_4_bits(tmp_path / "dense", EXPERTS_ONLY)
    for experts in (module for module in model.modules() if isinstance(module, QuantizedExperts)):
        for stack in (experts.gate_up_proj, experts.down_proj):
            num_experts, rows, columns = stack.shape
            stack.shape, stack.is_transposed = torch.Size((num_experts, columns, rows)), not stack.is_transposed
    model.save_pretrained(tmp_path / "whole")
    part = transformers.AutoModel.from_pretrained(tmp_path / "whole", device_map="cpu")
    stacks = [module for module in part.modules() if isinstance(module, QuantizedStack)]
    assert stacks
    assert not any(stack.is_transposed for stack in stacks)


@pytest.mark.parametrize(
    "model_id", ["missing", "./missing", "~/missing", "models/qwen3/missing", "/missing", "a/file"]
)
@pytest.mark.parametrize("read", [load_quantized, read_expert_shapes, lambda base: checkpoint_directory(base, Path())])
def test_paths_that_are_not_directories_are_named(model_id, read, tmp_path, monkeypatch):
    """The hub's message would only say that this is not a name of a model."""
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    Path("a/file").touch()
    with pytest.raises(ValueError, match=f"^{re.escape(model_id)} is neither a directory nor"):
        read(model_id)


def test_submodel_with_own_config_keeps_its_storage(tmp_path):
    model = shrunken_model("qwen3_vl_moe")
    model.save_pretrained(tmp_path / "dense")
    config = MoeQuantizationConfig("fp4", quantize_linear=False)
    model = type(model).from_pretrained(
        tmp_path / "dense", dtype=torch.bfloat16, quantization_config=config, device_map="cpu"
    )
    model.model.language_model.save_pretrained(tmp_path / "part")
    again = load_quantized(tmp_path / "part", device_map="cpu")
    assert {stack.storage.quant_type for stack in again.modules() if isinstance(stack, QuantizedStack)} == {"fp4"}
    assert_same_bytes(packed_bytes(again), packed_bytes(model.model.language_model))
