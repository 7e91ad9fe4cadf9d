"""Published checkpoints are loaded without changing a bit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes import functional as bnb
from checkpoint_writers import Tensors, read_tensors, write_tensors
from peft import get_peft_model
from published_writers import (
    FP8,
    PER_EXPERT,
    QUERY,
    STATIC,
    Published,
    fused_fp8,
    gpt_oss,
    joined,
    publish,
    publish_fused,
    qwen,
    set_config,
)
from safetensors.torch import save_file
from shrunken_models import shrunken_model_or_skip
from tiny_models import logits, tiny_model, token_ids

from peft_moe_qlora import (
    CheckpointError,
    MoeQLoraConfig,
    MoeQuantizationConfig,
    load_experts,
    load_quantized,
    save_bitsandbytes,
)
from peft_moe_qlora.loading import inspect_checkpoint
from peft_moe_qlora.loading.checkpoint import Checkpoint
from peft_moe_qlora.loading.disk import PackedIndex, layouts_of
from peft_moe_qlora.quantization import DenseStack, QuantizedStack
from peft_moe_qlora.quantized_linear import QuantizedLinear


def load(directory: Path, config: MoeQuantizationConfig | None = None, dtype: torch.dtype = torch.float32, **kwargs):
    return load_quantized(directory, config, dtype=dtype, device_map="cpu", **kwargs)


def plain_model(model: torch.nn.Module, true: Tensors, directory: Path, **kwargs) -> torch.nn.Module:
    """A plain transformers model in fp32 with the exact weights."""
    model.save_pretrained(directory, **kwargs)
    write_tensors(directory, {key: tensor.float() for key, tensor in true.items()})
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def scale_of(tensors: Tensors, name: str) -> torch.Tensor:
    return next(
        tensors[key] for key in (f"{name}.weight_scale_inv", f"{name}.weight_scale", f"{name}.scale") if key in tensors
    )


def codes_of(tensors: Tensors, name: str) -> torch.Tensor:
    return next(tensors[key] for key in (f"{name}.weight", f"{name}.weight_packed") if key in tensors)


def stored(model: torch.nn.Module) -> Tensors:
    names = (".codes", ".block_scales", ".global_scales")
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith(names)}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert expected
    assert not [name for name in expected if not torch.equal(bits(found[name]), bits(expected[name]))]


@pytest.fixture(scope="module", params=PER_EXPERT)
def published(request, tmp_path_factory) -> tuple[Published, Path, Tensors]:
    layout, directory = PER_EXPERT[request.param], tmp_path_factory.mktemp("published")
    return layout, directory, publish(qwen(), directory, layout, num_shards=3)


def test_codes_and_scales_are_loaded_bitwise(published):
    layout, directory, true = published
    tensors, model = read_tensors(directory), load(directory)

    def codes(tensors: Tensors, name: str) -> torch.Tensor:
        return bits(codes_of(tensors, name)) ^ layout.turn

    for layer in range(2):
        experts = model.model.layers[layer].mlp.experts
        for stack, projections in (
            (experts.gate_up_proj, ("gate_proj", "up_proj")),
            (experts.down_proj, ("down_proj",)),
        ):
            assert str(stack.storage) == layout.experts
            for expert in range(4):
                names = [f"model.layers.{layer}.mlp.experts.{expert}.{name}" for name in projections]
                for found, read in ((stack.codes, codes), (stack.block_scales, scale_of)):
                    assert torch.equal(bits(found[expert]), torch.cat([bits(read(tensors, name)) for name in names]))
                expected = torch.cat([true[f"{name}.weight"] for name in names])
                assert torch.equal(stack.decode_expert(expert, torch.float32), expected)
            assert not any(parameter.requires_grad for parameter in stack.parameters())
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear, key = getattr(model.model.layers[layer].self_attn, name), f"model.layers.{layer}.self_attn.{name}"
            assert isinstance(linear, QuantizedLinear)
            assert str(linear.storage) == (layout.linear or layout.experts)
            assert torch.equal(bits(linear.codes), codes(tensors, key))
            assert torch.equal(bits(linear.block_scales), bits(scale_of(tensors, key)))
            assert torch.equal(linear.decode(torch.float32), true[f"{key}.weight"])
            assert not linear.codes.requires_grad
    config = model.config.quantization_config
    assert (str(config.format), config.linear_storage) == (layout.experts, layout.linear or layout.experts)
    assert type(model.lm_head) is torch.nn.Linear


def test_writing_is_the_inverse_of_reading(published):
    layout, directory, _ = published
    checkpoint = Checkpoint.open(directory)
    index = PackedIndex(checkpoint, layouts_of(layout.config))
    assert index.weights()
    for key in index.weights():
        packed = index.packed_tensor(key)
        written = packed.write(packed.read(checkpoint))
        expected = {key: checkpoint.read(key) for key in packed.keys if "input" not in key and "activation" not in key}
        assert {key: (t.shape, t.dtype) for key, t in written.items()} == {
            key: (t.shape, t.dtype) for key, t in expected.items()
        }
        assert_same(written, expected)


def test_model_equals_the_exact_weights(published, tmp_path):
    _, directory, true = published
    expected = logits(plain_model(qwen(), true, tmp_path), token_ids())
    torch.testing.assert_close(logits(load(directory), token_ids()), expected, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_again(published, tmp_path):
    layout, directory, _ = published
    model = load(directory)
    model.save_pretrained(tmp_path)
    for again in (
        load(tmp_path),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu"),
    ):
        assert_same(stored(again), stored(model))
        assert torch.equal(logits(again, token_ids()), logits(model, token_ids()))
        assert str(again.config.quantization_config.format) == layout.experts
    found = inspect_checkpoint(tmp_path)
    assert {group.found for group in found.stacks} == {layout.experts}
    assert found.linear_weights == inspect_checkpoint(directory).linear_weights > 0


def test_training_step(published):
    layout, directory, _ = published
    base = load(directory)
    before = stored(base)
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules="all-linear"))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(input_ids=token_ids(), labels=token_ids()).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    after = {name.replace("base_layer.", "").removeprefix("base_model.model."): t for name, t in stored(model).items()}
    assert_same(after, before)
    assert [stack.storage for stack in model.experts_report().stacks] == [layout.experts] * 4


def test_inspecting(published):
    layout, directory, _ = published
    found = inspect_checkpoint(directory)
    assert {group.found for group in found.stacks} == {f"{layout.experts}, one tensor per expert"}
    experts = [module for module in load(directory).modules() if isinstance(module, QuantizedStack)]
    assert sum(group.packed_nbytes for group in found.stacks) == sum(stack.nbytes for stack in experts)


def test_loading_experts_onto_a_meta_model(published):
    layout, directory, true = published
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(directory))
    load_experts(model, directory, dtype=torch.float32, progressbar=False)
    stack = model.model.layers[1].mlp.experts.down_proj
    assert str(stack.storage) == layout.experts
    key = "model.layers.1.mlp.experts.3.down_proj.weight"
    assert torch.equal(stack.decode_expert(3, torch.float32), true[key])


def test_requantized_into_another_storage(published):
    """One expert at a time, as from a 16-bit checkpoint."""
    layout, directory, true = published
    config = MoeQuantizationConfig(quant_type="nf4")
    model = load(directory, config, torch.bfloat16)
    stack = model.model.layers[1].mlp.experts.down_proj
    weights = [true[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] for expert in range(4)]
    expected = QuantizedStack.from_dense(torch.stack(weights).bfloat16(), False, config.format)
    assert_same(stack.state_dict(), expected.state_dict())
    query = model.get_submodule(QUERY)
    assert str(query.storage) == model.config.quantization_config.linear_storage == (layout.linear or layout.experts)
    assert config.linear_storage is None


@pytest.mark.parametrize("name", ["nvfp4", "compressed, nvfp4"])
def test_second_level_scales(name, tmp_path):
    """Separate ones for gate, up and down projection, with any values."""
    publish(qwen(), tmp_path, PER_EXPERT[name])
    tensors, model = read_tensors(tmp_path), load(tmp_path)
    ending = "weight_scale_2" if name == "nvfp4" else "weight_global_scale"

    def of(path: str) -> torch.Tensor:
        return tensors[f"{path}.{ending}"].view(1)

    experts = model.model.layers[1].mlp.experts
    for expert in range(4):
        gate, up, down = (of(f"model.layers.1.mlp.experts.{expert}.{name}_proj") for name in ("gate", "up", "down"))
        assert torch.equal(experts.gate_up_proj.global_scales[expert].view(torch.float32), torch.cat((gate, up)))
        assert torch.equal(experts.down_proj.global_scales[expert].view(torch.float32), down)
    assert torch.equal(model.get_submodule(QUERY).global_scales.view(torch.float32), of(QUERY))


def test_quantization_config_in_a_separate_file(tmp_path):
    """Older ModelOpt checkpoints have nothing in config.json."""
    publish(qwen(), tmp_path, PER_EXPERT["nvfp4"])
    expected = load(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": quantization}))
    assert_same(stored(load(tmp_path)), stored(expected))
    assert {group.found for group in inspect_checkpoint(tmp_path).stacks} == {"nvfp4, one tensor per expert"}
    beside.write_text(json.dumps({"quantization": {**quantization, "group_size": 32}}))
    for read in (inspect_checkpoint, load):
        with pytest.raises(CheckpointError, match="is quantized by 'modelopt', which is not supported for experts"):
            read(tmp_path)


@pytest.mark.parametrize("choice", ["16 bits", "4 bits"])
def test_decoded_linear_layers(choice, published):
    _, directory, true = published
    config = MoeQuantizationConfig(storage="as stored", packed_linear=choice, quantize_linear=choice == "4 bits")
    model = load(directory, config, torch.bfloat16)
    assert_same(stored(model.model.layers[0].mlp), stored(load(directory).model.layers[0].mlp))
    query, expected = model.get_submodule(QUERY), true[f"{QUERY}.weight"].bfloat16()
    if choice == "16 bits":
        assert type(query) is torch.nn.Linear
        assert torch.equal(query.weight, expected)
    else:
        codes, state = bnb.quantize_4bit(expected, quant_type="nf4")
        assert torch.equal(query.weight.data.flatten(), codes.flatten())
        assert torch.equal(query.weight.quant_state.absmax, state.absmax)
    assert torch.isfinite(logits(model, token_ids())).all()


def test_experts_in_16_bits(tmp_path):
    true = publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    model = load(tmp_path, MoeQuantizationConfig(quant_type=None))
    stack = model.model.layers[0].mlp.experts.down_proj
    assert isinstance(stack, DenseStack)
    assert torch.equal(stack.weight[1], true["model.layers.0.mlp.experts.1.down_proj.weight"])


def test_w1_w2_w3_keys(tmp_path):
    """The names of MiniMax-M2."""
    true = publish(
        tiny_model("mixtral", dtype=torch.bfloat16, hidden_size=256, head_dim=64, intermediate_size=192),
        tmp_path,
        PER_EXPERT["fp8"],
    )
    model = load(tmp_path)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    halves = [true[f"model.layers.0.block_sparse_moe.experts.3.{name}.weight"] for name in ("w1", "w3")]
    assert torch.equal(stack.decode_expert(3, torch.float32), torch.cat(halves))
    model.save_pretrained(tmp_path / "again")
    assert_same(stored(load(tmp_path / "again")), stored(model))


def test_shared_experts_and_dense_layers(tmp_path):
    """DeepSeek-V3: all linear layers, also of odd sizes, but not the router."""
    sizes = {"hidden_size": 192, "moe_intermediate_size": 160, "intermediate_size": 200}
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16, **sizes)
    true = publish(model, tmp_path, PER_EXPERT["fp8"])
    loaded = load(tmp_path)
    kept = {name for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)}
    assert "model.layers.0.mlp.down_proj" in kept
    assert "model.layers.1.mlp.shared_experts.up_proj" in kept
    expected = logits(plain_model(model, true, tmp_path / "true"), token_ids())
    torch.testing.assert_close(logits(loaded, token_ids()), expected, rtol=1e-4, atol=1e-4)


def test_biases_of_linear_layers(tmp_path):
    model = qwen(attention_bias=True)
    true = publish(model, tmp_path, PER_EXPERT["fp8"])
    loaded = load(tmp_path)
    assert torch.equal(loaded.get_submodule(QUERY).bias, true[f"{QUERY}.bias"].float())
    expected = logits(plain_model(model, true, tmp_path / "true"), token_ids())
    torch.testing.assert_close(logits(loaded, token_ids()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [(128, 128), (64, 32), None], ids=str)
@pytest.mark.parametrize("scales_of_gate_up", [1, 2])
def test_fused_fp8(block, scales_of_gate_up, tmp_path):
    """One tensor for all experts; gate and up projection have separate block grids."""
    config = STATIC if block is None else {**FP8, "weight_block_size": list(block)}
    true = publish_fused(qwen(), tmp_path, config, fused_fp8(block, scales_of_gate_up))
    tensors, model = read_tensors(tmp_path), load(tmp_path)
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        stack = model.get_submodule(key)
        assert torch.equal(stack.decode(torch.float32), true[key])
        assert torch.equal(bits(stack.codes), bits(tensors[key]))
        scales = tensors[f"{key}_scale_inv"]
        assert torch.equal(stack.block_scales.view(torch.float32), scales.expand(stack.block_scales.shape))
    expected = logits(plain_model(qwen(), true, tmp_path / "true", save_original_format=False), token_ids())
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    assert_same(stored(load(tmp_path / "again")), stored(model))
    assert {group.found.split(", ")[1] for group in inspect_checkpoint(tmp_path).stacks} == {"fused"}


@pytest.mark.parametrize("width", [96, 128], ids=["wide", "square"])
def test_gpt_oss(width, tmp_path):
    """Its down projection is square; only the layout tells that the files store it transposed."""
    sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": width}
    model = tiny_model("gpt_oss", dtype=torch.bfloat16, **sizes)
    true = publish_fused(model, tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, gpt_oss)
    tensors, loaded = read_tensors(tmp_path), load(tmp_path)
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        stack = loaded.get_submodule(key)
        assert not stack.is_transposed
        assert torch.equal(stack.decode(torch.float32).transpose(1, 2), true[key])
        assert torch.equal(bits(stack.codes), bits(tensors[f"{key}_blocks"]))
        assert torch.equal(bits(stack.block_scales), bits(tensors[f"{key}_scales"]))
    expected = logits(plain_model(model, true, tmp_path / "true", save_original_format=False), token_ids())
    torch.testing.assert_close(logits(loaded, token_ids()), expected, rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same(stored(again), stored(loaded))
    assert torch.equal(logits(again, token_ids()), logits(loaded, token_ids()))
    in_nf4 = load(tmp_path, MoeQuantizationConfig(quant_type="nf4", quantize_linear=False))
    stack = in_nf4.model.layers[1].mlp.experts.down_proj
    assert_same(
        stack.state_dict(), QuantizedStack.from_dense(true[key], stack.is_transposed, stack.storage).state_dict()
    )
    trained = get_peft_model(again, MoeQLoraConfig(r=4, target_modules="all-linear"))
    trained(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert all(p.grad is not None for p in trained.parameters() if p.requires_grad)


@pytest.mark.parametrize("model_type", ["mistral4", "llama4"])
@pytest.mark.parametrize("name", ["fp8", "compressed, channel", "compressed, mxfp4"])
def test_per_expert_files_of_fused_16_bit_models(name, model_type, tmp_path):
    """transformers has no conversion for their keys; Llama 4's class stores transposed stacks."""
    model, layout = shrunken_model_or_skip(model_type), PER_EXPERT[name]
    # rows of some linear layers are shorter than a block of 32
    true = publish(model, tmp_path, layout, is_packed=lambda key: ".experts." in key)
    loaded = load(tmp_path)
    paths = [path for path, module in loaded.named_modules() if type(module).__name__ == "QuantizedExperts"]
    for path in paths:
        for projection in ("gate_up_proj", "down_proj"):
            stack, expected = loaded.get_submodule(f"{path}.{projection}"), joined(true)[f"{path}.{projection}"]
            expected = expected.transpose(1, 2) if model_type == "llama4" else expected
            assert torch.equal(stack.decode(torch.float32), expected)
            assert str(stack.storage) == layout.experts
    loaded.save_pretrained(tmp_path / "again")
    assert_same(stored(load(tmp_path / "again")), stored(loaded))


