"""Requirements of every format, and of a made-up one that the package does not contain."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from made_up_format import SixBits
from peft import PeftModel, get_peft_model
from tiny_models import assert_same_bytes, logits, packed_bytes, randomize_adapter, tiny_model, token_ids

import peft_moe_qlora
from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized, quantize_experts
from peft_moe_qlora.merge.checkpoint import merge_checkpoint
from peft_moe_qlora.quantization import Format, FourBitFormat, QuantizedStack, parse_format
from peft_moe_qlora.quantization.formats import Fp8Format, Int4Format, Int8Format, Mxfp4Format, Nvfp4Format

GRIDS = [
    Fp8Format(),
    Fp8Format((16, 32), "bf16"),
    Fp8Format((24, 48), "fp16"),
    Fp8Format((1, 0)),
    Fp8Format((0, 0), "bf16"),
    Fp8Format((1, 32), "e8m0"),
    Mxfp4Format(),
    Int8Format(),
    Int8Format((1, 32), "bf16"),
    Int8Format((0, 0), "fp16"),
    Int4Format(),
    Int4Format((1, 128), "bf16"),
    Int4Format((1, 0), "fp16"),
    Nvfp4Format(),
    Nvfp4Format(is_inverse=True),
    SixBits(),
]
FORMATS = [FourBitFormat(), FourBitFormat("fp4", 128, double_quant=True), *GRIDS]


def stack_of(storage: Format, shape=(3, 96, 160), parts: int = 2) -> QuantizedStack:
    generator = torch.Generator().manual_seed(0)
    return QuantizedStack.from_dense(torch.randn(shape, generator=generator), False, storage, parts)


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_names_are_parsed_to_their_format(storage):
    assert parse_format(str(storage)) == storage
    assert MoeQLoraConfig(storage=str(storage)).format == storage
    assert MoeQuantizationConfig(storage=str(storage)).format == storage


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fp8",
        "fp8/128",
        "fp8/-1x2",
        "fp8/128x128+fp64",
        "mxfp5",
        "int8",
        "int8/128",
        "int8/1x128+e9m0",
        "int4",
        "int4/0",
        "int4/1x32",
        "int4/32+e8m0",
        "nvfp4/16",
        "nf4/64+qd",
        "nf5/64",
    ],
)
def test_invalid_names_are_rejected(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_format(text)
    with pytest.raises(ValueError, match="storage"):
        MoeQLoraConfig(storage=text)


@pytest.mark.parametrize("storage", GRIDS, ids=str)
@pytest.mark.parametrize("parts", [1, 2])
def test_weights_are_values_times_scales(storage, parts):
    """By the definition, one weight at a time, in fp64."""
    stack = stack_of(storage, (1, 40, 64), parts)
    bits = {name: tensor[0] for name, tensor in stack.tensors_of(slice(0, 1)).items()}
    values = storage.values(storage.codes_of_bytes(bits["codes"])).double()
    grid = stack.scales(slice(0, 1))[0].view(*bits["block_scales"].shape).double()
    block_rows, block_columns = storage.block_of(40, 64, parts)
    part_rows = 40 // parts
    rows_of_part = -(-part_rows // block_rows)
    expected = torch.empty(40, 64, dtype=torch.float64)
    for row in range(40):
        part, inside = divmod(row, part_rows)
        for column in range(64):
            scale = grid[part * rows_of_part + inside // block_rows, column // block_columns]
            expected[row, column] = values[row, column] * scale
    torch.testing.assert_close(stack.decode(torch.float64)[0], expected.float().double(), rtol=0, atol=0)


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_representable_weights_are_stored_exactly(storage):
    stack = stack_of(storage)
    again = stack.merged(lambda expert: torch.zeros(96, 160))
    assert_same_bytes(dict(again.named_parameters()), dict(stack.named_parameters()))


ERRORS = {"fp8": 0.0275, "mxfp4": 0.12, "int8": 0.01, "nvfp4": 0.1, "int4": 0.13, "six": 0.04, "nf4": 0.1, "fp4": 0.14}
"""Slightly above the errors of Gaussian weights: 0.026, 0.112, 0.009, 0.08 to 0.12, 0.095, 0.035, 0.096, 0.13."""


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_quantization_error_of_the_format(storage):
    stack = stack_of(storage)
    weight = torch.randn(3, 96, 160, generator=torch.Generator().manual_seed(0))
    error = (stack.decode(torch.float32) - weight).norm() / weight.norm()
    assert error < ERRORS[str(storage).partition("/")[0]]


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_tensors_are_integers_that_no_cast_changes(storage):
    stack = stack_of(storage)
    before = {name: tensor.clone() for name, tensor in stack.named_parameters()}
    assert not any(tensor.is_floating_point() for tensor in before.values())
    stack.to(torch.bfloat16).half().float()
    assert_same_bytes(dict(stack.named_parameters()), before)


@pytest.mark.parametrize("storage", FORMATS, ids=str)
def test_zeros_are_stored_as_zeros(storage):
    stack = QuantizedStack.from_dense(torch.zeros(2, 64, 64), False, storage, 2)
    assert not stack.decode(torch.float32).any()
    assert torch.isfinite(stack.scales(slice(None))).all()


@pytest.mark.parametrize("storage", GRIDS, ids=str)
def test_small_delta_does_not_change_all_weights(storage):
    """If scales were not derived from the largest weight, new ones would round every weight again."""
    stack = stack_of(storage, (1, 64, 64), 1)
    for name, tensor in storage.store_scales(2 * stack.scales(slice(0, 1))[0], 64, 64).items():
        stack.get_parameter(name).data[0] = tensor
    delta = torch.zeros(64, 64)
    delta[3, 5] = 1e-4 * stack.decode(torch.float32).abs().max()
    merged = stack.merged(lambda _: delta)
    moved = (merged.decode(torch.float32) != stack.decode(torch.float32)).sum()
    assert moved <= 1


@pytest.mark.parametrize("storage", GRIDS, ids=str)
def test_transposed_stack_is_stored_out_in(storage):
    weight = torch.randn(2, 64, 32)
    stack = QuantizedStack.from_dense(weight, True, storage)
    assert not stack.is_transposed
    plain = QuantizedStack.from_dense(weight.transpose(1, 2).contiguous(), False, storage)
    assert torch.equal(stack.decode(torch.float32), plain.decode(torch.float32))


def stored_in(model) -> dict[str, torch.Tensor]:
    return {name.replace(".base_layer", ""): tensor for name, tensor in packed_bytes(model).items()}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("storage", GRIDS, ids=str)
def test_model_trains_and_merges(storage, model_type, tmp_path):
    """Loss and all gradients equal those of the decoded weights; saving, reloading and merging are tested too."""
    model = tiny_model(model_type)
    quantize_experts(model, storage=str(storage), progressbar=False)
    model.save_pretrained(tmp_path / "base")
    twin = copy.deepcopy(model).dequantize()
    stored = packed_bytes(model)
    ids = token_ids()

    adapted = get_peft_model(model, MoeQLoraConfig(r=4, target_modules=["experts", "q_proj"]))
    assert adapted.peft_config["default"].storage == str(storage)
    of_twin = get_peft_model(twin, MoeQLoraConfig(r=4, target_modules=["experts", "q_proj"], quant_type=None))
    losses = []
    for one in (adapted, of_twin):
        randomize_adapter(one)
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    gradients = {name: tensor.grad for name, tensor in of_twin.named_parameters() if tensor.requires_grad}
    assert gradients
    for name, tensor in adapted.named_parameters():
        if tensor.requires_grad:
            torch.testing.assert_close(tensor.grad, gradients[name], rtol=1e-4, atol=1e-7)
    assert_same_bytes(stored_in(adapted.get_base_model()), stored)

    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted.eval(), ids)
    reloaded = load_quantized(str(tmp_path / "base"), dtype=torch.float32, device_map="cpu")
    assert_same_bytes(packed_bytes(reloaded), stored)
    reloaded = PeftModel.from_pretrained(reloaded, tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(reloaded, ids), expected, rtol=0, atol=0)

    reloaded.merge_adapter()
    reloaded.unmerge_adapter()
    assert_same_bytes(stored_in(reloaded.get_base_model()), stored)
    merged = reloaded.merge_and_unload(dtype=torch.float32, progressbar=False)
    torch.testing.assert_close(logits(merged, ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("storage", [SixBits(), Fp8Format((16, 32))], ids=str)
def test_merge_on_disk_uses_the_trained_weights(storage, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "base")
    quantize_experts(model, storage=str(storage), progressbar=False)
    adapted = get_peft_model(model, MoeQLoraConfig(r=4, storage=str(storage)))
    randomize_adapter(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    expected = logits(adapted.eval(), token_ids())
    merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", progressbar=False)
    merged = type(tiny_model()).from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=1e-4, atol=1e-4)


COARSE = ("int4/128+bf16", "int4/channel+fp16")


@pytest.mark.parametrize("storage", GRIDS, ids=str)
def test_second_order_rounding_beats_rounding_to_nearest(storage):
    """The squared error is halved, for a delta of typical size after training.

    For coarse grids, such as 16 uniform steps for many weights, the delta is an eighth of a step: the gain is smaller.
    """
    from peft_moe_qlora.merge.second_order import MergedExpert, quantize_second_order

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1, 64, 96, generator=generator)
    stack = QuantizedStack.from_dense(weight, False, storage)
    directions = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)
    inputs = torch.randn(512, 96, generator=generator) @ directions.T
    A, B = (torch.randn(shape, generator=generator) for shape in ((4, 96), (64, 4)))
    delta = B @ A
    delta *= 0.05 * weight.norm() / delta.norm()
    exact = stack.decode_expert(0, torch.float32) + delta
    moment = inputs.T @ inputs / len(inputs)

    def error(found: QuantizedStack) -> torch.Tensor:
        return (inputs @ (found.decode_expert(0, torch.float32) - exact).T).square().sum()

    core = torch.linalg.qr(delta).R
    second = quantize_second_order(stack, lambda _: MergedExpert(exact, moment, core), moment)
    limit = 0.65 if str(storage) in COARSE else 0.5
    assert error(second) < limit * error(stack.merged(lambda _: delta))


@pytest.mark.parametrize("is_inverse", [False, True])
@pytest.mark.parametrize("rounding", ["nearest", "second order"])
def test_second_level_scale_is_kept(is_inverse, rounding):
    """A new one would round the scales of all blocks, and engines use one for both gate and up."""
    from peft_moe_qlora.merge.second_order import MergedExpert, quantize_second_order

    storage = Nvfp4Format(is_inverse=is_inverse)
    stack = stack_of(storage, (1, 64, 64), 2)
    before = stack.decode_expert(0, torch.float32)
    first, second = stack.global_scales[0].view(torch.float32)
    assert first == second

    def merged(row: int, column: int, factor: float) -> QuantizedStack:
        """One weight multiplied by a factor."""
        delta = torch.zeros(64, 64)
        delta[row, column] = (factor - 1) * before[row, column]
        if rounding == "nearest":
            return stack.merged(lambda _: delta)
        eye = torch.eye(64)
        return quantize_second_order(stack, lambda _: MergedExpert(before + delta, eye, torch.linalg.qr(delta).R), eye)

    # in the lower half, the blocks with the smallest and the largest scale
    sizes = before[32:].abs().unflatten(1, (-1, 16)).amax(2)
    (low_row, low_block), (row, block) = (divmod(int(found), 4) for found in (sizes.argmin(), sizes.argmax()))

    def largest(row: int, block: int) -> tuple[int, int]:
        return 32 + row, 16 * block + int(before[32 + row, 16 * block : 16 * block + 16].abs().argmax())

    of_small = merged(*largest(low_row, low_block), 1.5)
    assert torch.equal(of_small.global_scales, stack.global_scales)
    assert (of_small.block_scales != stack.block_scales).sum() == 1
    of_large = merged(*largest(row, block), 5.0)
    ratio = of_large.global_scales[0].view(torch.float32) / first
    assert ratio[0] == ratio[1]
    assert (ratio[0] < 1) == is_inverse
    assert ratio[0].log2() == ratio[0].log2().round()
    moved = (of_large.decode(torch.float32) != stack.decode(torch.float32))[0]
    assert moved[32 + row, 16 * block : 16 * block + 16].sum() == moved.sum() > 0


PACKAGE = Path(peft_moe_qlora.__file__).parent
HOMES = ("quantization/formats/", "ops/kernels/", "loading/disk/", "loading/checkpoint.py", "layouts/engines.py")
"""Where a format may be named: its own file, its kernel decoder, its layouts on disk, dtypes of files, and the engines
table."""


@pytest.mark.parametrize("name", ["fp8", "e4m3", "e2m1", "mxfp4", "six", "int8format", "int4", "nvfp4"])
def test_formats_are_named_only_in_their_own_files(name):
    """A new format is one new file; references elsewhere would be missed."""
    found = []
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).as_posix().startswith(HOMES):
            continue
        code = re.sub(r'""".*?"""', "", file.read_text(encoding="utf-8"), flags=re.DOTALL)  # examples may name one
        code = re.sub(r"\"[^\"\n]*'[^\"\n]*'[^\"\n]*\"", "", code)  # errors and help too, in quotation marks
        if re.search(rf"(?<![a-z]){name}", code, flags=re.IGNORECASE):
            found.append(file.relative_to(PACKAGE).as_posix())
    assert not found


@pytest.mark.parametrize("storage", GRIDS, ids=str)
def test_unchanged_weights_keep_their_codes(storage):
    """For all codes, including those that a new scale would not produce."""
    rows, columns = 32, 256
    stack = QuantizedStack.from_dense(torch.randn(1, rows, columns), False, storage)
    codes = torch.arange(rows * columns).view(rows, columns) % (256 if storage.codes_per_byte == 1 else 16)
    codes = codes % 64 if isinstance(storage, SixBits) else codes
    values = storage.values(codes.to(torch.uint8))
    stack.set_codes(0, torch.where(values.isfinite(), codes, 0).to(torch.uint8))
    stored = {name: tensor[0] for name, tensor in stack.tensors.items()}
    exact = stack.decode_expert(0, torch.float32)
    again = stack.like_this()
    again.set_tensors(0, storage.requantize(exact, stored))
    assert torch.equal(again.decode_expert(0, torch.float32), exact)


def test_transposed_stack_has_one_part():
    """Rows of a transposed stack are inputs, of which there may be an odd number."""
    stack = QuantizedStack.from_dense(torch.randn(2, 65, 128), True, FourBitFormat(), 2)
    assert stack.parts == 1


def test_tensor_names_must_not_conflict_with_module_attributes():
    class Taken(SixBits):
        def tensors(self, rows: int, columns: int, parts: int = 1) -> dict:
            return {"scales": super().tensors(rows, columns, parts)["codes"]}

    with pytest.raises(ValueError, match="has a tensor named 'scales'"):
        QuantizedStack(torch.Size((1, 32, 32)), torch.float32, False, Taken())


def test_conflicting_format_options():
    with pytest.raises(ValueError, match="contradicts quant_type"):
        MoeQLoraConfig(storage="fp8/128x128", quant_type="fp4")
    with pytest.raises(ValueError, match="contradicts quant_type"):
        MoeQuantizationConfig("fp4", storage="fp8/128x128")


def test_second_adapter_takes_the_format_of_the_model():
    model = tiny_model()
    quantize_experts(model, storage="fp8/16x32", progressbar=False)
    model = get_peft_model(model, MoeQLoraConfig(r=4))
    model.add_adapter("second", MoeQLoraConfig(r=2))
    assert model.peft_config["second"].storage == "fp8/16x32"
    for asked in (MoeQLoraConfig(quant_type="fp4"), MoeQLoraConfig(quant_type=None)):
        with pytest.raises(ValueError, match="share its experts"):
            model.add_adapter("third", asked)
