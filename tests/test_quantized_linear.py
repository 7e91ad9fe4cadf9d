"""A linear layer stored in a format: its results, and merging a delta into it."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from quantized_linears import FORMATS, FP8, of_every_format
from tiny_models import assert_same_bytes
from torch import nn
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

from peft_moe_qlora.quantization import Format
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format
from peft_moe_qlora.quantized_linear import QuantizedLinear

OUT, IN = 72, 160

needs_compiler = pytest.mark.skipif(
    shutil.which(inductor.cpp.cxx[-1]) is None, reason=f"torch.compile needs {inductor.cpp.cxx[-1]} on a CPU"
)


def stored_layer(
    storage: Format = FP8, device: str = "cpu", dtype=torch.float32, bias: bool = True
) -> QuantizedLinear:
    return QuantizedLinear.from_linear(nn.Linear(IN, OUT, bias=bias, device=device, dtype=dtype), storage)


def results(layer: Callable, x: torch.Tensor, bias: nn.Parameter | None) -> list[torch.Tensor]:
    output = layer(x)
    inputs = [tensor for tensor in (x, bias) if tensor is not None and tensor.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


def inputs(device: str = "cpu", dtype=torch.float32, shape=(3, 5, IN)) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype, requires_grad=True)


class TestTheLayer:
    @of_every_format
    @pytest.mark.parametrize("bias", [False, True])
    def test_values_and_gradients_equal_the_decoded_weight(self, storage, bias, device):
        layer = stored_layer(storage, device, bias=bias)
        twin = layer.restore()
        assert type(twin) is nn.Linear
        assert torch.equal(twin.weight, layer.decode(torch.float32))
        x = inputs(device)
        found, expected = results(layer, x, layer.bias), results(twin, x, twin.bias)
        assert len(found) == 2 + bias
        torch.testing.assert_close(found, expected, rtol=0, atol=0 if device == "cpu" else 1e-6)

    @pytest.mark.parametrize("shape", [(IN,), (0, IN), (1, IN), (2, 3, 4, IN)])
    def test_any_number_of_dimensions(self, shape):
        layer, x = stored_layer(), inputs(shape=shape)
        twin = layer.restore()
        torch.testing.assert_close(results(layer, x, layer.bias), results(twin, x, twin.bias))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
    def test_weight_is_decoded_to_the_dtype_of_the_activations(self, dtype):
        layer = stored_layer(dtype=torch.bfloat16)
        x = inputs(dtype=dtype)
        twin = layer.restore(dtype)
        assert layer(x).dtype == dtype
        assert torch.equal(layer(x), twin(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
    def test_autocast(self, dtype):
        layer, x = stored_layer(), inputs(dtype=dtype)
        twin = layer.restore(torch.float64 if dtype == torch.float64 else None)  # autocast leaves fp64 alone
        with torch.autocast("cpu", torch.bfloat16):
            found, expected = layer(x), twin(x)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        gradients = [torch.autograd.grad(out.sum(), x)[0] for out in (found, expected)]
        assert gradients[0].dtype == gradients[1].dtype == dtype
        assert torch.equal(*gradients)
        (of_bias,) = torch.autograd.grad(layer(x).sum(), layer.bias)
        assert of_bias.dtype == torch.float32

    def test_no_dense_weight_is_saved_for_backward(self):
        layer, kept = stored_layer(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
            out = layer(inputs())
        assert out.requires_grad
        assert kept == []

    def test_bias_gradient_without_input_gradient(self):
        layer = stored_layer()
        x = inputs().detach()
        layer(x).sum().backward()
        torch.testing.assert_close(layer.bias.grad, torch.full((OUT,), 15.0))
        layer.bias.requires_grad_(False)
        assert not layer(x).requires_grad

    def test_second_derivatives(self):
        layer, x = stored_layer(), inputs(dtype=torch.float64, shape=(2, IN))
        layer = layer.double()
        assert torch.autograd.gradgradcheck(layer, (x,), fast_mode=True)

    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_checkpointing(self, use_reentrant):
        layer, x = stored_layer(), inputs()

        def steps(x: torch.Tensor) -> torch.Tensor:
            return layer(x).sin()

        _, expected, of_bias = results(steps, x, layer.bias)
        checkpoint(steps, x, use_reentrant=use_reentrant).square().sum().backward()
        assert torch.equal(x.grad, expected)
        assert torch.equal(layer.bias.grad, of_bias)

    @needs_compiler
    @pytest.mark.parametrize("storage", [FORMATS[1], Mxfp4Format(), FORMATS[-1]], ids=str)
    def test_compiled(self, storage):
        """In one graph, and only the stored form of the weight is saved for the backward."""
        torch._dynamo.reset()
        layer, x = stored_layer(storage), inputs()

        def step(x: torch.Tensor) -> torch.Tensor:
            return layer(x.to(layer.weight.dtype)).sin()

        compiled = torch.compile(step, fullgraph=True)
        found, expected = results(compiled, x, layer.bias), results(step, x, layer.bias)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        output = compiled(x)
        floating = [tensor for tensor in output.grad_fn.saved_tensors if tensor.is_floating_point()]
        assert floating
        assert all(tensor.shape[-1:] != (IN,) for tensor in floating)
        # a weight that the model itself computes with
        product = torch.compile(lambda x: x @ layer.weight.T, fullgraph=True)
        torch.testing.assert_close(product(x), x @ layer.weight.T)

    def test_operators(self):
        """torch.library's checks of the custom operators."""
        layer, x = stored_layer(), inputs()
        tensors, shape = list(layer.tensors.values()), [OUT, IN]
        for bias, back, rows in ((layer.bias, False, x), (None, True, inputs(shape=(4, OUT)))):
            torch.library.opcheck(
                torch.ops.peft_moe_qlora.stored_linear.default, (rows, bias, tensors, str(FP8), shape, back)
            )
        torch.library.opcheck(
            torch.ops.peft_moe_qlora.decode_matrix.default, (tensors, str(FP8), shape, torch.bfloat16)
        )

    def test_casts_change_the_decoded_dtype(self):
        layer = stored_layer()
        before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
        for cast, dtype in ((nn.Module.bfloat16, torch.bfloat16), (nn.Module.double, torch.float64)):
            cast(layer)
            assert layer.dtype == layer.weight.dtype == layer.bias.dtype == dtype
        layer.type(torch.float16)  # which would cast integers too
        assert layer.dtype == layer.bias.dtype == torch.float16
        assert_same_bytes(dict(layer.tensors), before)
        assert repr(layer) == "QuantizedLinear(in_features=160, out_features=72, bias=True, fp8/16x32, torch.float16)"

    @of_every_format
    def test_state_dict(self, storage):
        layer, other = stored_layer(storage), stored_layer(storage)
        state = layer.state_dict()
        assert state.keys() == {"bias", *storage.tensors(OUT, IN)}
        assert not any(tensor.is_floating_point() for name, tensor in state.items() if name != "bias")
        assert not torch.equal(other.codes, layer.codes)
        other.load_state_dict(state)
        assert_same_bytes(dict(other.state_dict()), dict(state))
        assert all(not tensor.requires_grad for name, tensor in layer.named_parameters() if name != "bias")

    def test_on_the_meta_device(self):
        layer = QuantizedLinear(IN, OUT, FP8, True, torch.bfloat16, "meta")
        assert (layer.weight.device.type, layer.weight.dtype, tuple(layer.weight.shape)) == (
            "meta",
            torch.bfloat16,
            (OUT, IN),
        )
        with pytest.raises(ValueError, match="to_empty"):
            layer.set_weight(torch.zeros(OUT, IN))
        layer.to_empty(device="cpu").set_weight(torch.ones(OUT, IN))
        assert torch.equal(layer.weight, torch.ones(OUT, IN, dtype=torch.bfloat16))

    def test_unsupported_weights_are_rejected(self):
        layer = stored_layer()
        for matrix in (torch.full((OUT, IN), torch.nan), torch.full((OUT, IN), torch.inf)):
            with pytest.raises(ValueError, match="NaNs or infinite values detected in the weights of a linear layer"):
                layer.set_weight(matrix)
        with pytest.raises(ValueError, match=r"Expected a weight of shape \(72, 160\)"):
            layer.set_weight(torch.zeros(IN, OUT))
        tensors = {name: tensor.clone() for name, tensor in layer.tensors.items()}
        scales = tensors["block_scales"]
        for wrong in ({"codes": tensors["codes"]}, tensors | {"block_scales": scales[:1]},
                      tensors | {"block_scales": scales.float()}, tensors | {"absmax": scales}):  # fmt: skip
            with pytest.raises(ValueError, match=r"Expected tensors .* in fp8/16x32, found"):
                layer.set_tensors(wrong)
        with pytest.raises(ValueError, match="columns a multiple of 2"):
            QuantizedLinear.from_linear(nn.Linear(7, 4), Mxfp4Format())

    def test_weight_cannot_be_assigned(self):
        layer = stored_layer()
        weight = layer.weight
        assert weight.is_leaf
        assert not weight.requires_grad
        assert type(weight * 2) is torch.Tensor
        with pytest.raises(ValueError, match="decoded at each access"):
            layer.weight.data += 1
        with pytest.raises((KeyError, AttributeError)):
            layer.weight = nn.Parameter(torch.zeros(OUT, IN))