def test_deepseek_v4(tmp_path):
    """Under the names of its own checkpoints; a layer whose class uses the weight directly is decoded."""

    def is_packed(key: str) -> bool:
        return re.search(r"\.(w[123]|w[a-z]+(_[ab])?)\.weight$", key) is not None

    model, layout = shrunken_model_or_skip("deepseek_v4"), PER_EXPERT["mxfp4 experts beside fp8"]
    true = publish(model, tmp_path, layout, is_packed=is_packed)
    loaded = load(tmp_path)
    expected = plain_model(model, true, tmp_path / "true")
    for path in ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"):
        assert str(loaded.get_submodule(path).storage) == "mxfp4"
        assert torch.equal(loaded.get_submodule(path).decode(torch.float32), expected.get_parameter(path))
    attention, plain = (one.model.layers[1].self_attn for one in (loaded, expected))
    assert isinstance(attention.kv_proj, QuantizedLinear)
    assert torch.equal(attention.kv_proj.decode(torch.float32), plain.kv_proj.weight)
    assert type(attention.o_a_proj) is type(plain.o_a_proj)
    assert torch.equal(attention.o_a_proj.weight, plain.o_a_proj.weight)
    ids = token_ids(length=8)
    torch.testing.assert_close(logits(loaded, ids), logits(expected, ids), rtol=1e-4, atol=1e-4)
    loaded.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert_same(stored(again), stored(loaded))
    assert torch.equal(logits(again, ids), logits(loaded, ids))


