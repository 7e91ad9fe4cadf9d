"""LoRA on linear layers stored in a format, merging it, and restoring plain layers."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from quantized_linears import (
    ATTENTION,
    FORMATS,
    FP8,
    adapted,
    all_bytes,
    base_model,
    loras,
    of_every_format,
    quantized,
    store_attention,
    stored_layers,
)
from tiny_models import assert_same_bytes, logits, randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import (
    ExpertsLora,
    MoeQLoraConfig,
    QuantizedExperts,
    experts_report,
    prepare_model_for_training,
    quantize_experts,
)
from peft_moe_qlora.base_identity import BaseIdentity
from peft_moe_qlora.loading import restore_experts, restore_linear
from peft_moe_qlora.loading.linear import asked_for_dtype, keep_linear_as_stored
from peft_moe_qlora.quantization import parse_format
from peft_moe_qlora.quantized_linear import QuantizedLinear
from peft_moe_qlora.quantized_linear_lora import QuantizedLinearLora


class TestLora:
    @of_every_format
    def test_training_step_equals_the_decoded_model(self, storage, device):
        ids = token_ids(device)
        stored = adapted(prepare_model_for_training(base_model(storage, device=device)))
        twin = base_model(storage, device=device)
        restore_linear(twin, torch.float32)
        assert not stored_layers(twin)
        twin = adapted(prepare_model_for_training(twin))
        before = all_bytes(stored)
        losses, gradients = [], []
        for model in (stored, twin):
            model.train()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            losses.append(loss.detach())
            gradients.append({name: one.grad for name, one in model.named_parameters() if one.requires_grad})
        assert len(list(loras(stored))) == 8
        torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
        assert gradients[0].keys() == gradients[1].keys()
        for name, gradient in gradients[0].items():
            assert gradient.any(), name
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-5, atol=1e-6)
        optimizer = torch.optim.AdamW([one for one in stored.parameters() if one.requires_grad], lr=0.01)
        optimizer.step()
        assert_same_bytes(all_bytes(stored), before)

    @pytest.mark.parametrize("autocast", [True, False])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_factors_equal_those_on_a_plain_layer(self, dtype, autocast):
        states = []
        for is_stored in (True, False):
            model = base_model(dtype=dtype)
            if not is_stored:
                restore_linear(model, None)
            torch.manual_seed(1)
            config = MoeQLoraConfig(r=4, target_modules=list(ATTENTION))
            model = get_peft_model(model, config, autocast_adapter_dtype=autocast)
            states.append({name: one for name, one in model.state_dict().items() if ".lora_" in name})
        assert len(states[0]) == 16
        assert states[0].keys() == states[1].keys()
        for name, factor in states[0].items():
            assert factor.dtype == states[1][name].dtype == (torch.float32 if autocast else dtype)
            assert torch.equal(factor, states[1][name])

    def test_no_weight_is_decoded_before_the_first_forward(self, monkeypatch, tmp_path):
        """PEFT reads weights to find their device; decoding a large one takes time."""
        model, other = quantized(base_model()), quantized(base_model())
        monkeypatch.setattr(QuantizedLinear, "decode", None)
        adapted(model).save_pretrained(tmp_path)
        for low_cpu_mem_usage in (False, True):
            again = PeftModel.from_pretrained(copy.deepcopy(other), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
            assert len(list(loras(again))) == 8
        again.unload()

    @pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}])
    def test_options_match_peft(self, options):
        """Including the same dropout masks."""
        outputs = []
        for is_stored in (True, False):
            model = base_model()
            if not is_stored:
                restore_linear(model, None)
            model = adapted(model, target_modules=list(ATTENTION), **options).train()
            torch.manual_seed(5)
            outputs.append(model(input_ids=token_ids()).logits)
        torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)

    def test_unsupported_options_are_rejected(self):
        with pytest.raises(ValueError, match="use_dora"):
            adapted(base_model(), use_dora=True)
        with pytest.raises(ValueError, match=r"q_proj, a linear layer stored as fp8/16x32"):
            adapted(base_model(), modules_to_save=["q_proj"])
        with pytest.raises(ValueError, match=r"k_proj|v_proj|q_proj|o_proj"):
            adapted(base_model(), modules_to_save=["self_attn"])

    def test_several_adapters_and_mixed_batches(self):
        model = adapted(base_model())
        model.add_adapter("other", MoeQLoraConfig(r=2, target_modules="all-linear"))
        randomize_adapter(model, seed=4)
        assert all(set(layer.lora_A) == {"default", "other"} for layer in loras(model))
        ids = token_ids(batch=3)
        names = ["other", "__base__", "default"]
        mixed = logits(model, ids, adapter_names=names)
        for name, one, found in zip(names, ids, mixed):
            model.set_adapter("default" if name == "__base__" else name)
            if name == "__base__":
                with model.disable_adapter():
                    expected = logits(model, one[None])[0]
            else:
                expected = logits(model, one[None])[0]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    def test_disabling_gives_the_base(self):
        expected = logits(quantized(base_model()), token_ids())
        model = adapted(base_model())
        with model.disable_adapter():
            assert torch.equal(logits(model, token_ids()), expected)
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(logits(model, token_ids()), expected)

    def test_saving_and_loading(self, tmp_path):
        model = adapted(base_model())
        expected = logits(model, token_ids())
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
        assert torch.equal(logits(again, token_ids()), expected)
        by_meta = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True).eval()
        assert torch.equal(logits(by_meta, token_ids()), expected)

    def test_adapter_file_equals_that_of_a_plain_model(self, tmp_path):
        plain = base_model()
        restore_linear(plain, None)
        adapted(plain).save_pretrained(tmp_path)
        stored = PeftModel.from_pretrained(base_model(), tmp_path).eval()
        twin = base_model()
        restore_linear(twin, None)
        torch.testing.assert_close(
            logits(stored, token_ids()), logits(PeftModel.from_pretrained(twin, tmp_path).eval(), token_ids())
        )

    def test_model_that_runs_in_bf16(self):
        stored, twin = base_model(dtype=torch.bfloat16), base_model(dtype=torch.bfloat16)
        restore_linear(twin, None)
        found = logits(adapted(stored), token_ids())
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, logits(adapted(twin), token_ids()))

    def test_config_records_the_storage_of_layers(self):
        model = adapted(base_model())
        identity = BaseIdentity.of(model.peft_config["default"].base)
        assert identity.linear == {str(FP8): [f"model.layers.*.self_attn.{name}" for name in sorted(ATTENTION)]}
        assert identity.linear_storage("model.layers.1.self_attn.k_proj") == FP8
        assert identity.linear_storage("lm_head") is None

    def test_biases_are_trained(self):
        model = adapted(base_model(), bias="lora_only").train()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        assert all(layer.base_layer.bias.grad.any() for layer in loras(model) if layer.out_features == 64)

    def test_weighted_adapters(self):
        model = adapted(base_model())
        model.add_adapter("other", MoeQLoraConfig(r=4, target_modules="all-linear"))
        randomize_adapter(model, seed=4)
        model.add_weighted_adapter(["default", "other"], [0.5, 0.25], "both", combination_type="cat")
        for layer in loras(model):
            expected = 0.5 * layer.get_delta_weight("default") + 0.25 * layer.get_delta_weight("other")
            torch.testing.assert_close(layer.get_delta_weight("both"), expected)

    def test_other_modules_treat_them_as_plain_layers(self):
        model = base_model()
        keep_linear_as_stored(model)
        assert asked_for_dtype(model) == []
        quantize_experts(model, progressbar=False)
        assert len(experts_report(model).stacks) == 4
        assert len(stored_layers(model)) == 8

    def test_stock_lora_cannot_lose_a_merge(self):
        model = get_peft_model(base_model(), LoraConfig(r=4, target_modules=list(ATTENTION))).eval()
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert type(layer) is Linear
        randomize_adapter(model)
        for safe_merge in (False, True):
            with pytest.raises(ValueError, match="decoded at each access"):
                model.merge_adapter(safe_merge=safe_merge)


class TestMerging:
    @of_every_format
    def test_into_fp32_equals_the_unmerged_adapter(self, storage):
        model = adapted(base_model(storage))
        live = logits(model, token_ids())
        with model.disable_adapter():
            assert (logits(model, token_ids()) - live).abs().max() > 1e-2
        merged = model.merge_and_unload(dtype=torch.float32, progressbar=False)
        torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-5 * live.abs().max().item())
        kinds = (BaseTunerLayer, QuantizedExperts, QuantizedLinear)
        assert not any(isinstance(module, kinds) for module in merged.modules())

    def test_merged_model_is_a_plain_checkpoint(self, tmp_path):
        merged = adapted(base_model()).merge_and_unload(dtype=torch.float32, progressbar=False)
        expected = logits(merged, token_ids())
        merged.save_pretrained(tmp_path)
        again = type(merged).from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.equal(logits(again, token_ids()), expected)

    def test_into_bf16_rounds_once(self):
        model = adapted(base_model(dtype=torch.bfloat16))
        layer = model.base_model.model.model.layers[1].self_attn.o_proj
        exact = layer.base_layer.decode(torch.float32) + layer.get_delta_weight("default")
        merged = model.merge_and_unload(dtype=torch.bfloat16, progressbar=False)
        assert torch.equal(merged.model.layers[1].self_attn.o_proj.weight, exact.bfloat16())
        assert merged.model.layers[1].self_attn.o_proj.bias.dtype == torch.bfloat16

    def test_unadapted_layers_are_decoded_too(self):
        model = adapted(base_model(), target_modules=["experts"])
        live = logits(model, token_ids())
        merged = model.merge_and_unload(dtype=torch.float32, progressbar=False)
        assert not stored_layers(merged)
        torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-5 * live.abs().max().item())

    @pytest.mark.parametrize("rounding", ["nearest", "second-order"])
    def test_layers_stay_in_their_format_without_a_dtype(self, rounding):
        model = adapted(base_model())
        expected = {}
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, QuantizedLinearLora):
                merged = layer.base_layer.merged(layer.get_delta_weight("default"))
                expected |= {f"{name}.{key}": tensor for key, tensor in merged.tensors.items()}
        live = logits(model, token_ids())
        merged = model.merge_and_unload(rounding=rounding, progressbar=False)
        layers = stored_layers(merged)
        found = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.tensors.items()}
        assert_same_bytes(found, expected)
        assert not any(isinstance(module, BaseTunerLayer) for module in merged.modules())
        assert (logits(merged, token_ids()) - live).abs().mean() < 0.5 * live.abs().mean()

    @of_every_format
    def test_unmerging_is_exact(self, storage):
        model = adapted(base_model(storage))
        before, live = all_bytes(model), logits(model, token_ids())
        layers = [layer.base_layer for layer in loras(model)]
        model.merge_adapter()
        assert all(layer.merged and layer.base_layer is not base for layer, base in zip(loras(model), layers))
        merged = all_bytes(model)
        assert any(not torch.equal(before[name], merged[name]) for name in before if "q_proj" in name)
        model.unmerge_adapter()
        assert_same_bytes(all_bytes(model), before)
        assert torch.equal(logits(model, token_ids()), live)

    def test_merging_successively_equals_merging_both(self):
        model = adapted(base_model())
        model.add_adapter("other", MoeQLoraConfig(r=2, target_modules="all-linear"))
        randomize_adapter(model, seed=4)
        together = copy.deepcopy(model)
        together.merge_adapter(["default", "other"])
        before = all_bytes(model)
        model.merge_adapter(["default"], safe_merge=True)
        model.merge_adapter(["other"])
        assert_same_bytes(all_bytes(model), all_bytes(together))
        assert all(layer.merged_adapters == ["default", "other"] for layer in loras(model))
        with pytest.warns(UserWarning, match="already merged"):
            model.merge_adapter(["other"])
        model.unmerge_adapter()
        assert_same_bytes(all_bytes(model), before)
        with pytest.warns(UserWarning, match="Already unmerged"):
            next(loras(model)).unmerge()

    def test_casting_while_merged(self):
        model = adapted(base_model(), target_modules=list(ATTENTION))
        before = {name: tensor for name, tensor in all_bytes(model).items() if "codes" in name}
        model.merge_adapter()
        model.to(torch.bfloat16)
        model.unmerge_adapter()
        after = all_bytes(model)
        assert_same_bytes({name: after[name] for name in before}, before)
        assert {layer.base_layer.dtype for layer in loras(model)} == {torch.bfloat16}
        assert {layer.base_layer.bias.dtype for layer in loras(model)} == {torch.bfloat16}

    def test_failed_merge_is_undone(self):
        model = adapted(base_model())
        before = all_bytes(model)
        last = list(loras(model))[-1]
        with torch.no_grad():  # each finite
            last.lora_A["default"].weight.fill_(1e30)
            last.lora_B["default"].weight.fill_(1e30)
        with pytest.raises(ValueError, match="NaNs or infinite values detected"):
            model.merge_adapter()
        assert not any(layer.merged for layer in loras(model))
        assert not any(module.merged for module in model.modules() if isinstance(module, ExpertsLora))
        assert_same_bytes(all_bytes(model), before)

    def test_unloading_restores_the_base(self):
        base = quantized(base_model())
        expected, before = logits(base, token_ids()), all_bytes(base)
        model = adapted(base).unload()
        assert_same_bytes(all_bytes(model), before)
        assert torch.equal(logits(model, token_ids()), expected)

    def test_one_of_two_layers_with_shared_tensors(self):
        model = base_model()
        first, second = (layer.self_attn.q_proj for layer in model.model.layers)
        for name in first.tensors:
            second.register_parameter(name, first._parameters[name])
        model = adapted(model, target_modules=["model.layers.0.self_attn.q_proj"])
        before = second.codes.clone()
        live = logits(model, token_ids())
        merged = model.merge_and_unload(dtype=torch.float32, progressbar=False)
        torch.testing.assert_close(logits(merged, token_ids()), live, rtol=0, atol=1e-5 * live.abs().max().item())
        assert torch.equal(second.codes, before)

    def test_accelerate_hooks_stay_with_the_layer(self):
        from accelerate.hooks import ModelHook, add_hook_to_module

        class Doubled(ModelHook):
            def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
                return 2 * output

        model = base_model()
        layer = model.model.layers[0].self_attn.q_proj
        add_hook_to_module(layer, Doubled())
        model = adapted(model, target_modules=["q_proj"])
        adapter = next(loras(model))
        x = torch.randn(3, 64)
        with torch.no_grad():
            doubled = 2 * adapter.base_layer.restore()(x)
            torch.testing.assert_close(adapter.base_layer(x), doubled)
            model.merge_adapter()
            expected = 2 * adapter.base_layer.restore()(x)
            torch.testing.assert_close(adapter.base_layer(x), expected)
            model.unmerge_adapter()
            torch.testing.assert_close(adapter.base_layer(x), doubled)


class TestRestoring:
    def test_dequantizing(self):
        model = quantized(base_model(dtype=torch.bfloat16))
        layer = copy.deepcopy(model.model.layers[1].self_attn.q_proj)
        expected = logits(model, token_ids())
        model.dequantize()
        restored = model.model.layers[1].self_attn.q_proj
        assert type(restored) is nn.Linear
        assert torch.equal(restored.weight, layer.decode(torch.bfloat16))
        assert torch.equal(restored.bias, layer.bias)
        assert not stored_layers(model)
        torch.testing.assert_close(logits(model, token_ids()), expected, rtol=0.1, atol=0.1)

    def test_dequantizing_to_fp32(self):
        model = quantized(base_model())
        expected = logits(model, token_ids())
        model.dequantize(dtype=torch.float32)
        assert not stored_layers(model)
        torch.testing.assert_close(
            logits(model, token_ids()), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
        )

    def test_layer_registered_twice_stays_shared(self):
        model = base_model()
        model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
        restore_linear(model, None)
        assert model.model.layers[1].self_attn.q_proj is model.model.layers[0].self_attn.q_proj
        assert not stored_layers(model)

    def test_restoring_only_experts(self):
        model = quantized(base_model())
        restore_experts(model, None)
        assert len(stored_layers(model)) == 8

    @of_every_format
    def test_names_in_the_state_dict(self, storage):
        model = base_model(storage)
        keys = model.state_dict()
        path = "model.layers.0.self_attn.q_proj"
        assert {key.removeprefix(f"{path}.") for key in keys if key.startswith(path)} == {
            "bias",
            *storage.tensors(64, 64),
        }
        other = store_attention(tiny_model(attention_bias=True), storage)
        for layer in stored_layers(other).values():
            layer.set_weight(torch.zeros(layer.out_features, layer.in_features))
        other.load_state_dict(keys)
        assert_same_bytes(all_bytes(other), all_bytes(model))
        assert torch.equal(logits(other, token_ids()), logits(model, token_ids()))

    def test_formats_are_parsed_by_name(self):
        assert all(parse_format(str(storage)) == storage for storage in FORMATS)
