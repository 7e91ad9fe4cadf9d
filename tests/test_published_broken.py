"""Damaged published checkpoints: each kind of wrong codes or scales has its own error."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from broken_checkpoints import change, load, places, put, refuses_headers, refuses_values, write
from checkpoint_writers import Tensors, read_tensors, write_tensors
from published_writers import (
    FP8,
    GATE,
    PER_EXPERT,
    QUERY,
    Published,
    fp8,
    gpt_oss,
    publish,
    publish_fused,
    qwen,
    set_config,
)
from tiny_models import tiny_model

from peft_moe_qlora import CheckpointError, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.loading import inspect_checkpoint


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> dict[str, tuple[dict, Tensors, dict]]:
    """Layout -> config.json and tensors of a checkpoint to damage; widths of many blocks of 32."""
    found = {}
    for name in ("fp8", "mxfp4 experts beside fp8", "fp8 per tensor", "mxfp8"):
        directory = tmp_path_factory.mktemp("fine")
        layout = PER_EXPERT[name]
        if name == "fp8":
            config = {**FP8, "weight_block_size": [32, 32]}
            layout = Published(config, lambda n, w: fp8(n, w, (32, 32)), "")
        publish(qwen(), directory, layout)
        found[name] = json.loads((directory / "config.json").read_text()), read_tensors(directory)
    return found


SCALES = "weight_scale_inv"
BY_HEADERS = {
    "no scales": (
        "fp8",
        lambda t, n: t.pop(f"{n}.{SCALES}"),
        r"_proj\.weight \(F8_E4M3 .*has no scales. Expected .*_scale_inv",
    ),
    "no weight": (
        "fp8",
        lambda t, n: t.pop(f"{n}.weight"),
        "belongs to .*_proj.weight, which the checkpoint does not have",
    ),
    "a weight in 16 bits": (
        "fp8",
        lambda t, n: change(t, f"{n}.weight", lambda w: w.bfloat16()),
        r"weight_scale_inv .*belongs to .*, but .*_proj\.weight \(BF16 .* is not quantized|mixture",
    ),
    "scales of another grid": (
        "fp8",
        lambda t, n: change(t, f"{n}.{SCALES}", lambda s: s[:-1]),
        r"_scale_inv \(F32 .*does not match .*Expected .*\[32, 32\]",
    ),
    "scales as if blocks were even": (
        "fp8",
        lambda t, n: change(t, f"{n}.{SCALES}", lambda s: s[: len(s) // 2]),
        "does not match",
    ),
    "scales the other way round": (
        "fp8",
        lambda t, n: change(t, f"{n}.{SCALES}", lambda s: s.flatten()),
        "does not match",
    ),
    "two spellings": (
        "fp8",
        lambda t, n: t.update({f"{n}.weight_scale": t[f"{n}.{SCALES}"]}),
        "has two tensors of scales, .*_scale_inv .* and .*_scale ",
    ),
    "scales in a type of codes": (
        "fp8",
        lambda t, n: change(t, f"{n}.{SCALES}", lambda s: s.to(torch.float8_e4m3fn)),
        "not supported for scales. Expected one of F32",
    ),
    "e5m2": (
        "fp8",
        lambda t, n: change(t, f"{n}.weight", lambda w: w.float().to(torch.float8_e5m2)),
        r"\(F8_E5M2 .*is in e5m2.*Expected F8_E4M3",
    ),
    "e4m3fnuz": (
        "fp8",
        lambda t, n: change(t, f"{n}.weight", lambda w: w.view(torch.float8_e4m3fnuz)),
        r"\(F8_E4M3FNUZ .*is in e4m3fnuz.*Expected F8_E4M3",
    ),
    "no scales in 4 bits": ("mxfp4 experts beside fp8", lambda t, n: t.pop(f"{n}.scale"), "has no scales"),
    "scales of another group": (
        "mxfp4 experts beside fp8",
        lambda t, n: change(t, f"{n}.scale", lambda s: s[:, :-1]),
        r"scale \(F8_E8M0 .*does not match",
    ),
    "a scale for each row": (
        "fp8 per tensor",
        lambda t, n: change(t, f"{n}.{SCALES}", lambda s: s.expand(len(t[f"{n}.weight"]), 1)),
        "does not match",
    ),
}
BY_VALUES = {
    "a code that is NaN": ("fp8", "weight", put(0x7F, 3, 5), r"_proj\.weight \(F8_E4M3 .*has codes that are NaN"),
    "a negative code that is NaN": ("fp8", "weight", put(0xFF, 3, 5), "has codes that are NaN"),
    "a scale that is NaN": ("fp8", SCALES, put(torch.nan, 1, 1), r"_scale_inv \(F32 .*NaN or infinite"),
    "an infinite scale": ("fp8", SCALES, put(torch.inf, 1, 1), "NaN or infinite"),
    "a negative scale": ("fp8", SCALES, put(-0.01, 1, 1), "negative scales"),
    "a scale of 0": ("fp8", SCALES, put(0.0, 1, 1), "scales of 0 for weights whose codes .* are not 0"),
    "scales of 0": ("fp8", SCALES, put(0.0, ...), "scales of 0 for weights"),
    "scales that are not set": (
        "fp8",
        SCALES,
        put(torch.finfo(torch.float32).min, ...),
        "the value of vLLM for scales that are not set",
    ),
    "scales of 1": ("fp8", SCALES, put(1.0, ...), "a scale of exactly 1 for each of its .* blocks"),
    "reciprocals": ("fp8", SCALES, lambda s: 1 / s, "decodes to weights with a median magnitude of .*reciprocals"),
    "a scale that is too large": ("fp8", SCALES, put(1000.0, 1, 1), "scales up to 1000. Expected less than 128"),
    "scales of another model": ("fp8", SCALES, lambda s: s * 1e-6, "Expected 1e-05 to 10"),
    "a byte that is NaN": ("mxfp4 experts beside fp8", "scale", put(255, 1, 1), r"scale \(F8_E8M0 .*NaN or infinite"),
    "bytes of 1": ("mxfp4 experts beside fp8", "scale", put(127, ...), "a scale of exactly 1"),
    "bytes of 0": ("mxfp4 experts beside fp8", "scale", put(0, ...), "Expected 1e-05 to 10"),
    "a byte of 255 beside codes of 8 bits": ("mxfp8", SCALES, put(255, 1, 1), "NaN or infinite"),
}


@pytest.mark.parametrize(("layout", "do", "message", "name"), places(BY_HEADERS).values(), ids=places(BY_HEADERS))
def test_damaged_headers(layout, do, message, name, fine, tmp_path):
    refuses_headers(*fine[layout], do, name, message, tmp_path)


@pytest.mark.parametrize(
    ("layout", "part", "do", "message", "name"), places(BY_VALUES).values(), ids=places(BY_VALUES)
)
def test_damaged_values(layout, part, do, message, name, fine, tmp_path):
    refuses_values(*fine[layout], part, do, name, message, tmp_path)


def test_unusual_but_valid_values(fine, tmp_path):
    """Zeros with any scales, and one or a few blocks of scale 1."""
    config, tensors = copy.deepcopy(fine["fp8"])
    tensors[f"{GATE}.weight"] = torch.zeros_like(tensors[f"{GATE}.weight"].float()).to(torch.float8_e4m3fn)
    tensors[f"{GATE}.{SCALES}"] = torch.ones_like(tensors[f"{GATE}.{SCALES}"])
    up = GATE.replace("gate", "up")
    change(tensors, f"{up}.{SCALES}", put(1.0, 0, 0))
    tensors[f"{QUERY}.weight"] = torch.zeros_like(tensors[f"{QUERY}.weight"].float()).to(torch.float8_e4m3fn)
    tensors[f"{QUERY}.{SCALES}"] = torch.zeros_like(tensors[f"{QUERY}.{SCALES}"])
    write(tmp_path, config, tensors)
    model = load(tmp_path)
    assert not model.get_submodule(QUERY).decode(torch.float32).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_block_size": ...}, "no weight_block_size. Expected the size of the blocks"),
        ({"weight_block_size": None}, "does not match .*one scale per matrix"),
        ({"weight_block_size": [64, 64]}, r"does not match .*\[64, 64\]"),
        ({"weight_block_size": [32]}, r"weight_block_size=\[32\]\. Expected rows and columns of a block"),
        ({"weight_block_size": [0, 32]}, r"weight_block_size=\[0, 32\]"),
        ({"weight_block_size": "32x32"}, "weight_block_size='32x32'"),
        ({"fmt": "e5m2"}, "fmt='e5m2'. Expected 'e4m3'"),
    ],
    ids=str,
)
def test_configs_that_do_not_match(changes, message, fine, tmp_path):
    config, tensors = copy.deepcopy(fine["fp8"])
    config["quantization_config"] |= changes
    config["quantization_config"] = {k: v for k, v in config["quantization_config"].items() if v is not ...}
    write(tmp_path, config, tensors)
    for read in (inspect_checkpoint, load):
        with pytest.raises(CheckpointError, match=message):
            read(tmp_path)


GPT_OSS = "model.layers.1.mlp.experts.down_proj"
BROKEN_BLOCKS = {
    "no scales": (lambda t: t.pop(f"{GPT_OSS}_scales"), "has no scales. Expected .*down_proj_scales"),
    "no blocks": (lambda t: t.pop(f"{GPT_OSS}_blocks"), "belongs to .*down_proj, which the checkpoint does not have"),
    "both": (lambda t: t.update({GPT_OSS: torch.zeros(4, 64, 64)}), "are both the weight"),
    "scales of another shape": (lambda t: change(t, f"{GPT_OSS}_scales", lambda s: s[:, :-1]), "does not match"),
    "blocks of another size": (
        lambda t: change(t, f"{GPT_OSS}_blocks", lambda b: b.flatten(2).unflatten(2, (-1, 8))),
        "does not consist of complete blocks. Expected blocks of 32",
    ),
    "experts of another model": (
        lambda t: [change(t, f"{GPT_OSS}_{part}", lambda s: s[:3]) for part in ("blocks", "scales")],
        "contains 3 experts",
    ),
    "the other way round": (
        lambda t: [
            change(t, key, lambda s: s[:, :32]) for key in list(t) if re.search("down_proj_(blocks|scales)", key)
        ],
        r"give experts of shape \(32, 64\)",
    ),
    "a scale that is NaN": (
        lambda t: change(t, f"{GPT_OSS}_scales", put(255, 2, 1, 1)),
        r"expert 2, has scales that are NaN",
    ),
}


@pytest.mark.parametrize(("do", "message"), BROKEN_BLOCKS.values(), ids=BROKEN_BLOCKS)
def test_damaged_blocks(do, message, tmp_path):
    model = tiny_model("gpt_oss", dtype=torch.bfloat16)
    publish_fused(model, tmp_path, {"quant_method": "mxfp4"}, gpt_oss)
    tensors = read_tensors(tmp_path)
    do(tensors)
    write_tensors(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_layer_missing_in_the_model(fine, tmp_path):
    config, tensors = copy.deepcopy(fine["fp8"])
    for part in ("weight", SCALES):
        tensors[f"{QUERY.replace('layers.1', 'layers.7')}.{part}"] = tensors[f"{QUERY}.{part}"]
    write(tmp_path, config, tensors)
    with pytest.raises(
        CheckpointError, match=r"layers\.7\.self_attn\.q_proj.* belongs to a layer that the model does not have"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [{"format": "pack-quantized"}, {"config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}],
    ids=str,
)
def test_unsupported_group_among_supported_ones(changes, tmp_path):
    layout = PER_EXPERT["compressed, channel"]
    publish(qwen(), tmp_path, layout)
    set_config(tmp_path, {**layout.config, **changes})
    for read in (inspect_checkpoint, load):
        with pytest.raises(CheckpointError, match="by 'compressed-tensors', which is not supported for experts"):
            read(tmp_path)


def test_linear_layers_in_two_storages(fine, tmp_path):
    """Rejected unless they are decoded to 16 bits. Experts must have a single storage too."""
    config, tensors = copy.deepcopy(fine["fp8"])
    change(tensors, f"{QUERY}.{SCALES}", lambda scales: scales.bfloat16())
    write(tmp_path, config, tensors)
    with pytest.raises(
        CheckpointError, match=r"is stored as fp8/32x32\+?\w* and .* as fp8/32x32.*packed_linear='16 bits'"
    ):
        load(tmp_path)
    choice = MoeQuantizationConfig(storage="as stored", packed_linear="16 bits", quantize_linear=False)
    model = load_quantized(tmp_path, choice, dtype=torch.float32, device_map="cpu")
    assert type(model.get_submodule(QUERY)) is torch.nn.Linear
    change(tensors, f"{GATE}.{SCALES}", lambda scales: scales.bfloat16())
    write(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"gate_proj.* is stored as fp8/32x32"):
        load(tmp_path)


def test_linear_layers_of_another_size(fine, tmp_path):
    config, tensors = copy.deepcopy(fine["fp8"])
    tensors |= {
        f"{QUERY}.weight": tensors[f"{QUERY}.weight"][:32],
        f"{QUERY}.{SCALES}": tensors[f"{QUERY}.{SCALES}"][:1],
    }
    write(tmp_path, config, tensors)
    with pytest.raises(CheckpointError, match=r"q_proj.weight is a quantized weight of shape \[32, 256\]\. Expected"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.block_scales"), r"but not model\.layers\.1\.self_attn\.q_proj\.block_scales"),
        (
            lambda t: change(t, f"{QUERY}.block_scales", lambda s: s[:1]),
            r"q_proj\.block_scales \(I32 .*does not match the layer",
        ),
        (lambda t: change(t, f"{QUERY}.codes", lambda c: c.float()), r"q_proj\.codes \(F32 .* not match the layer"),
    ],
    ids=["no scales", "scales of another shape", "codes as numbers"],
)
def test_saved_linear_layers(do, message, fine, tmp_path):
    write(tmp_path, *copy.deepcopy(fine["fp8"]))
    load(tmp_path).save_pretrained(tmp_path / "saved")
    tensors = read_tensors(tmp_path / "saved")
    do(tensors)
    write_tensors(tmp_path / "saved", tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed_linear": "8 bits"}, "packed_linear='8 bits' is unknown. Choose one of"),
        ({"packed_linear": "4 bits", "quantize_linear": False}, "requires quantize_linear=True"),
        ({"linear_storage": "fp9"}, "'fp9' is not a storage format"),
        ({"quant_type": None, "quantize_linear": False}, "leave nothing to quantize"),
    ],
    ids=str,
)
def test_invalid_options(options, message):
    with pytest.raises(ValueError, match=message):
        MoeQuantizationConfig(**options)