def test_scales_in_another_file(tmp_path):
    publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    expected, tensors = stored(load(tmp_path)), read_tensors(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    weight_map = {key: f"model-0000{1 + key.endswith('_inv')}-of-00002.safetensors" for key in tensors}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in tensors if weight_map[key] == name}, tmp_path / name, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_same(stored(load(tmp_path)), expected)


def test_dequantizing(tmp_path):
    true = publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    model = load(tmp_path).dequantize()
    expected = plain_model(qwen(), true, tmp_path / "true")
    assert_same(dict(model.state_dict()), dict(expected.state_dict()))


def test_saving_as_bitsandbytes_does(tmp_path):
    publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    with pytest.raises(ValueError, match=r"is stored as fp8/128x128, which bitsandbytes does not support"):
        save_bitsandbytes(load(tmp_path), tmp_path / "again")
    with pytest.raises(ValueError, match=r"q_proj is stored as fp8/128x128, which bitsandbytes does not support"):
        save_bitsandbytes(load(tmp_path, MoeQuantizationConfig()), tmp_path / "again")


def test_from_pretrained(tmp_path):
    """transformers rejects a configuration in addition to the checkpoint's; in its place it works."""
    publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    load_class = transformers.AutoModelForCausalLM.from_pretrained
    with pytest.raises(ValueError, match="quantized with FineGrainedFP8Config"):
        load_class(tmp_path, quantization_config=MoeQuantizationConfig())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = MoeQuantizationConfig(storage="as stored", quantize_linear=False).to_dict()
    model = load_class(tmp_path, config=config, dtype=torch.float32, device_map="cpu")
    assert_same(stored(model), stored(load(tmp_path)))


