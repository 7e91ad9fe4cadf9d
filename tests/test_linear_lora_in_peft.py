"""When LoRA on linear layers falls back to PEFT's forward, in models, and under torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from linear_loras import (
    BF16,
    IN,
    OUT,
    assert_close,
    bnb_layer,
    both,
    inputs,
    of_every_kind,
    results,
    watch_peft,
)
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from quantized_linears import FP8, store_attention
from tiny_models import logits, randomize_adapter, tiny_model, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.linear_lora import LoraLinear, LoraLinear4bit


@pytest.fixture
def calls(monkeypatch) -> list[type]:
    return watch_peft(monkeypatch)


class TestFallbackToPeft:
    @of_every_kind
    def test_disabled_and_merged(self, kind, calls):
        layer, stock = both(kind)
        x = inputs()
        for one in (layer, stock):
            one.enable_adapters(False)
        assert torch.equal(layer(x), stock(x))
        assert len(calls) == 2
        for one in (layer, stock):
            one.enable_adapters(True)
        if kind == "stored":
            return  # PEFT can't merge into it
        for one in (layer, stock):
            one.merge()
        assert torch.equal(layer(x), stock(x))
        for one in (layer, stock):
            one.unmerge()
        torch.testing.assert_close(layer(x), stock(x), rtol=1e-5, atol=1e-5)

    @of_every_kind
    def test_mixed_batches(self, kind, calls):
        layer, stock = both(kind, adapters=("default", "other"))
        x = inputs().detach()
        names = ["other", "__base__", "default"]
        layer.eval(), stock.eval()
        found = layer(x, adapter_names=names)
        assert calls == [type(layer)]
        torch.testing.assert_close(found, stock(x, adapter_names=names))

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}])
    @pytest.mark.parametrize("kind", ["dense", "nf4"])
    def test_variants_use_peft(self, kind, options, calls):
        layer, stock = both(kind, bias=True, **options)
        x = inputs()
        assert torch.equal(layer(x), stock(x))
        assert calls == [type(layer), type(stock)]

    @of_every_kind
    @pytest.mark.parametrize("place", ["base_layer", "lora_A.default", "lora_B.default"])
    def test_hooks_are_called(self, kind, place, calls):
        """Sharding, offloading and calibration rely on them."""
        layer, _ = both(kind)
        seen = []
        layer.get_submodule(place).register_forward_hook(lambda *_: seen.append(place))
        layer(inputs())
        assert seen == [place]
        assert calls == [type(layer)]

    def test_replaced_forward_is_called(self, calls):
        """As accelerate replaces it."""
        layer, _ = both("nf4")
        layer.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], OUT)
        layer(inputs())
        assert calls == [LoraLinear4bit]

    def test_trainable_base_weights(self, calls):
        layer, stock = both("dense")
        for one in (layer, stock):
            one.base_layer.weight.requires_grad_()
        x = inputs()
        assert_close(results(layer, x), results(stock, x), 2e-6)
        assert calls == [type(layer), type(stock)]

    @pytest.mark.parametrize("is_compiled", [False, True])
    def test_tensor_scalings(self, is_compiled, calls):
        """As set by `prepare_model_for_compiled_hotswap`."""
        torch._dynamo.reset()
        layer, stock = both("nf4")
        for one in (layer, stock):
            one.scaling["default"] = torch.tensor(0.3)
        x = inputs()
        forward = torch.compile(layer, fullgraph=True, backend="aot_eager") if is_compiled else layer
        found = results(layer, x, forward)
        assert not calls
        assert_close(found, results(stock, x), 2e-6)
        assert found[3].shape == layer.lora_B.default.weight.shape


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@of_every_kind
@pytest.mark.parametrize("adapters", [("default",), ("default", "other")])
def test_compiled(kind, dtype, adapters):
    torch._dynamo.reset()
    layer, _ = both(kind, dtype, bias=True, adapters=adapters)
    layer.base_layer.bias.requires_grad_()
    x = inputs(dtype)
    expected = results(layer, x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(results(layer, x, compiled), expected, 2e-6 if dtype == torch.float32 else 2**-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected[0], rtol=2**-6, atol=2**-6)


@of_every_kind
def test_compiled_with_dropout_and_other_lengths(kind):
    torch._dynamo.reset()
    layer, _ = both(kind, dropout=0.5)
    compiled = torch.compile(layer.train(), fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (5, 6, 7):
        out, *grads = results(layer, inputs(shape=(2, length, IN)), compiled)
        assert out.shape == (2, length, OUT)
        assert all(grad.any() for grad in grads)
    layer.eval()
    x = inputs(shape=(2, 9, IN))
    assert_close(results(layer, x, compiled), results(layer, x), 2e-6)


@of_every_kind
def test_operators(kind):
    """torch.library's checks of the custom operators."""
    layer, _ = both(kind)
    base = layer.base(inputs())
    tensors = (list(base.matrix.tensors), base.matrix.storage_name, [OUT, IN])
    factors = (layer.lora_A.default.weight, layer.lora_B.default.weight, 0.5)
    bias = torch.randn(OUT, requires_grad=True)
    for arguments in ((inputs(), None, None), (inputs(), inputs(), bias)):
        torch.library.opcheck(torch.ops.peft_moe_qlora.linear_lora.default, (*arguments, *factors, *tensors))


