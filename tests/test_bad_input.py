"""Bad input raises an error that names the module and the remedy, and does not change the model."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers_adapters import needs_adapter_methods

from peft_moe_qlora import MoeQLoraConfig, QuantizedExperts, prepare_model_for_training, quantize_experts


@contextmanager
def rejected(model: nn.Module, message: str, error: type[Exception] = ValueError) -> Iterator[None]:
    """The block raises, and the model keeps its modules, tensors and logits."""
    modules = {name: type(module) for name, module in model.named_modules()}
    tensors = {name: (tensor.dtype, tensor.clone()) for name, tensor in model.state_dict().items()}
    requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    runs = not any(tensor.is_meta or tensor.dtype.itemsize == 1 for _, tensor in tensors.values())
    before = logits(model, token_ids()) if runs else None
    with pytest.raises(error, match=message):
        yield
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == requires_grad
    after = model.state_dict()
    assert after.keys() == tensors.keys()
    for name, (dtype, tensor) in tensors.items():
        assert after[name].dtype == dtype
        assert tensor.is_meta or torch.equal(after[name], tensor), name
    if before is not None:
        assert torch.equal(logits(model, token_ids()), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["exprts"]}, r"\['exprts'\] match no module.*model.layers.0.mlp.experts"),
        ({"target_modules": ["q_proj", "w2x"]}, r"\['w2x'\] match no module"),
        ({"target_modules": "nothing.*"}, r"\['nothing.\*'\] match no module"),
        ({"target_modules": []}, "match no module"),
        ({"target_modules": ["experts"], "exclude_modules": ["experts"]}, "All modules were excluded|No modules were"),
        ({"target_modules": ["gate"]}, r"router model.layers.0.mlp.gate.*modules_to_save=\['gate'\]"),
        ({"target_modules": ["self_attn"]}, "model.layers.0.self_attn of type .*no weight matrix.*Name linear layers"),
        (
            {"target_modules": ["experts", "input_layernorm"]},
            "model.layers.0.input_layernorm of type .*no weight matrix",
        ),
        ({"target_modules": ["experts", "act_fn"]}, r"\['act_fn'\] match no module"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save contains 'nothing', which is not a module"),
        ({"modules_to_save": ["experts"]}, "modules_to_save contains 'experts'.*model.layers.0.mlp.experts"),
        ({"modules_to_save": ["mlp"]}, "modules_to_save contains 'mlp'.*model.layers.0.mlp.experts"),
        ({"layers_to_transform": [0, 7]}, r"layers_to_transform contains the layers \[7\].*2 layers, from 0 to 1"),
        ({"target_modules": ["experts.3.down_proj"]}, "model.layers.0.mlp.experts.*some experts only.*one stack"),
        ({"exclude_modules": ["gate_proj"]}, "exclude_modules contains the gate projection alone"),
        ({"exclude_modules": ["experts"]}, "exclu"),
        ({"target_modules": ["gate_proj", "down_proj"]}, "model.layers.0.mlp.experts.*one fused stack"),
    ],
    ids=str,
)
def test_wrong_targets(options, message):
    model = tiny_model()
    with rejected(model, message):
        get_peft_model(model, MoeQLoraConfig(**options))


@pytest.mark.parametrize("name", ["", "a.b", "train", "keys"])
def test_invalid_adapter_names(name):
    model = tiny_model()
    with rejected(model, f"'{name}' is not a valid adapter name"):
        get_peft_model(model, MoeQLoraConfig(), adapter_name=name)


def test_experts_registered_twice():
    model = tiny_model()
    model.model.layers[1].mlp.experts = model.model.layers[0].mlp.experts
    with rejected(model, "model.layers.1.mlp.experts and model.layers.0.mlp.experts are the same experts module"):
        get_peft_model(model, MoeQLoraConfig())


def test_weights_that_are_not_finite_are_not_quantized():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[3, 5, 7] = float("nan")
    message = "experts.gate_up_proj cannot be quantized: NaNs or infinite values detected in the weights of expert 3"
    with pytest.raises(ValueError, match=message):
        quantize_experts(model, progressbar=False)
    assert not any(isinstance(module, QuantizedExperts) for module in model.modules())


def test_preparing_a_model_with_an_adapter():
    model = get_peft_model(tiny_model(), MoeQLoraConfig())
    with rejected(model, "Call prepare_model_for_training before get_peft_model"):
        prepare_model_for_training(model)


def test_dequantizing_a_model_with_an_adapter():
    model = get_peft_model(tiny_model(), MoeQLoraConfig())
    with rejected(model, "merge_and_unload.*or unload"):
        model.get_base_model().dequantize(torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter_names": ["nobody"]}, r"The model has no adapter 'nobody'"),
        ({"adapter_names": ["nobody"], "dtype": torch.float32}, r"The model has no adapter 'nobody'"),
        ({"dtype": torch.int8}, "torch.int8 is not supported for merged weights"),
        ({"dtype": torch.float8_e4m3fn}, "torch.float8_e4m3fn is not supported for merged weights"),
    ],
    ids=str,
)
def test_invalid_merges(options, message):
    model = get_peft_model(tiny_model(), MoeQLoraConfig())
    with rejected(model, message):
        model.merge_and_unload(**options)


@pytest.mark.parametrize(
    ("other", "adapters", "weights", "message"),
    [
        ({}, ["default", "other"], [1.0], "Expected one weight for each adapter"),
        ({}, [], [], "Expected one weight for each adapter"),
        ({}, ["default", "nobody"], [1.0, 1.0], "Adapter nobody does not exist"),
        (
            {"layers_to_transform": [1]},
            ["other", "default"],
            [1.0, 1.0],
            "model.layers.0.mlp.experts.gate_up_proj would be missing",
        ),
    ],
)
def test_combinations_that_would_drop_parts(other, adapters, weights, message):
    model = get_peft_model(tiny_model(), MoeQLoraConfig())
    model.add_adapter("other", MoeQLoraConfig(**other))
    with rejected(model, message):
        model.add_weighted_adapter(adapters, weights, "sum", combination_type="cat")
    assert set(model.peft_config) == {"default", "other"}


def test_dense_model():
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with rejected(model, "No routed experts found in LlamaForCausalLM.*LoraConfig"):
        quantize_experts(model)
    with rejected(model, "No routed experts found"):
        get_peft_model(model, MoeQLoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8], ids=str)
def test_packed_weights_where_16_bits_are_expected(dtype):
    """The fault is in the last layer: no earlier layer may have been converted."""
    model = tiny_model()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)
    with rejected(model, rf"model.layers.1.mlp.experts.down_proj has dtype {dtype}.*with load_quantized"):
        quantize_experts(model)
    with rejected(model, "model.layers.1.mlp.experts.down_proj has dtype"):
        get_peft_model(model, MoeQLoraConfig())


def test_offloaded_experts(tmp_path):
    from accelerate import disk_offload

    model = tiny_model()
    disk_offload(model, tmp_path, execution_device="cpu")
    with rejected(model, r"model.layers.0.mlp.experts.gate_up_proj is on the meta device.*device_map"):
        get_peft_model(model, MoeQLoraConfig())


def test_stack_of_wrong_shape():
    model = tiny_model()
    model.model.layers[1].mlp.experts.down_proj = nn.Parameter(torch.zeros(8, 32, 64))
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts \(Qwen3MoeExperts\).*do not match"):
        quantize_experts(model)
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)


@pytest.mark.parametrize("storage", [{"quant_type": "fp4"}, {"blocksize": 128}, {"double_quant": True}], ids=str)
def test_requantizing_with_other_settings(storage):
    model = tiny_model()
    quantize_experts(model, progressbar=False)
    message = "model.layers.0.mlp.experts.gate_up_proj is already stored as nf4/64"
    with rejected(model, message):
        quantize_experts(model, **storage)
    with rejected(model, message):
        get_peft_model(model, MoeQLoraConfig(**storage))


def test_adapters_with_conflicting_storage():
    model = get_peft_model(tiny_model(), MoeQLoraConfig())
    with rejected(model, "requests experts stored as fp4/64, but adapter 'default' uses nf4/64.*quant_type"):
        model.add_adapter("other", MoeQLoraConfig(quant_type="fp4"))
    assert set(model.peft_config) == {"default"}


@needs_adapter_methods
def test_adapters_with_conflicting_storage_through_transformers():
    model = tiny_model()
    model.add_adapter(MoeQLoraConfig(), adapter_name="first")
    with rejected(model, "requests experts stored as fp4/64"):
        model.add_adapter(MoeQLoraConfig(quant_type="fp4"), adapter_name="second")
    assert set(model.peft_config) == {"first"}


@pytest.fixture
def adapter(tmp_path):
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, expert_r=3))
    randomize_adapter(model)
    model.save_pretrained(tmp_path)
    return tmp_path


KEY = "base_model.model.model.layers.1.mlp.experts.down_proj.lora_A.weight"


def transposed(tensors):
    tensors[KEY] = tensors[KEY].transpose(1, 2).contiguous()


def with_fewer_experts(tensors):
    for name in tensors:
        tensors[name] = tensors[name][:6].contiguous()


def without_last_key(tensors):
    del tensors[KEY]


def with_extra_key(tensors):
    tensors[KEY.replace("layers.1", "layers.2")] = tensors[KEY].clone()


def with_legacy_keys(tensors):
    for name in list(tensors):
        prefix, projection, factor, _ = name.rsplit(".", 3)
        tensors[f"{prefix}.{factor[:5]}{projection}{factor[4:]}"] = tensors.pop(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            with_legacy_keys,
            r"layers.0.mlp.experts.lora_(\w*)_A has a key from before.*Rename it in the file to "
            r"model.layers.0.mlp.experts.\1.lora_A.weight",
        ),
        (
            transposed,
            r"model.layers.1.mlp.experts.down_proj.lora_A.weight has shape \(8, 32, 3\).*"
            r"Expected .*\(8, 3, 32\)\..*another base model",
        ),
        (
            with_fewer_experts,
            r"model.layers.0.mlp.experts.gate_up_proj.lora_A.weight has shape \(6, .*\(8, .*another base model",
        ),
        (without_last_key, "no tensor model.layers.1.mlp.experts.down_proj.lora_A.weight.*another base model"),
        (
            with_extra_key,
            "model.layers.2.mlp.experts.down_proj.lora_A.weight matches no adapted experts.*another base model",
        ),
    ],
)
@pytest.mark.parametrize("onto", ["base", "adapted model"])
def test_adapter_of_wrong_shape(adapter, damage, message, onto):
    tensors = load_file(adapter / "adapter_model.safetensors")
    damage(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    if onto == "base":
        model = tiny_model()
        with rejected(model, message):
            PeftModel.from_pretrained(model, adapter)
    else:
        model = get_peft_model(tiny_model(), MoeQLoraConfig())
        with rejected(model, message):
            model.load_adapter(adapter, adapter_name="other")
        assert set(model.peft_config) == {"default"}


def test_state_dict_of_wrong_shape(adapter):
    from peft import set_peft_model_state_dict

    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, expert_r=2))
    tensors = load_file(adapter / "adapter_model.safetensors")
    with rejected(model, r"gate_up_proj.lora_A.default.weight has shape \(8, 3, 64\) in .*\. Expected \(8, 2, 64\)"):
        set_peft_model_state_dict(model, copy.deepcopy(tensors))


def test_router_index_may_be_empty():
    """A batch without tokens is valid."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4))
    layer = model.base_model.model.model.layers[0].mlp.experts
    hidden = torch.zeros(0, 64, requires_grad=True)
    out = layer(hidden, torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2))
    assert out.shape == (0, 64)
    out.sum().backward()
    assert all(p.grad is not None for n, p in layer.named_parameters() if "lora_" in n)