def test_from_pretrained_with_a_method_unknown_to_transformers(tmp_path):
    """It warns, and uses the given configuration for the checkpoint."""
    publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    set_config(tmp_path, {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"})
    with pytest.raises(CheckpointError, match="is quantized by 'modelopt', which is not supported for experts"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MoeQuantizationConfig())


def test_16_bit_layers_stay_in_16_bits(tmp_path):
    """The presence of a scale decides, not the config."""
    publish(qwen(), tmp_path, PER_EXPERT["fp8"])
    tensors = read_tensors(tmp_path)
    for key in [key for key in tensors if "layers.0" in key and key.endswith("_scale_inv")]:
        weight = key.removesuffix("_scale_inv")
        tensors[weight] = torch.randn(tensors[weight].shape).bfloat16() * 0.1
        del tensors[key]
    write_tensors(tmp_path, tensors)
    model = load(tmp_path)
    first, second = (layer.mlp.experts for layer in model.model.layers)
    assert isinstance(first.down_proj, DenseStack)
    assert isinstance(second.down_proj, QuantizedStack)
    assert torch.equal(
        model.model.layers[0].self_attn.q_proj.weight, tensors[QUERY.replace("1", "0") + ".weight"].float()
    )
    assert isinstance(model.model.layers[1].self_attn.q_proj, QuantizedLinear)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), token_ids()), logits(model, token_ids()))