class TestInModels:
    def quantized(self, nested: bool = False) -> nn.Module:
        """Attention in 4 bits as transformers loads it."""
        model = tiny_model()
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                own = getattr(layer.self_attn, name)
                stored = bnb_layer(sizes=(own.in_features, own.out_features), nested=nested)
                stored.weight = bitsandbytes.nn.Params4bit(
                    own.weight.detach(), compress_statistics=nested, quant_type="nf4", module=stored
                ).to("cpu")
                setattr(layer.self_attn, name, stored)
        model.is_loaded_in_4bit = True
        return model

    def adapted(self, model: nn.Module, config: LoraConfig) -> nn.Module:
        model = get_peft_model(model, config)
        randomize_adapter(model)
        return model.eval()

    def of_both(self, make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        ours = self.adapted(make(), MoeQLoraConfig(r=4, quant_type=None, target_modules=targets))
        return ours, self.adapted(make(), LoraConfig(r=4, target_modules=targets))

    @pytest.mark.parametrize("nested", [False, True])
    def test_on_bitsandbytes(self, nested, calls):
        ours, stock = self.of_both(lambda: self.quantized(nested))
        kinds = [type(one) for one in ours.modules() if isinstance(one, lora.LoraLayer)]
        assert kinds == [LoraLinear4bit] * 8
        assert set(ours.state_dict()) >= {key for key in stock.state_dict() if "lora_" in key}
        assert {k for k in ours.state_dict() if "lora_" in k} == {k for k in stock.state_dict() if "lora_" in k}
        ids = token_ids()
        found = logits(ours, ids)
        assert not calls
        torch.testing.assert_close(found, logits(stock, ids), rtol=1e-4, atol=1e-4)
        assert "moe_qlora.LoraLinear4bit" in repr(ours)

    def test_on_plain_layers(self, calls):
        ours, stock = self.of_both(tiny_model)
        assert [type(one) for one in ours.modules() if isinstance(one, lora.LoraLayer)] == [LoraLinear] * 8
        found = logits(ours, token_ids())
        assert not calls
        torch.testing.assert_close(found, logits(stock, token_ids()), rtol=1e-4, atol=1e-4)

    def test_merging_equals_peft(self):
        ours, stock = self.of_both(self.quantized)
        ours = ours.merge_and_unload(rounding="nearest", progressbar=False)
        stock = stock.merge_and_unload()
        packed = [
            {k: one.weight for k, one in model.named_modules() if type(one) is bitsandbytes.nn.Linear4bit}
            for model in (ours, stock)
        ]
        assert packed[0].keys() == packed[1].keys()
        assert len(packed[0]) == 8
        for name, weight in packed[0].items():
            assert torch.equal(weight.data, packed[1][name].data)
            assert torch.equal(weight.quant_state.absmax, packed[1][name].quant_state.absmax)

    def test_fast_path_after_merge_and_unmerge(self, calls):
        ours, _ = self.of_both(self.quantized)
        before = logits(ours, token_ids())
        ours.merge_adapter()
        ours.unmerge_adapter()
        calls.clear()
        after = logits(ours, token_ids())
        assert not calls
        assert (after - before).abs().mean() < before.abs().mean()  # rounded to 4 bits twice

    def test_custom_module_is_kept(self):
        class Own(lora.Linear):
            pass

        config = MoeQLoraConfig(r=4, quant_type=None, target_modules=["q_proj"])
        config._register_custom_module({nn.Linear: Own})
        model = get_peft_model(tiny_model(), config)
        assert [type(one) for one in model.modules() if isinstance(one, lora.LoraLayer)] == [Own] * 2


def test_attention_in_a_format_uses_it(calls):
    model = get_peft_model(store_attention(tiny_model(), FP8), MoeQLoraConfig(r=4, target_modules=["q_proj"]))
    logits(model, token_ids())
    assert not calls
