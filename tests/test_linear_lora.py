"""LoRA on linear layers as one function: values and gradients equal PEFT's, without its casts and copies."""

from __future__ import annotations

import copy

import bitsandbytes
import pytest
import torch
from linear_loras import (
    BF16,
    IN,
    KINDS,
    OUT,
    RANK,
    assert_close,
    bnb_layer,
    both,
    dense_layer,
    exact,
    fast,
    inputs,
    of_every_kind,
    results,
    stock_layer,
    watch_peft,
)
from peft.tuners import lora
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from peft_moe_qlora.linear_lora import LoraLinear, four_bit_matrix, with_fast_forward
from peft_moe_qlora.ops import HeldCasts
from peft_moe_qlora.ops import linear_lora as linear_lora_function
from peft_moe_qlora.ops.held_casts import cast_factor
from peft_moe_qlora.ops.operands import PackedWeight
from peft_moe_qlora.quantization import FourBitFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def calls(monkeypatch) -> list[type]:
    return watch_peft(monkeypatch)


class TestValuesAndGradients:
    @of_every_kind
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("shape", [(3, 5, IN), (IN,), (1, IN), (600, IN)])
    def test_fp32_equals_peft(self, kind, bias, shape, device, calls):
        layer, stock = both(kind, device=device, bias=bias)
        x = inputs(device=device, shape=shape)
        found = results(layer, x)
        assert not calls
        assert_close(found, results(stock, x), 2e-6)

    @of_every_kind
    def test_bf16_is_as_accurate_as_peft(self, kind, device, calls):
        """Over some draws, since the terms of a gradient of one draw may nearly cancel."""
        draws = [self.squared_errors(kind, device, seed) for seed in range(16)]
        stock = lora.Linear4bit if "4" in kind else lora.Linear
        assert calls == [stock, lora.Linear] * len(draws)
        for error, of_peft, norm in torch.tensor(draws).sum(dim=0):
            assert error.sqrt() < max(1.5 * of_peft.sqrt(), 2**-8 * norm.sqrt())

    def squared_errors(self, kind: str, device: str, seed: int) -> list[tuple[float, float, float]]:
        """Squared norms of both errors, and of the exact result, for the output and each gradient."""
        torch.manual_seed(seed)
        layer, stock = both(kind, BF16, device, bias=True)
        twin = stock_layer(exact(layer.base_layer))
        twin.load_state_dict({k: v for k, v in stock.state_dict().items() if "lora_" in k}, strict=False)
        x = inputs(BF16, device)
        found, of_peft = results(layer, x), results(stock, x)
        wanted = results(twin, x.detach().float().requires_grad_())
        assert len(found) == len(wanted) == 4
        assert [one.dtype for one in found] == [one.dtype for one in of_peft]
        errors = (
            ((one - right).norm(), (other - right).norm(), right.norm())
            for one, other, right in zip(found, of_peft, wanted)
        )
        return [tuple(one.item() ** 2 for one in three) for three in errors]

    @pytest.mark.parametrize("kind", ["dense", "stored"])
    def test_fp64(self, kind):
        layer, stock = both(kind, torch.float64)
        layer.double(), stock.double()
        x = inputs(torch.float64)
        assert_close(results(layer, x), results(stock, x), 1e-14)

    @pytest.mark.parametrize("sizes", [(7, 5), (33, 70), (64, 3)])
    @pytest.mark.parametrize("nested", [False, True])
    def test_sizes_that_are_not_multiples_of_a_block(self, sizes, nested):
        layer = fast(stock_layer(bnb_layer(sizes=sizes, nested=nested)))
        twin = stock_layer(exact(layer.base_layer))
        twin.load_state_dict({k: v for k, v in layer.state_dict().items() if "lora_" in k}, strict=False)
        x = inputs(shape=(3, 5, sizes[0]))
        assert_close(results(layer, x), results(twin, x), 2e-6)

    def test_no_rows(self):
        for kind in KINDS:
            layer, _ = both(kind)
            out, of_x, of_A, of_B = results(layer, inputs(shape=(2, 0, IN)))
            assert out.shape == (2, 0, OUT)
            assert of_x.shape == (2, 0, IN)
            assert not of_A.any()
            assert not of_B.any()

    @of_every_kind
    @pytest.mark.parametrize("grads", [False, True])
    def test_several_adapters(self, kind, grads, calls):
        layer, stock = both(kind, adapters=("default", "other", "third"))
        x = inputs()
        with torch.set_grad_enabled(grads):
            out = layer(x)
            assert not calls
            torch.testing.assert_close(out, stock(x), rtol=1e-5, atol=1e-5)
        assert_close(results(layer, x), results(stock, x), 2e-6)
        for one in (layer, stock):
            one.set_adapter(["third"])
        assert_close(results(layer, x), results(stock, x), 2e-6)

    @of_every_kind
    def test_dropout(self, kind, calls):
        """The same masks, if activations are in fp32 as in PEFT."""
        layer, stock = both(kind, dropout=0.4)
        found = results(layer.train(), inputs())
        assert not calls
        torch.manual_seed(0)
        x = inputs()
        assert_close(results(layer, x), results(stock.train(), x), 2e-6)
        assert_close(results(layer.eval(), x), results(stock.eval(), x), 2e-6)
        assert not torch.equal(found[0], layer(x))

    @of_every_kind
    def test_only_requested_gradients(self, kind):
        layer, stock = both(kind, bias=True)
        trained = {
            "x": lambda one: [],
            "A": lambda one: [one.lora_A.default.weight],
            "B": lambda one: [one.lora_B.default.weight],
            "bias": lambda one: [one.base_layer.bias],
        }
        for names in (["x"], ["A"], ["B"], ["bias"], ["x", "A"], ["B", "bias"], ["x", "A", "B", "bias"]):
            of_both = []
            for one in (layer, stock):
                one.requires_grad_(False)
                for name in names:
                    for parameter in trained[name](one):
                        parameter.requires_grad_()
                torch.manual_seed(3)
                of_both.append(results(one, inputs().detach().requires_grad_("x" in names)))
            assert len(of_both[0]) == len(names) + 1
            torch.testing.assert_close(*of_both, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("kind", ["dense", "stored"])
    def test_second_derivatives(self, kind):
        layer, _ = both(kind, torch.float64)
        layer.double()
        factors = (layer.lora_A.default.weight, layer.lora_B.default.weight)

        def product(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return layer(x)

        x = inputs(torch.float64, shape=(2, IN))
        assert torch.autograd.gradgradcheck(product, (x, *factors), fast_mode=True)

    @of_every_kind
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing(self, kind, use_reentrant):
        layer, _ = both(kind)
        x = inputs()
        expected = results(layer, x)
        out = checkpoint(layer, x, use_reentrant=use_reentrant)
        (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).sum().backward()
        found = [out.detach(), x.grad, *[one.grad for one in layer.parameters() if one.requires_grad]]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))

    @of_every_kind
    def test_output_can_be_modified_in_place(self, kind):
        """It is not a view, which autograd would reject."""
        layer, stock = both(kind)
        x = inputs()
        assert_close(results(layer, x, lambda x: layer(x).mul_(2)), results(stock, x, lambda x: stock(x) * 2), 2e-6)

    def test_uninitialized_memory_is_not_read(self, monkeypatch):
        layer, stock = both("dense")
        own = torch.Tensor.new_empty
        monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: own(*args, **kwargs).fill_(torch.nan))
        x = inputs()
        assert_close(results(layer, x), results(stock, x), 2e-6)