def test_only_linear_layers_quantized(tmp_path):
    """Experts in 16 bits with linear layers in 8 bits."""
    layout = PER_EXPERT["fp8"]
    only_linear = Published(
        layout.config,
        lambda name, w: ({f"{name}.weight": w.bfloat16()}, w) if ".experts." in name else layout.pack(name, w),
        "",
    )
    publish(qwen(), tmp_path, only_linear)
    model = load(tmp_path)
    assert isinstance(model.model.layers[0].mlp.experts.down_proj, DenseStack)
    assert isinstance(model.get_submodule(QUERY), QuantizedLinear)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again"), token_ids()), logits(model, token_ids()))


def test_same_as_decoded_by_transformers(tmp_path):
    """Where its own reader is correct: widths of whole blocks."""
    publish(qwen(moe_intermediate_size=128), tmp_path, PER_EXPERT["fp8"])
    config = transformers.FineGrainedFP8Config(dequantize=True)
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32, device_map="cpu"
    )
    model = load(tmp_path)
    for name in ("gate_up_proj", "down_proj"):
        key = f"model.layers.1.mlp.experts.{name}"
        assert torch.equal(model.get_submodule(key).decode(torch.float32), stock.get_parameter(key))
    assert torch.equal(model.get_submodule(QUERY).decode(torch.float32), stock.get_submodule(QUERY).weight)
    torch.testing.assert_close(logits(model, token_ids()), logits(stock, token_ids()), rtol=1e-4, atol=1e-4)


def test_no_missing_or_unexpected_keys(tmp_path):
    publish(qwen(), tmp_path, PER_EXPERT["fp8 per tensor"])
    _, info = load(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
