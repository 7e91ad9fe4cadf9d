"""From quantized experts back to 16 bits: tensors equal `from_pretrained`'s, and the model counts as unquantized."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
import transformers
from peft import get_peft_model
from shrunken_models import shrunken_config, shrunken_model_or_skip
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized, quantize_experts
from peft_moe_qlora.quantization import FourBitFormat, QuantizedStack


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(itertools.chain(model.named_parameters(), model.named_buffers()))


def loaded(path, dtype: torch.dtype, **options) -> transformers.PreTrainedModel:
    return load_quantized(path, MoeQuantizationConfig(**options), dtype=dtype, device_map="cpu")


def in_memory(path, dtype: torch.dtype) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    quantize_experts(model, progressbar=False)
    return model


def by_bitsandbytes(path, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=config, device_map="cpu"
    )


def merged(path, dtype: torch.dtype, into: torch.dtype) -> transformers.PreTrainedModel:
    return get_peft_model(in_memory(path, dtype), MoeQLoraConfig(r=2)).merge_and_unload(dtype=into)


WAYS = {
    "loaded": lambda path, dtype, into: loaded(path, dtype).dequantize(into),
    "in memory": lambda path, dtype, into: in_memory(path, dtype).dequantize(into),
    "left in 16 bits": lambda path, dtype, into: get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype), MoeQLoraConfig(r=2, quant_type=None)
    ).merge_and_unload(dtype=into),
    "merged": merged,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("dtype", "into"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "gemma4_text"])
def test_dtypes_match_loading(model_type, dtype, into, way, tmp_path):
    """DeepSeek keeps its router in fp32, gpt-oss its norms also in fp16; Gemma has buffers in the model's dtype."""
    if model_type == "gemma4_text":
        config = shrunken_config(model_type)
        config.vocab_size_per_layer_input = 128
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    else:
        tiny_model(model_type).save_pretrained(tmp_path)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=into)
    found = WAYS[way](tmp_path, dtype, into)
    kinds = {name: tensor.dtype for name, tensor in tensors_of(expected).items()}
    assert {name: tensor.dtype for name, tensor in tensors_of(found).items()} == kinds
    assert found.dtype == found.config.dtype == into
    frequencies = {name: tensor for name, tensor in found.named_buffers() if name.endswith("inv_freq")}
    assert frequencies
    assert all(torch.equal(tensor, expected.get_buffer(name)) for name, tensor in frequencies.items())
    assert logits(found, token_ids()).isfinite().all()


def test_long_inputs_after_dequantizing(tmp_path):
    """With bf16 rotary frequencies, the results at 512 tokens were off by 6.7 %."""
    tiny_model(max_position_embeddings=1024).save_pretrained(tmp_path)
    ids = token_ids(batch=1, length=512)
    live = logits(loaded(tmp_path, torch.bfloat16), ids).float()
    found = logits(loaded(tmp_path, torch.bfloat16).dequantize(torch.bfloat16), ids).float()
    assert (found - live).norm() / live.norm() < 0.03


def test_deltas_of_linear_layers_are_added_in_fp32(tmp_path):
    """Merging a 16-bit model into fp32 rounds nothing: the delta is too small for bf16."""
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    before = base.model.layers[0].self_attn.q_proj.weight.detach().float()
    model = get_peft_model(base, MoeQLoraConfig(r=2, target_modules="all-linear"))
    randomize_adapter(model, std=1e-3)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    delta = layer.get_delta_weight("default").detach().float()
    found = model.merge_and_unload(dtype=torch.float32).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(found, before + delta, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_stack_has_the_dtype_of_its_model(dtype):
    stack = QuantizedStack.from_dense(torch.randn(2, 8, 64, dtype=torch.bfloat16), False, FourBitFormat())
    before = {name: tensor.clone() for name, tensor in stack.state_dict().items()}
    stack.to(dtype)
    assert stack.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in stack.state_dict().items())
    assert stack.to("cpu").dtype == dtype
    assert stack.to_empty(device="meta").dtype == dtype