class TestDtypes:
    @of_every_kind
    @pytest.mark.parametrize("x_dtype", [torch.float32, BF16])
    def test_autocast(self, kind, x_dtype, device, calls):
        layer, stock = both(kind, BF16 if "4" in kind else torch.float32, device)
        x = inputs(x_dtype, device)
        of_both = []
        for one in (layer, stock):
            with torch.autocast(device, BF16):
                out = one(x)
            out.float().square().sum().backward()
            of_both.append([out.detach(), x.grad, *[p.grad for p in one.parameters() if p.requires_grad]])
            x.grad = None
        assert calls == [type(stock)]
        assert_close(*of_both, 2**-6)

    def test_backward_under_autocast(self):
        layer, stock = both("dense")
        x = inputs()
        of_both = []
        for one in (layer, stock):
            out = one(x)
            with torch.autocast("cpu", BF16):
                of_both.append(torch.autograd.grad(out.square().sum(), [x, one.lora_A.default.weight]))
        for found, other in zip(*of_both):
            torch.testing.assert_close(found, other, rtol=0, atol=2**-6 * other.abs().max().item())

    @pytest.mark.parametrize(
        ("compute_dtype", "x_dtype", "is_fast"),
        [
            (None, torch.float32, True),
            (None, BF16, True),
            (torch.float32, BF16, True),
            (torch.float32, torch.float32, True),
            (BF16, BF16, True),
            (BF16, torch.float32, False),  # PEFT multiplies fp32 activations with the factors
        ],
    )
    def test_compute_dtypes_of_bitsandbytes(self, compute_dtype, x_dtype, is_fast, calls):
        layer, stock = both("nf4", compute_dtype)
        x = inputs(x_dtype)
        found = results(layer, x)
        assert len(calls) == (not is_fast)
        expected = results(stock, x)
        assert_close(found, expected, 2e-6 if x_dtype == torch.float32 else 2**-6)
        assert layer.base_layer.compute_dtype == stock.base_layer.compute_dtype
        assert layer.base_layer.compute_type_is_set
        assert found[0].dtype == x_dtype

    @pytest.mark.parametrize("storage", [torch.uint8, BF16, torch.float32])
    def test_codes_stored_as_another_dtype(self, storage, calls):
        """As FSDP requires; it also replaces the parameters by plain ones."""
        layer, stock = both("nf4")
        weight = layer.base_layer.weight
        weight.data = weight.data.flatten().view(storage).view(-1, 1)
        layer.base_layer.quant_state = weight.quant_state
        if storage.is_floating_point:
            layer.base_layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        x = inputs()
        assert_close(results(layer, x), results(stock, x), 2e-6)
        assert calls == [type(stock)]

    @pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_weights_equal_bitsandbytes_bitwise(self, quant_type, nested, dtype, device):
        layer = bnb_layer(device=device, nested=nested, quant_type=quant_type, sizes=(512, 96))
        state = copy.deepcopy(layer.weight.quant_state)
        state.dtype = dtype
        expected = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)
        matrix = four_bit_matrix(layer)
        assert matrix.storage == FourBitFormat(quant_type, 64, nested)
        assert torch.equal(matrix.decode(dtype), expected)
        addresses = {tensor.data_ptr() for tensor in matrix.tensors}
        assert {layer.weight.data_ptr(), layer.weight.quant_state.absmax.data_ptr()} <= addresses

    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("sizes", [(512, 96), (70, 33)])
    def test_kernels_read_bitsandbytes_scales(self, nested, sizes):
        """fp32 scales, where this package keeps their bits."""
        decode = pytest.importorskip("peft_moe_qlora.ops.kernels.decode").decode
        matrix = four_bit_matrix(bnb_layer(device=DEVICE, nested=nested, sizes=sizes))
        tensors = tuple(tensor[None] for tensor in matrix.tensors)
        packed = PackedWeight(tensors, matrix.rows, matrix.columns, False, matrix.storage)
        assert torch.equal(decode(packed, 0, 1, torch.float32)[0], matrix.decode(torch.float32))

    def test_other_code_of_the_scales(self):
        base = bnb_layer(nested=True)
        base.weight.quant_state.state2.code = base.weight.quant_state.state2.code * 2
        stock = stock_layer(base)
        assert type(with_fast_forward(stock)) is lora.Linear4bit


