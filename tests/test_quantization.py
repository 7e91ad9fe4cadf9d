"""Storage: bytes equal bitsandbytes', decoding is exact, and only an explicit change modifies a stack."""

from __future__ import annotations

import copy

import pytest
import torch
from bitsandbytes import functional as bnb

from peft_moe_qlora.quantization import DenseStack, FourBitFormat, QuantizedStack
from peft_moe_qlora.quantization.formats.four_bit import dequantize, dequantize_reference

FORMATS = [
    FourBitFormat("nf4", 64),
    FourBitFormat("fp4", 64),
    FourBitFormat("nf4", 128, double_quant=True),
    FourBitFormat("fp4", 32, double_quant=True),
    FourBitFormat("nf4", 2048),
]
SHAPES = [
    pytest.param((3, 8, 64), id="whole-blocks-per-row"),
    pytest.param((3, 16, 40), id="blocks-cross-rows"),
    pytest.param((2, 7, 11), id="odd-number-of-weights"),
    pytest.param((2, 5, 10), id="less-than-a-block"),
    pytest.param((1, 16, 64), id="single-expert"),
    pytest.param((2, 160, 128), id="more-than-256-scales"),
]


def random_stack(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_and_scales_equal_bitsandbytes(shape, storage, dtype, device):
    weight = random_stack(shape, device, dtype)
    stack = QuantizedStack.from_dense(weight, is_transposed=False, storage=storage)
    for expert in range(shape[0]):
        codes, state = bnb.quantize_4bit(
            weight[expert].contiguous(),
            blocksize=storage.blocksize,
            quant_type=storage.quant_type,
            compress_statistics=storage.double_quant,
        )
        assert torch.equal(stack.codes[expert], codes.flatten())
        if storage.double_quant:
            assert torch.equal(stack.block_absmax[expert], state.absmax)
            assert torch.equal(stack.group_absmax[expert].view(torch.float32), state.state2.absmax)
            assert torch.equal(stack.offset[expert].view(torch.float32), state.offset)
        else:
            assert torch.equal(stack.block_absmax[expert].view(torch.float32), state.absmax)


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_no_cast_changes_codes_and_scales(storage):
    """Mixed-precision engines cast the data of every floating-point parameter, bypassing `Module.to`."""
    stack = QuantizedStack.from_dense(random_stack((3, 32, 128), "cpu"), is_transposed=False, storage=storage)
    before = stack.decode(torch.float32)
    for parameter in stack.parameters():
        assert not parameter.is_floating_point()
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    assert torch.equal(stack.to(torch.float16).half().decode(torch.float32), before)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoding_equals_bitsandbytes(shape, storage, dtype, device):
    weight = random_stack(shape, device)
    stack = QuantizedStack.from_dense(weight, is_transposed=False, storage=storage)
    decoded = stack.decode(dtype)
    for expert in range(shape[0]):
        # flat: on a CPU, bitsandbytes 0.50.2 decodes a matrix wrongly if its blocks are longer than its rows
        codes, state = bnb.quantize_4bit(
            weight[expert].flatten(),
            blocksize=storage.blocksize,
            quant_type=storage.quant_type,
            compress_statistics=storage.double_quant,
        )
        state.dtype = dtype
        assert torch.equal(decoded[expert].flatten(), bnb.dequantize_4bit(codes, state).flatten())
        assert torch.equal(stack.decode_expert(expert, dtype), decoded[expert])


@pytest.mark.parametrize("numel", [1, 63, 64, 65, 4096, 5000])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_plain_torch_decoder_equals_bitsandbytes(numel, quant_type, device):
    storage = FourBitFormat(quant_type, 64)
    codes = torch.randint(0, 256, (-(-numel // 2),), dtype=torch.uint8, device=device)
    absmax = torch.rand(-(-numel // 64), device=device)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        library = dequantize(codes, absmax, numel, storage, dtype)
        assert torch.equal(dequantize_reference(codes, absmax, numel, storage, dtype), library)


@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("storage", FORMATS[:3], ids=str)
def test_casting_a_model_changes_neither_codes_nor_scales(cast, storage):
    stack = QuantizedStack.from_dense(torch.randn(2, 8, 64), is_transposed=False, storage=storage)
    before = copy.deepcopy(stack.state_dict())
    torch.nn.Sequential(stack).to(cast)
    for name, tensor in stack.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_state_dict_round_trip_is_exact():
    storage = FourBitFormat("nf4", 64, double_quant=True)
    stack = QuantizedStack.from_dense(torch.randn(3, 8, 64), is_transposed=True, storage=storage)
    other = QuantizedStack(stack.shape, stack.dtype, True, storage)
    other.load_state_dict(stack.state_dict())
    assert torch.equal(other.decode(torch.float32), stack.decode(torch.float32))


def test_stack_of_more_than_2_to_the_31_weights():
    """The last expert is beyond the reach of 32-bit offsets; only it is filled, to keep the test fast."""
    stack = QuantizedStack(torch.Size((33, 8192, 8192)), torch.bfloat16, False, FourBitFormat("nf4", 4096))
    assert stack.shape.numel() > 2**31
    matrix = torch.zeros(8192, 8192)
    matrix[-1, -4096:] = torch.randn(4096)
    stack.set_expert(32, matrix)
    decoded = stack.decode_expert(32, torch.float32)
    codes, state = bnb.quantize_4bit(matrix[-1, -4096:].contiguous(), blocksize=4096, quant_type="nf4")
    assert torch.equal(decoded[-1, -4096:], bnb.dequantize_4bit(codes, state))
    assert decoded[:-1].abs().max() == 0


@pytest.mark.gpu
def test_decoding_more_than_2_to_the_31_weights_at_once():
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    stack = QuantizedStack.from_dense(matrix.expand(33, -1, -1), False, FourBitFormat("nf4", 64))
    decoded = stack.decode(torch.bfloat16)
    assert torch.equal(decoded[32], decoded[0])
    assert torch.equal(decoded[32], stack.decode_expert(32, torch.bfloat16))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("storage", [None, FourBitFormat("nf4", 64)], ids=str)
def test_merging_adds_the_delta_in_its_orientation(storage, is_transposed):
    """A square stack: only the declaration determines the orientation."""
    weight = torch.randn(2, 64, 64)
    dense = DenseStack(weight, is_transposed)
    stack = dense if storage is None else QuantizedStack.from_dense(weight, is_transposed, storage)
    delta = torch.randn(2, 64, 64)
    exact = stack.decode(torch.float32) + (delta.transpose(1, 2) if is_transposed else delta)
    merged = stack.merged(lambda expert: delta[expert])
    if storage is None:
        assert torch.equal(merged.weight, exact)
        assert merged.fidelity is None
    else:
        once = QuantizedStack.from_dense(exact, is_transposed, storage)
        assert torch.equal(merged.codes, once.codes)
        assert torch.equal(merged.block_absmax, once.block_absmax)
        error = (once.decode(torch.float32) - exact).norm() / exact.norm()
        assert merged.fidelity.relative_error == pytest.approx(error.item(), rel=1e-5)
        assert 0.05 < merged.fidelity.relative_error < 0.15


@pytest.mark.parametrize(("quant_type", "blocksize"), [("int4", 64), ("nf4", 48), ("nf4", 0)])
def test_unknown_formats_are_rejected(quant_type, blocksize):
    with pytest.raises(ValueError, match="Choose one of"):
        FourBitFormat(quant_type, blocksize)