@pytest.mark.parametrize("load", [loaded, in_memory])
def test_dequantizing_a_cast_model(load, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = load(tmp_path, torch.bfloat16).to(torch.float16)
    live = logits(model, token_ids())
    model = model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert (logits(model, token_ids()) - live).abs().max() < 0.05


def marked_as_quantized(model: transformers.PreTrainedModel) -> list[str]:
    """The attributes of a model and its submodels that mark them as quantized."""
    names = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit")
    return [
        f"{type(part).__name__}.{name}"
        for part in model.modules()
        if isinstance(part, transformers.PreTrainedModel)
        for owner, name in [(part, name) for name in names] + [(part.config, "quantization_config")]
        if getattr(owner, name, None)
    ] + (["_is_quantized"] if hasattr(model.config, "_is_quantized") else [])


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("way", ["loaded", "in memory", "merged", "bitsandbytes"])
def test_16_bit_model_is_not_marked_as_quantized(way, is_saved, tmp_path):
    """Trainer rejected it as "purely quantized"."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    if way == "merged":
        model = loaded(tmp_path / "base", torch.bfloat16, quantize_linear=False)
    elif way == "in memory":
        model = in_memory(tmp_path / "base", torch.bfloat16)
    elif way == "bitsandbytes":
        model = by_bitsandbytes(tmp_path / "base")
        quantize_experts(model, progressbar=False)
    else:
        model = loaded(tmp_path / "base", torch.bfloat16)
    if is_saved:
        model.save_pretrained(tmp_path / "packed")
    if way == "merged":
        model = get_peft_model(model, MoeQLoraConfig(r=2)).merge_and_unload(dtype=torch.bfloat16)
    else:
        model = model.dequantize()
    assert marked_as_quantized(model) == []
    transformers.Trainer(model, transformers.TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))
    model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


@pytest.mark.parametrize("load", [loaded, by_bitsandbytes])
def test_4_bit_linear_layers_are_left_to_bitsandbytes(load, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = get_peft_model(load(tmp_path, torch.bfloat16), MoeQLoraConfig(r=2))
    model = model.merge_and_unload(dtype=torch.bfloat16)
    for part in (model, model.model):
        assert type(part.hf_quantizer) is Bnb4BitHfQuantizer
        assert part.is_quantized
        assert part.is_loaded_in_4bit
        assert part.quantization_method == model.config.quantization_config.quant_method == "bitsandbytes"


def test_16_bit_experts_are_not_marked_as_4_bit(tmp_path):
    """Trainer would not spread the model over several GPUs, and PEFT would mistake the type of its layers."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2, quant_type=None)).base_model.model
    assert not getattr(model, "is_loaded_in_4bit", False)
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2)).base_model.model
    assert model.is_loaded_in_4bit
    tiny_model().save_pretrained(tmp_path)
    assert loaded(tmp_path, torch.bfloat16, quant_type=None).is_loaded_in_4bit  # its linear layers


def test_submodels_loaded_by_bitsandbytes(tmp_path):
    """transformers marks only the whole model as quantized, but a submodel can be saved separately."""
    tiny_model().save_pretrained(tmp_path / "base")
    model = by_bitsandbytes(tmp_path / "base")
    quantize_experts(model, progressbar=False)
    model.model.save_pretrained(tmp_path / "part")
    part = transformers.AutoModel.from_pretrained(tmp_path / "part", dtype=torch.bfloat16, device_map="cpu").train()
    with torch.no_grad():
        expected = model.model(input_ids=token_ids()).last_hidden_state
        assert torch.equal(part(input_ids=token_ids()).last_hidden_state, expected)


@pytest.mark.parametrize("load", [loaded, in_memory])
def test_without_the_stored_conversions_of_transformers(load, tmp_path):
    """transformers deletes them when it considers the quantization removed."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base", torch.bfloat16)
    model.__dict__.pop("_weight_conversions", None)
    model.save_pretrained(tmp_path / "packed")
    packed = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map="cpu").train()
    assert torch.equal(logits(packed, token_ids()), logits(model, token_ids()))
    expected = logits(model.dequantize(), token_ids())
    model.__dict__.pop("_weight_conversions", None)
    model.save_pretrained(tmp_path / "plain")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    assert torch.equal(logits(again, token_ids()), expected)


COPIES = {"pickle": lambda model: pickle.loads(pickle.dumps(model)), "deepcopy": copy.deepcopy}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("has_adapter", [False, True])
@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_copies_of_a_model(model_type, is_saved, has_adapter, make_copy, tmp_path):
    """`pickle` works, and so do `torch.save` and spawned processes."""
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    model = loaded(tmp_path / "base", torch.bfloat16)
    if is_saved:
        model.save_pretrained(tmp_path / "packed")
    if has_adapter:
        model = get_peft_model(model, MoeQLoraConfig(r=2, target_modules="all-linear")).eval()
        randomize_adapter(model)
    found = make_copy(model)
    assert torch.equal(logits(found, token_ids()), logits(model, token_ids()))
    if not has_adapter:
        found.save_pretrained(tmp_path / "again")
        again = load_quantized(tmp_path / "again", device_map="cpu")
        assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))


def test_parameters_of_the_top_level_module_are_cast(tmp_path):
    """Their names have no module path."""
    dense = shrunken_model_or_skip("zaya", dtype=torch.bfloat16).model
    dense.save_pretrained(tmp_path)
    expected = tensors_of(transformers.AutoModel.from_pretrained(tmp_path, dtype=torch.float32))
    assert any("." not in name for name, _ in dense.named_parameters())
    quantize_experts(dense, progressbar=False)
    found = tensors_of(dense.dequantize(torch.float32))
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
