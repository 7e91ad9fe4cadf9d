"""Merging: exact in 16 bits, with a single rounding in 4 bits, and undone bit by bit."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_models import assert_same_bytes, logits, packed_bytes, randomize_adapter, tiny_model, token_ids

from peft_moe_qlora import MoeQLoraConfig, QuantizedExperts, experts_report
from peft_moe_qlora.quantization import QuantizedStack

MODEL_TYPES = ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "phimoe"]


def adapted_model(model_type: str = "qwen3_moe", device: str = "cpu", dtype=torch.float32, **options):
    config = MoeQLoraConfig(**{"r": 4, "target_modules": "all-linear", **options})
    model = get_peft_model(tiny_model(model_type, device, dtype), config)
    randomize_adapter(model, std=0.05)
    return model.eval()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("quant_type", ["nf4", None])
def test_merging_into_fp32_equals_the_unmerged_adapter(model_type, quant_type, device):
    model = adapted_model(model_type, device, quant_type=quant_type)
    ids = token_ids(device)
    live = logits(model, ids)
    with model.disable_adapter():
        assert (logits(model, ids) - live).abs().max() > 1e-2
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(logits(merged, ids), live, rtol=0, atol=1e-5 * live.abs().max().item())
    assert not any(isinstance(module, (BaseTunerLayer, QuantizedExperts)) for module in merged.modules())
    assert type(merged.model.layers[-1].mlp.experts) is type(tiny_model(model_type).model.layers[-1].mlp.experts)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_merging_into_bf16_is_within_one_percent(model_type, device):
    """Logits of about 1, the unmerged adapter in bf16 too. Experts only: PEFT merges linear layers.

    Every token goes to all experts, so rounding can't change the routing (except for phimoe, whose router picks two).
    """
    every = {"num_experts_per_tok": 8 if model_type == "qwen3_moe" else 4}
    base = tiny_model(model_type, device, torch.bfloat16, std=0.02, **every)
    model = get_peft_model(base, MoeQLoraConfig(r=4)).eval()
    randomize_adapter(model)
    ids = token_ids(device)
    live = logits(model, ids).float()
    with model.disable_adapter():
        assert (logits(model, ids).float() - live).norm() > 2e-2 * live.norm()
    merged = logits(model.merge_and_unload(dtype=torch.bfloat16), ids).float()
    assert (merged - live).abs().max() <= 1e-2


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_merged_model_is_a_plain_checkpoint(model_type, tmp_path):
    model = adapted_model(model_type)
    merged = model.merge_and_unload(dtype=torch.float32)
    expected = logits(merged, token_ids())
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again, token_ids()), expected)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_requantized_stacks_are_rounded_once(model_type, double_quant):
    model = adapted_model(model_type, target_modules=["experts"], double_quant=double_quant)
    exact = copy.deepcopy(model).merge_and_unload(dtype=torch.float32)
    model.merge_adapter()
    errors = {(stack.path, stack.projection): stack.merge_error for stack in model.experts_report().stacks}
    for path, experts in model.base_model.model.named_modules():
        if not isinstance(experts, QuantizedExperts):
            continue
        path = path.removesuffix(".base_layer")
        for projection in experts.layout.projections:
            weight = getattr(exact.get_submodule(path), projection)
            stack = experts.stack(projection)
            once = QuantizedStack.from_dense(weight, stack.is_transposed, stack.storage)
            assert torch.equal(stack.codes, once.codes)
            error = (once.decode(torch.float32) - weight).norm() / weight.norm()
            assert errors[path, projection] == pytest.approx(error.item(), rel=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("storage", [{}, {"double_quant": True}, {"quant_type": "fp4"}], ids=str)
def test_unmerging_restores_the_codes_bitwise(model_type, storage, device):
    model = adapted_model(model_type, device, target_modules=["experts"], **storage)
    ids = token_ids(device)
    before, live = packed_bytes(model), logits(model, ids)
    model.merge_adapter()
    after = packed_bytes(model)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(logits(model, ids), live)
    model.unmerge_adapter()
    assert_same_bytes(packed_bytes(model), before)
    assert torch.equal(logits(model, ids), live)
    assert all(stack.merge_error is None for stack in model.experts_report().stacks)


def test_unmerging_unquantized_experts_restores_them_bitwise():
    model = adapted_model(target_modules=["experts"], quant_type=None)
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith("_proj.weight")}
    model.merge_adapter()
    model.unmerge_adapter()
    assert before
    for name, parameter in model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name])


def test_successive_merges_round_once():
    """Merging two adapters in two steps gives the codes of merging both at once."""
    model = adapted_model(target_modules=["experts"])
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=["experts"]))
    randomize_adapter(model, seed=9, std=0.05)
    together = copy.deepcopy(model)
    together.merge_adapter(["default", "other"])
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    assert_same_bytes(packed_bytes(model), packed_bytes(together))


def test_unmerging_after_successive_merges():
    """Restores the stacks from before the first merge, not those from before the second."""
    model = adapted_model(target_modules=["experts"])
    before = packed_bytes(model)
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=["experts"]))
    randomize_adapter(model, seed=9, std=0.05)
    model.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        model.merge_adapter(["other"])
    model.unmerge_adapter()
    assert_same_bytes(packed_bytes(model), before)


def test_merging_keeps_unadapted_weights():
    """A layer without an adapter isn't merged, and a projection without one isn't rounded again."""
    model = adapted_model(target_modules=["experts"])
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=["experts.down_proj"], layers_to_transform=[1]))
    randomize_adapter(model, seed=9, std=0.05)
    experts = [layer.mlp.experts for layer in model.base_model.model.model.layers]
    before = [module.stack("gate_up_proj") for module in experts]
    model.merge_adapter(["other"])
    assert [module.down_proj.merged for module in experts] == [False, True]
    assert not any(module.gate_up_proj.merged for module in experts)
    assert all(module.stack("gate_up_proj") is stack for module, stack in zip(experts, before))
    assert experts[1].stack("down_proj").fidelity is not None
    with pytest.warns(UserWarning, match="Already unmerged"):
        experts[0].down_proj.unmerge()


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_merging_uses_the_active_adapters(dtype):
    """A loaded but inactive adapter is not merged."""
    model = adapted_model(target_modules=["experts"])
    expected = logits(copy.deepcopy(model).merge_and_unload(dtype=dtype), token_ids())
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=["experts"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".other"):
                parameter.normal_(std=0.05)
    assert torch.equal(logits(model.merge_and_unload(dtype=dtype), token_ids()), expected)


def test_each_projection_is_merged_with_its_own_scaling():
    """A pattern gives down_proj another scaling than gate_up_proj."""
    model = adapted_model(target_modules=["experts"], alpha_pattern={"down_proj": 40}, rank_pattern={"down_proj": 2})
    live = logits(model, token_ids())
    merged = logits(model.merge_and_unload(dtype=torch.float32), token_ids())
    torch.testing.assert_close(merged, live, rtol=0, atol=1e-5 * live.abs().max().item())


def test_mixed_batches_with_merged_adapters_are_rejected():
    """A merged adapter would apply to every sample, whichever adapter it requests."""
    model = adapted_model(target_modules=["experts"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="while adapters are merged"):
        logits(model, token_ids(), adapter_names=["default", "__base__"])


def test_merging_twice_changes_nothing():
    model = adapted_model(target_modules=["experts"])
    model.merge_adapter()
    merged = packed_bytes(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same_bytes(packed_bytes(model), merged)


def test_disabling_a_merged_adapter_gives_the_base():
    model = adapted_model(target_modules=["experts"])
    ids = token_ids()
    with model.disable_adapter():
        base = logits(model, ids)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_merge_adapter_before_unloading_is_lossless(dtype):
    model = adapted_model(target_modules=["experts"])
    expected = logits(copy.deepcopy(model).merge_and_unload(dtype=dtype), token_ids())
    model.merge_adapter()
    merged = model.merge_and_unload(dtype=dtype)
    assert torch.equal(logits(merged, token_ids()), expected)


def test_merging_only_a_named_adapter():
    model = adapted_model(target_modules=["experts"])
    expected = logits(model, token_ids())
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=["experts"]))
    model.set_adapter("other")
    merged = model.merge_and_unload(adapter_names=["default"], dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=0, atol=1e-4)


MERGES = [{"dtype": torch.float32}, {"rounding": "nearest"}, {}]


@pytest.mark.parametrize("options", MERGES, ids=str)
def test_modules_trained_in_full_of_the_named_adapter(options):
    """Independent of the active adapter; without an adapter, those of the base."""
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2, modules_to_save=["lm_head"])).eval()
    model.add_adapter("other", MoeQLoraConfig(r=2, modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head
    with torch.no_grad():
        head.modules_to_save["other"].weight += 1
    expected = head.modules_to_save["other"].weight.clone(), head.original_module.weight.clone()
    for names, weight in zip((["other"], []), expected):
        merged = copy.deepcopy(model).merge_and_unload(adapter_names=names, **options)
        assert torch.equal(merged.lm_head.weight, weight)
    model.merge_adapter(["other"])
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        model.merge_and_unload(adapter_names=["default"], **options)
    assert all(layer.merged_adapters == ["other"] for layer in model.base_model.expert_layers())


@pytest.mark.parametrize("options", MERGES, ids=str)
@pytest.mark.parametrize("names", [None, ["other"]], ids=str)
def test_tokens_trained_by_another_adapter_are_not_merged(names, options):
    config = MoeQLoraConfig(r=2, trainable_token_indices={"embed_tokens": [5, 6]})
    model = get_peft_model(tiny_model(), config).eval()
    model.add_adapter("other", MoeQLoraConfig(r=2))
    with torch.no_grad():
        model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"] += 1
    model.set_adapter("default" if names else "other")
    merged = model.merge_and_unload(adapter_names=names, **options)
    assert torch.equal(merged.model.embed_tokens.weight, tiny_model().model.embed_tokens.weight)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_adapter_named_twice_is_rejected(merge):
    model = adapted_model(target_modules=["experts"])
    with pytest.raises(ValueError, match="contains an adapter twice"):
        getattr(model, merge)(adapter_names=["default", "default"])
    assert not any(layer.merged for layer in model.base_model.expert_layers())


def test_loading_over_a_merged_adapter_is_rejected(tmp_path):
    """Linear layers are unmerged with the current factors, which must be those that were merged."""
    model = adapted_model()
    live = logits(model, token_ids())
    model.save_pretrained(tmp_path)
    randomize_adapter(model, seed=9)
    other = logits(model, token_ids())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged, .* unmerge_adapter"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, token_ids()), other, rtol=0, atol=1e-3)
    model.load_adapter(tmp_path, "default")
    torch.testing.assert_close(logits(model, token_ids()), live, rtol=0, atol=1e-3)


def test_merging_includes_experts_without_an_adapter():
    """`dtype` replaces every experts layer by its 16-bit module, adapted or not."""
    model = adapted_model(target_modules=["experts"], layers_to_transform=[1])
    expected = logits(model, token_ids())
    merged = model.merge_and_unload(dtype=torch.float32)
    assert not any(isinstance(module, QuantizedExperts) for module in merged.modules())
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=0, atol=1e-4)


def test_unloading_gives_a_working_quantized_model():
    model = adapted_model()
    with model.disable_adapter():
        expected = logits(model, token_ids())
    base = model.unload()
    assert sum(isinstance(module, QuantizedExperts) for module in base.modules()) == 2
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert torch.equal(logits(base, token_ids()), expected)
    again = get_peft_model(base, MoeQLoraConfig(r=4))
    assert torch.equal(logits(again, token_ids()), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload", "merge_and_unload into fp32"])
def test_safe_merge_rejects_a_broken_adapter_without_changes(value, merge):
    """The fault is in the last layer: the earlier ones must not be merged."""
    model = adapted_model()
    ids = token_ids()
    with model.disable_adapter():
        base = logits(model, ids)
    before = packed_bytes(model)
    with torch.no_grad():
        model.base_model.model.model.layers[1].mlp.experts.down_proj.lora_B["default"].weight[2, 3, 1] = value
    options = {"dtype": torch.float32} if merge.endswith("fp32") else {}
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        getattr(model, merge.split()[0])(safe_merge=True, **options)
    assert_same_bytes(packed_bytes(model), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_overflowing_delta_is_rejected_and_undone(safe_merge):
    """Each factor is finite, the product is not; this shows only when the last layer is merged."""
    model = adapted_model(target_modules=["experts"])
    before = packed_bytes(model)
    layer = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():
        layer.down_proj.lora_A["default"].weight[2] = 1e30
        layer.down_proj.lora_B["default"].weight[2] = 1e30
    with pytest.raises(ValueError, match="NaNs or infinite values detected in the weights of expert 2"):
        model.merge_adapter(safe_merge=safe_merge)
    assert_same_bytes(packed_bytes(model), before)
    assert not any(layer.merged for layer in model.base_model.expert_layers())


def test_failed_second_merge_keeps_the_first():
    """In all layers, including those that merged the second adapter before the error."""
    model = adapted_model(target_modules=["experts"])
    model.add_adapter("other", MoeQLoraConfig(target_modules=["experts"]))
    randomize_adapter(model)
    model.merge_adapter(["default"])
    before = packed_bytes(model)
    layer = model.base_model.model.model.layers[1].mlp.experts
    with torch.no_grad():
        layer.down_proj.lora_A["other"].weight[2] = 1e30
        layer.down_proj.lora_B["other"].weight[2] = 1e30
    with pytest.raises(ValueError, match="NaNs or infinite values detected in the weights of expert 2"):
        model.merge_adapter(["other"])
    assert_same_bytes(packed_bytes(model), before)
    assert all(layer.merged_adapters == ["default"] for layer in model.base_model.expert_layers())


def test_weights_out_of_range_of_the_target_dtype_are_rejected():
    model = adapted_model(target_modules=["experts"])
    layer = model.base_model.model.model.layers[0].mlp.experts
    with torch.no_grad():
        layer.down_proj.lora_B["default"].weight[2] = 1e7
    with pytest.raises(ValueError, match="expert 2"):
        model.merge_and_unload(dtype=torch.float16)


def test_merging_an_empty_list_of_adapters():
    model = adapted_model(target_modules=["experts"])
    with model.disable_adapter():
        base = logits(model, token_ids())
    merged = model.merge_and_unload(adapter_names=[], dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), base, rtol=0, atol=1e-4)


def test_casting_between_merge_and_unmerge_casts_all():
    model = adapted_model(target_modules=["experts"], quant_type=None)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    assert {stack.storage for stack in model.experts_report().stacks} == {"bfloat16"}


@pytest.mark.parametrize("take_off", ["unload", "merge_and_unload"])
def test_unquantized_experts_are_restored_as_the_original_class(take_off, tmp_path):
    model = adapted_model(quant_type=None)
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.get_base_model().save_pretrained(tmp_path)
    base = getattr(model, take_off)()
    assert not any(isinstance(module, QuantizedExperts) for module in base.modules())
    base.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(again, token_ids()), logits(base, token_ids()))


def test_saving_with_linear_layers_quantized_by_bitsandbytes(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.float32, quantization_config=quantization, device_map="cpu"
    ).eval()
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules="all-linear"))
    randomize_adapter(model)
    assert logits(model, token_ids()).isfinite().all()
    base = model.unload()
    base.save_pretrained(tmp_path / "packed")
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "packed", dtype=torch.float32, device_map="cpu"
    ).eval()
    assert torch.equal(logits(again, token_ids()), logits(base, token_ids()))
    expected = base.model.layers[1].mlp.experts.down_proj.decode(torch.float32)
    base.dequantize(torch.float32)
    assert torch.equal(base.model.layers[1].mlp.experts.down_proj, expected)
    assert type(base.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    base.save_pretrained(tmp_path / "again")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert torch.equal(logits(dense, token_ids()), logits(base, token_ids()))


def test_merged_experts_are_saved_packed(tmp_path):
    merged = adapted_model().merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, device_map="cpu").eval()
    assert_same_bytes(packed_bytes(again), packed_bytes(merged))
    assert torch.equal(logits(again, token_ids()), logits(merged, token_ids()))


def test_saving_converted_16_bit_experts_is_rejected(tmp_path):
    """from_pretrained would find none of their names."""
    model = adapted_model(quant_type=None)
    with pytest.raises(ValueError, match=r"merge_and_unload\(dtype=torch.bfloat16\)"):
        model.base_model.model.save_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=str)
def test_dequantizing_without_an_adapter(dtype, tmp_path):
    model = adapted_model().unload()
    expected = logits(model, token_ids())
    model.dequantize(dtype)
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    assert experts_report(model).stacks[0].storage == "float32"


@pytest.mark.parametrize("options", [{}, {"rounding": "nearest"}, {"dtype": torch.float32}], ids=str)
def test_merging_shows_a_progress_bar(options, capsys):
    """It can take minutes; PEFT shows a bar only on request."""
    model = adapted_model()
    capsys.readouterr()  # the bar of quantizing
    model.merge_and_unload(**options)
    assert "100%" in capsys.readouterr().err
    model = adapted_model()
    capsys.readouterr()
    model.merge_and_unload(progressbar=False, **options)
    assert capsys.readouterr().err == ""
