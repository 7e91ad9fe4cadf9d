"""The same for int8, int4 and NVFP4: wrong scales, zero points, orders, shapes and second-level scales."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from broken_checkpoints import change, load, places, put, refuses_headers, refuses_values, write
from checkpoint_writers import Tensors, read_tensors
from published_writers import PER_EXPERT, publish, qwen

from peft_moe_qlora import CheckpointError
from peft_moe_qlora.loading import inspect_checkpoint

LAYOUTS = ("int8", "int4", "nvfp4", "compressed, nvfp4")


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> dict[str, tuple[dict, Tensors]]:
    """Layout -> config.json and tensors of a checkpoint to damage."""
    found = {}
    for name in LAYOUTS:
        directory = tmp_path_factory.mktemp("fine")
        publish(qwen(), directory, PER_EXPERT[name])
        found[name] = json.loads((directory / "config.json").read_text()), read_tensors(directory)
    return found


BY_HEADERS = {
    "no scales of whole numbers": (
        "int8",
        lambda t, n: t.pop(f"{n}.weight_scale"),
        r"_proj\.weight \(I8 .*has no scales. Expected .*weight_scale",
    ),
    "no whole numbers": (
        "int8",
        lambda t, n: [t.pop(f"{n}.{part}") for part in ("weight", "input_scale")],
        "weight_scale .*belongs to .*_proj.weight, which the checkpoint does not have",
    ),
    "scales of whole numbers without a column": (
        "int8",
        lambda t, n: change(t, f"{n}.weight_scale", lambda s: s.flatten()),
        r"weight_scale \(BF16 .*does not match .*Expected \[\d+, 1\] for .*\(int8/channel\+bf16\)",
    ),
    "powers of two for whole numbers": (
        "int8",
        lambda t, n: change(t, f"{n}.weight_scale", lambda s: s.view(torch.uint8)[:, :1]),
        "are powers of two. Expected F32, BF16 or F16 for integers",
    ),
    "zero points": (
        "int8",
        lambda t, n: t.update({f"{n}.weight_zero_point": torch.zeros_like(t[f"{n}.weight_scale"])}),
        r"weight_zero_point \(.*contains zero points of weights.* not supported",
    ),
    "zero points in 4 bits": (
        "int4",
        lambda t, n: t.update({f"{n}.weight_zero_point": torch.zeros(8, 8, dtype=torch.int32)}),
        r"weight_zero_point \(I32 .*contains zero points of weights.* not supported",
    ),
    "columns in another order": (
        "int4",
        lambda t, n: t.update({f"{n}.weight_g_idx": torch.zeros(256, dtype=torch.int32)}),
        r"weight_g_idx \(I32 .*contains reordered columns.* not supported",
    ),
    "no scales of groups": (
        "int4",
        lambda t, n: t.pop(f"{n}.weight_scale"),
        r"weight_packed \(I32 .*has no scales. Expected .*weight_scale",
    ),
    "no second scale": (
        "nvfp4",
        lambda t, n: t.pop(f"{n}.weight_scale_2"),
        r"_proj\.weight \(U8 .*has no second scale. Expected .*weight_scale_2",
    ),
    "no second scale that divides": (
        "compressed, nvfp4",
        lambda t, n: t.pop(f"{n}.weight_global_scale"),
        r"weight_packed \(U8 .*has no second scale. Expected .*weight_global_scale",
    ),
    "two second scales": (
        "nvfp4",
        lambda t, n: t.update({f"{n}.weight_global_scale": torch.ones(1)}),
        "second scale .*weight_global_scale .*Expected only weight_scale_2: one of them multiplies",
    ),
    "the other second scale": (
        "compressed, nvfp4",
        lambda t, n: t.update({f"{n}.weight_scale_2": t.pop(f"{n}.weight_global_scale")}),
        "second scale .*weight_scale_2 .*Expected only weight_global_scale",
    ),
    "a second scale for each row": (
        "nvfp4",
        lambda t, n: change(t, f"{n}.weight_scale_2", lambda s: s.expand(8)),
        r"weight_scale_2 \(F32 \[8\] .*Expected one number in F32",
    ),
    "no first scales": ("nvfp4", lambda t, n: t.pop(f"{n}.weight_scale"), "has no scales. Expected .*weight_scale"),
    "scales of blocks of 32": (
        "compressed, nvfp4",
        lambda t, n: change(t, f"{n}.weight_scale", lambda s: s[:, ::2]),
        r"weight_scale \(F8_E4M3 .*does not match .*Expected F8_E4M3 \[\d+, 16\]",
    ),
    "scales of blocks in fp32": (
        "nvfp4",
        lambda t, n: change(t, f"{n}.weight_scale", lambda s: s.float()),
        r"weight_scale \(F32 .*does not match .*Expected F8_E4M3 \[\d+, 16\]",
    ),
    "scales of inputs that were multiplied in": (
        "nvfp4",
        lambda t, n: t.update({f"{n}.pre_quant_scale": torch.ones(256)}),
        r"pre_quant_scale \(F32 .*\(AWQ\), which is not supported",
    ),
    "no codes of two levels": (
        "compressed, nvfp4",
        lambda t, n: t.pop(f"{n}.weight_packed"),
        "belongs to .*_proj.weight, which the checkpoint does not have|matches none of its parameters",
    ),
    "no groups": (
        "int4",
        lambda t, n: t.pop(f"{n}.weight_packed"),
        "belongs to .*_proj.weight, which the checkpoint does not have",
    ),
    "groups in bytes": (
        "int4",
        lambda t, n: change(t, f"{n}.weight_packed", lambda w: w.view(torch.uint8)),
        r"belongs to .*_proj.weight, which the checkpoint does not have|\(U8 .* matches none of its parameters",
    ),
    "scales of groups of another size": (
        "int4",
        lambda t, n: change(t, f"{n}.weight_scale", lambda s: s[:, ::2]),
        r"does not match .*Expected \[\d+, 8\] for .*\(int4/32\+bf16\)",
    ),
    "no shape": ("int4", lambda t, n: t.pop(f"{n}.weight_shape"), "has no weight_shape. Expected .*weight_shape"),
    "a shape that is none": (
        "int4",
        lambda t, n: change(t, f"{n}.weight_shape", lambda s: s.float()),
        r"weight_shape \(F32 .* Expected I32 or I64 \[2\]",
    ),
    "both in 4 bits": (
        "int4",
        lambda t, n: t.update({f"{n}.weight": torch.zeros(256, 256)}),
        "are both the weight",
    ),
}
BY_VALUES = {
    "a scale of whole numbers that is NaN": (
        "int8",
        "weight_scale",
        put(torch.nan, 1, 0),
        r"\(BF16 .*NaN or infinite",
    ),
    "a scale of 0 for whole numbers": ("int8", "weight_scale", put(0.0, 1, 0), "scales of 0 for weights whose codes"),
    "a negative scale of whole numbers": ("int8", "weight_scale", put(-0.01, 1, 0), "negative scales"),
    "scales of 1 for whole numbers": ("int8", "weight_scale", put(1.0, ...), "a scale of exactly 1 for each of its"),
    "a second scale of 0": ("nvfp4", "weight_scale_2", put(0.0), r"weight_scale_2 \(F32 .*is 0\. Expected a positive"),
    "a second scale that is NaN": (
        "compressed, nvfp4",
        "weight_global_scale",
        put(torch.nan, 0),
        "is nan. Expected a positive",
    ),
    "a second scale that is infinite": (
        "compressed, nvfp4",
        "weight_global_scale",
        put(torch.inf, 0),
        "is inf. Expected a positive",
    ),
    "a negative second scale": ("nvfp4", "weight_scale_2", put(-1e-4), "which multiplies"),
    "a second scale of 1": ("nvfp4", "weight_scale_2", put(1.0), "with a median magnitude of .*reciprocals"),
    "a reciprocal as second scale": (
        "nvfp4",
        "weight_scale_2",
        lambda s: 1 / s,
        "decodes to weights with a median magnitude of .*reciprocals",
    ),
    "a factor as second scale": (
        "compressed, nvfp4",
        "weight_global_scale",
        lambda s: 1 / s,
        "decodes to weights with a median magnitude of .*reciprocals",
    ),
    "a first scale that is NaN": ("nvfp4", "weight_scale", put(0x7F, 1, 1), r"weight_scale \(F8_E4M3 .*NaN or inf"),
    "a negative first scale": ("nvfp4", "weight_scale", put(0xB8, 1, 1), "negative scales"),
    "a first scale of 0": ("compressed, nvfp4", "weight_scale", put(0, 1, 1), "scales of 0 for weights whose codes"),
    "first scales of 1": ("nvfp4", "weight_scale", put(0x38, ...), "a scale of exactly 1 for each of its"),
    "a shape of another weight": (
        "int4",
        "weight_shape",
        put(255, 1),
        r"has the shape .*255\] .*Expected \[\d+, 256\]",
    ),
    "a scale of a group that is NaN": ("int4", "weight_scale", put(torch.nan, 1, 1), r"\(BF16 .*NaN or infinite"),
    "a scale of 0 for a group": ("int4", "weight_scale", put(0.0, 1, 1), "scales of 0 for weights whose codes"),
    "scales of 1 for groups": ("int4", "weight_scale", put(1.0, ...), "a scale of exactly 1 for each of its"),
    "reciprocals for groups": ("int4", "weight_scale", lambda s: 1 / s, "with a median magnitude of .*reciprocals"),
    "reciprocals for integers": ("int8", "weight_scale", lambda s: 1 / s, "with a median magnitude of .*reciprocals"),
}


@pytest.mark.parametrize(("layout", "do", "message", "name"), places(BY_HEADERS).values(), ids=places(BY_HEADERS))
def test_damaged_headers(layout, do, message, name, fine, tmp_path):
    refuses_headers(*fine[layout], do, name, message, tmp_path)


@pytest.mark.parametrize(
    ("layout", "part", "do", "message", "name"), places(BY_VALUES).values(), ids=places(BY_VALUES)
)
def test_damaged_values(layout, part, do, message, name, fine, tmp_path):
    refuses_values(*fine[layout], part, do, name, message, tmp_path)


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("int8", {"symmetric": False}, "symmetric=False: zero points of weights.*not supported"),
        ("int8", {"strategy": "group"}, "group_size=None. Expected the columns of a group, such as 128"),
        ("int8", {"strategy": "block", "block_structure": [128]}, r"block_structure=\[128\]\. Expected rows and"),
        ("int8", {"strategy": "group", "group_size": 64}, r"not match .*Expected \[\d+, 4\] .*\(int8/1x64\+bf16\)"),
        ("int8", {"strategy": "group", "group_size": 64, "actorder": "group"}, "actorder='group': reordered columns"),
        ("int4", {"symmetric": False}, "symmetric=False: zero points of weights.*not supported"),
        ("int4", {"actorder": "group"}, "actorder='group': reordered columns.*not supported"),
        ("int4", {"group_size": 0}, "group_size=0. Expected the columns of a group"),
        ("int4", {"group_size": 128}, r"does not match .*Expected \[\d+, 2\] for .*\(int4/128\+bf16\)"),
        ("int4", {"strategy": "tensor"}, "is quantized by 'compressed-tensors', which is not supported for experts"),
        ("int8", {"strategy": "token"}, "is quantized by 'compressed-tensors', which is not supported for experts"),
    ],
    ids=str,
)
def test_configs_of_groups_that_do_not_match(layout, changes, message, fine, tmp_path):
    config, tensors = copy.deepcopy(fine[layout])
    config["quantization_config"]["config_groups"]["group_0"]["weights"] |= changes
    write(tmp_path, config, tensors)
    for read in (inspect_checkpoint, load):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)
