"""The GPU decoders, instruction by instruction in numpy, for every code at every position in a register."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from ptx_in_numpy import bits_of, numbers, run

import peft_moe_qlora.ops.kernels.decode  # noqa: F401 - it registers what decodes
from peft_moe_qlora.ops.kernels.codec import decoder_of
from peft_moe_qlora.quantization import Format, FourBitFormat
from peft_moe_qlora.quantization.formats import Fp8Format, Int4Format, Int8Format, Mxfp4Format

BYTES = [Fp8Format(), Int8Format()]
"""Formats with one byte per code."""
NIBBLES = [Mxfp4Format(), Int4Format(), FourBitFormat("nf4"), FourBitFormat("fp4")]
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}


def words() -> np.ndarray:
    """Every byte at each of the four positions of a register, with other bytes next to it."""
    generator = np.random.default_rng(0)
    found = generator.integers(0, 256, (4, 256, 4), dtype=np.uint32)
    for place in range(4):
        found[place, :, place] = np.arange(256)
    return found.reshape(-1, 4)


def exact_values(storage: Format, dtype: torch.dtype) -> np.ndarray:
    """Of each code, NaN if invalid: as the format defines them, times the unit of a table of 16 bits."""
    codes = torch.arange(256 if storage.codes_per_byte == 1 else 16, dtype=torch.uint8)
    unit = decoder_of(storage.kernel_codes, dtype, True).unit
    values = storage.values(codes).double()
    return ((values * unit).to(dtype) if unit != 1 else values).double().numpy()


def halves(pairs: list[np.ndarray], name: str) -> np.ndarray:
    """`(threads, numbers)`, the lower halves before the upper ones."""
    return np.stack([numbers(pair >> shift & 0xFFFF, name) for pair in pairs for shift in (0, 16)], axis=1)


def codes_in(storage: Format) -> tuple[np.ndarray, np.ndarray]:
    """Registers, and the codes in them in order."""
    stored = words()
    packed = (stored << np.arange(0, 32, 8, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    if storage.codes_per_byte == 1:
        return packed, stored
    both = (stored >> 4, stored & 15) if isinstance(storage, FourBitFormat) else (stored & 15, stored >> 4)
    return packed, np.stack(both, axis=2).reshape(len(stored), 8)


@pytest.mark.parametrize("storage", [*BYTES, *NIBBLES], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_in_16_bits(storage, dtype):
    packed, codes = codes_in(storage)
    num_results = codes.shape[1] // 2
    decoder = decoder_of(storage.kernel_codes, dtype, True)
    found = halves(run(decoder.assembly, {num_results: packed}, num_results), NAMES[dtype])
    expected = exact_values(storage, dtype)[codes]
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[is_number], expected[is_number])


@pytest.mark.parametrize(
    ("storage", "size", "is_crossed"),
    [
        *itertools.product(BYTES, (1e-2, 1e-4, 1e-6), (False, True)),
        *itertools.product(NIBBLES, (1e-2,), (False,)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_values_times_scales(storage, size, is_crossed, dtype):
    """Rounded once, from a scale with twice the digits; small ones would be subnormal in fp16."""
    packed, codes = codes_in(storage)
    num_results = codes.shape[1] // 2
    decoder = decoder_of(storage.kernel_codes, dtype, True)
    scale = np.random.default_rng(1).uniform(size, 2 * size, num_results) * decoder.power
    coarse = bits_of(scale, NAMES[dtype])
    fine = bits_of(scale - numbers(coarse, NAMES[dtype]), NAMES[dtype])
    operands = {num_results: packed}
    for number, bits in enumerate([*coarse, *fine], start=num_results + 1):
        operands[number] = np.full(len(packed), bits << np.uint32(16) | bits, np.uint32)
    assembly = decoder.crossed_assembly if is_crossed else decoder.scaled_assembly
    found = halves(run(assembly, operands, num_results), NAMES[dtype])
    if is_crossed:
        # the first codes of two pairs, then the second ones
        codes = codes.reshape(len(packed), -1, 2, 2).swapaxes(2, 3).reshape(codes.shape)
    expected = exact_values(storage, dtype)[codes] * np.repeat(scale / decoder.power, 2)
    is_number = ~np.isnan(expected)
    error = np.abs(found - expected)[is_number]
    limits = torch.finfo(dtype)
    # one rounding; the term added for the fine scale may be subnormal
    assert (error <= limits.eps * (0.51 * np.abs(expected[is_number]) + limits.smallest_normal)).all()


@pytest.mark.parametrize("storage", BYTES, ids=str)
def test_values_in_fp32(storage):
    packed, codes = codes_in(storage)
    results = run(decoder_of(storage.kernel_codes, torch.float32, True).assembly, {4: packed}, 4)
    # the first codes of two pairs, then the second ones
    found = np.stack([numbers(results[place], "f32") for place in (0, 2, 1, 3)], axis=1)
    expected = exact_values(storage, torch.float32)[codes]
    is_number = ~np.isnan(expected)
    np.testing.assert_array_equal(found[is_number], expected[is_number])
