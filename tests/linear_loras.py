"""Linear layers with PEFT's LoRA and with this package's, and their outputs and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable

import bitsandbytes
import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from quantized_linears import FP8
from torch import nn

from peft_moe_qlora.linear_lora import FastForward, four_bit_matrix, with_fast_forward
from peft_moe_qlora.quantized_linear import QuantizedLinear
from peft_moe_qlora.quantized_linear_lora import QuantizedLinearLora

IN, OUT, RANK = 128, 96, 4
BF16 = torch.bfloat16


def bnb_layer(
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    bias: bool = False,
    sizes: tuple[int, int] = (IN, OUT),
    nested: bool = False,
    quant_type: str = "nf4",
    **options,
) -> bitsandbytes.nn.Linear4bit:
    options = {"compute_dtype": dtype, "compress_statistics": nested, "quant_type": quant_type, **options}
    layer = bitsandbytes.nn.Linear4bit(*sizes, bias=bias, **options)
    layer = layer.to(device).requires_grad_(False)
    layer.support_avx512bf16_for_cpu = False
    if bias:
        layer.bias.data = layer.bias.data.to(dtype)
    return layer


def dense_layer(dtype=torch.float32, device="cpu", bias=False, sizes=(IN, OUT)) -> nn.Linear:
    return nn.Linear(*sizes, bias=bias, dtype=dtype, device=device).requires_grad_(False)


def stored_layer(dtype=torch.float32, device="cpu", bias=False, sizes=(IN, OUT)) -> QuantizedLinear:
    return QuantizedLinear.from_linear(dense_layer(dtype, device, bias, sizes), FP8)


KINDS: dict[str, Callable] = {
    "dense": dense_layer,
    "stored": stored_layer,
    "nf4": bnb_layer,
    "nf4 nested": lambda *args, **kwargs: bnb_layer(*args, nested=True, **kwargs),
    "fp4": lambda *args, **kwargs: bnb_layer(*args, quant_type="fp4", **kwargs),
}
of_every_kind = pytest.mark.parametrize("kind", KINDS)


def stock_layer(base: nn.Module, dropout: float = 0.0, adapters: tuple[str, ...] = ("default",), **options):
    """PEFT's own layer, with nonzero fp32 factors."""
    cls = lora.Linear4bit if isinstance(base, bitsandbytes.nn.Linear4bit) else lora.Linear
    config = LoraConfig(r=RANK, lora_alpha=3 * RANK, lora_dropout=dropout, **options)
    layer = cls(base, adapters[0], config=config, r=RANK, lora_alpha=3 * RANK)
    for number, name in enumerate(adapters[1:], start=1):
        layer.update_layer(name, RANK + number, RANK, config=config)
    layer.set_adapter(list(adapters))
    for factor in (layer.lora_A, layer.lora_B):
        for one in factor.values():
            one.float()
            nn.init.normal_(one.weight, std=0.1)
    return layer


def fast(stock: nn.Module) -> FastForward:
    """This package's layer with the same weight and factors."""
    layer = copy.deepcopy(stock)
    if isinstance(layer.base_layer, QuantizedLinear):
        layer.__class__ = QuantizedLinearLora
        layer._unmerged = []
        return layer
    layer = with_fast_forward(layer)
    assert isinstance(layer, FastForward)
    return layer


def both(kind: str, dtype=torch.float32, device="cpu", bias=False, sizes=(IN, OUT), **options):
    stock = stock_layer(KINDS[kind](dtype, device, bias=bias, sizes=sizes), **options)
    return fast(stock), stock


def inputs(dtype=torch.float32, device="cpu", shape=(3, 5, IN)) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def results(layer: nn.Module, x: torch.Tensor, forward: Callable | None = None) -> list[torch.Tensor]:
    """The output and all gradients."""
    torch.manual_seed(7)
    out = (layer if forward is None else forward)(x)
    weights = torch.linspace(0.5, 1.5, out.numel(), device=x.device).view(out.shape).to(out.dtype)
    wanted = [one for one in (x, *layer.parameters()) if one.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), wanted)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Relative to the largest value of a tensor."""
    assert len(found) == len(expected) > 2
    for one, other in zip(found, expected):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert other.isfinite().all()
        assert other.any()
        assert (one - other).abs().max() <= tolerance * other.abs().max()


def exact(layer: nn.Module) -> nn.Linear:
    """A plain fp32 layer with the dequantized weight of a layer."""
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        matrix = layer.stored_matrix if isinstance(layer, QuantizedLinear) else four_bit_matrix(layer)
        weight = matrix.decode(torch.float32)
    else:
        weight = layer.weight.float()
    twin = nn.Linear(*weight.shape[::-1], bias=layer.bias is not None, device=weight.device).requires_grad_(False)
    twin.weight.copy_(weight)
    if layer.bias is not None:
        twin.bias.copy_(layer.bias)
    return twin


def watch_peft(monkeypatch: pytest.MonkeyPatch) -> list[type]:
    """A list that records the class of each layer whose forward runs in PEFT."""
    seen: list[type] = []

    def watched(own: Callable) -> Callable:
        return lambda self, *args, **kwargs: seen.append(type(self)) or own(self, *args, **kwargs)

    for cls in (lora.Linear, lora.Linear4bit):
        monkeypatch.setattr(cls, "forward", watched(cls.forward))
    return seen