class TestMergingOneLayer:
    @of_every_format
    def test_rounds_to_the_nearest_value_of_the_block(self, storage):
        layer = stored_layer(storage)
        delta = 0.02 * torch.randn(OUT, IN)
        before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
        merged = layer.merged(delta)
        exact = layer.decode(torch.float32) + delta
        assert_same_bytes(dict(layer.tensors), before)
        error = (merged.decode(torch.float32) - exact).norm() / exact.norm()
        fresh = QuantizedLinear.from_linear(nn.Linear(IN, OUT), storage)
        fresh.set_weight(exact)
        assert error <= 1.02 * (fresh.decode(torch.float32) - exact).norm() / exact.norm()
        assert merged.fidelity.relative_error == pytest.approx(error.item(), rel=1e-4)
        assert 0.5 < merged.fidelity.delta_kept < 1.5
        assert merged.bias is layer.bias

    @of_every_format
    def test_no_byte_changes_without_a_delta(self, storage):
        layer = stored_layer(storage)
        layer.codes[..., 0] = layer.codes[..., 0] | 0x80 if layer.codes.dim() > 1 else layer.codes[..., 0]
        merged = layer.merged(torch.zeros(OUT, IN))
        assert_same_bytes(dict(merged.tensors), dict(layer.tensors))
        assert merged.codes.data_ptr() != layer.codes.data_ptr()
        assert merged.fidelity.delta_kept is None

    @pytest.mark.parametrize("storage", [Fp8Format((16, 32), "e8m0"), Fp8Format((16, 32))], ids=str)
    def test_unmerged_weights_keep_their_values(self, storage):
        """New scales would change all of them, if the old ones are not derived from the largest weight."""
        layer = stored_layer(storage)
        layer.block_scales += 1 if storage.scale == "e8m0" else 2**22
        delta = torch.zeros(OUT, IN)
        delta[20] = 0.001 * torch.randn(IN)
        before, after = layer.decode(torch.float32), layer.merged(delta).decode(torch.float32)
        assert (before[20] != after[20]).any()
        others = torch.arange(OUT) != 20
        assert torch.equal(before[others], after[others])

    def test_dense_layer_is_rounded_once(self):
        layer = stored_layer(dtype=torch.bfloat16)
        delta = 1e-3 * torch.randn(OUT, IN)
        dense = layer.merged_dense(delta, torch.bfloat16)
        assert torch.equal(dense.weight, (layer.decode(torch.float32) + delta).bfloat16())
        assert dense.bias is layer.bias
        assert layer.merged_dense(delta, torch.float32).bias.dtype == torch.float32
        with pytest.raises(ValueError, match="NaNs"):
            layer.merged_dense(1e6 * torch.ones(OUT, IN), torch.float16)
        with pytest.raises(ValueError, match="NaNs"):
            layer.merged(torch.full((OUT, IN), torch.inf))