class TestMemory:
    @of_every_kind
    def test_tensors_saved_for_backward(self, kind):
        layer, _ = both(kind, BF16)
        kept: list[torch.Tensor] = []
        x = inputs(BF16)
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            layer(x)
        activations = [one for one in kept if not isinstance(one, nn.Parameter)]
        parameters = [one for one in kept if isinstance(one, nn.Parameter)]
        assert [one.data_ptr() for one in activations if one.shape == x.shape] == [x.data_ptr()]
        assert sum(one.nbytes for one in activations) == 15 * (IN + RANK) * 2
        assert len(parameters) == 2
        assert {id(one) for one in parameters} == {id(layer.lora_A.default.weight), id(layer.lora_B.default.weight)}

    def test_frozen_factors_save_no_activations(self):
        layer, _ = both("nf4", BF16)
        layer.requires_grad_(False)
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
            layer(inputs(BF16))
        assert all(isinstance(one, nn.Parameter) for one in kept)

    def test_number_of_launches(self):
        """The operations of a forward and a backward with factors in another dtype, except for decoding."""

        class Counter(TorchDispatchMode):
            def __init__(self) -> None:
                super().__init__()
                self.names: list[str] = []

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                self.names.append(func.overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        layer, _ = both("dense", BF16)
        x = inputs(BF16)
        with Counter() as forward:
            out = layer(x)
        grad = torch.randn_like(out)
        with Counter() as backward:
            out.backward(grad)
        work = ("mm", "addmm_", "mul", "add", "clone", "_to_copy", "sum")
        assert [name for name in forward.names if name in work] == ["mm", "_to_copy", "addmm_", "_to_copy", "addmm_"]
        # on a CPU, four casts replace fp32 results of a GPU kernel
        products = [name for name in backward.names if name in work and name != "_to_copy"]
        assert products == ["mm", "addmm_", "addmm_", "mm", "mm"]
        assert backward.names.count("_to_copy") == 2 + 4


def test_function_equals_the_formula():
    """Without a layer."""
    A, B = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    base, x = dense_layer(bias=True), inputs()
    matrix = LoraLinear.base(fast(stock_layer(base)), x).matrix
    found = linear_lora_function(x, base.bias, A, B, 0.7, matrix, lambda: matrix, torch.float32)
    expected = x @ base.weight.T + base.bias + 0.7 * (x @ A.T) @ B.T
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    of_both = [torch.autograd.grad(out.square().sum(), (x, A, B)) for out in (found, expected)]
    torch.testing.assert_close(*of_both, rtol=1e-4, atol=1e-2)


def test_held_casts_follow_their_parameters():
    factor, held = nn.Parameter(torch.randn(RANK, IN)), HeldCasts()

    def cast() -> torch.Tensor:
        with torch.no_grad(), held.active():
            return cast_factor(factor, BF16)

    first = cast()
    assert cast() is first
    factor.data.mul_(2)
    held.refresh()
    assert cast() is first
    assert torch.equal(first, factor.data.to(BF16))
    factor.data = torch.randn(RANK + 1, IN)
    held.refresh()
    assert torch.equal(cast(), factor.data.to(BF16))