def test_ambiguous_pattern_order():
    """PEFT sorts patterns when it saves, so another one would come first after loading."""
    base = tiny_model()
    for patterns in ({"layers.1.mlp.experts.*": 4, "experts.*": 3}, {r"layers\.1\..*": 3, ".*": 11}):
        with pytest.raises(ValueError, match="both match model"):
            get_peft_model(base, MoeQLoraConfig(rank_pattern=patterns, target_modules=["experts"]))
    get_peft_model(base, MoeQLoraConfig(rank_pattern={"layers.1.mlp.experts.*": 3, "experts.*": 3}))


def edit_config(directory, **options) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **options}))


def test_saved_config_without_targets(adapter):
    """The default targets would drop all other tensors of the file."""
    edit_config(adapter, target_modules=None)
    model = tiny_model()
    with rejected(model, "has no target_modules"):
        PeftModel.from_pretrained(model, adapter)


def test_factors_of_an_unadapted_layer(tmp_path):
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=4, target_modules=["experts", "q_proj"]))
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, target_modules=["experts"])
    model = tiny_model()
    with rejected(model, r"self_attn.q_proj.lora_A.weight matches no adapted layer"):
        PeftModel.from_pretrained(model, tmp_path)


def test_saved_config_as_start_of_an_adapter_of_fewer_layers(tmp_path):
    get_peft_model(tiny_model(), MoeQLoraConfig(r=4, target_modules=["experts", "q_proj"])).save_pretrained(tmp_path)
    config = MoeQLoraConfig.from_pretrained(tmp_path)
    config.target_modules = {name for name in config.target_modules if "experts" in name}
    names = [name for name, _ in get_peft_model(tiny_model(), config).named_parameters() if "lora_" in name]
    assert names
    assert not any("q_proj" in name for name in names)


@pytest.mark.parametrize("base", [[], {"model_type": "qwen3_moe"}], ids=str)
def test_damaged_base_record(adapter, base):
    """Checked before experts are converted."""
    edit_config(adapter, base=base)
    model = tiny_model()
    with rejected(model, "base in the adapter's config cannot be read"):
        PeftModel.from_pretrained(model, adapter)
