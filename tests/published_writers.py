"""Checkpoints in the layouts of published quantized models, with known exact weights.

Written in fp64 from the definitions of the formats, without code of the package. Readers must decode to these values.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from checkpoint_writers import Tensors, read_tensors, write_tensors
from tiny_models import tiny_model

SIZES = {"hidden_size": 256, "head_dim": 64, "num_experts": 4, "moe_intermediate_size": 192}
"""A width of one and a half blocks of 128."""
GATE = "model.layers.1.mlp.experts.2.gate_proj"
QUERY = "model.layers.1.self_attn.q_proj"

E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def qwen(**sizes) -> torch.nn.Module:
    return tiny_model(dtype=torch.bfloat16, **{**SIZES, **sizes})


def e4m3_values(codes: torch.Tensor) -> torch.Tensor:
    """fp64: one sign bit, four of exponent (bias 7), three of mantissa."""
    bits = codes.view(torch.uint8).long()
    exponent, mantissa = bits >> 3 & 15, bits & 7
    sizes = torch.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10).double(), mantissa * 2.0**-9)
    return torch.where(bits > 127, -sizes, sizes)


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    """fp64, twice as many columns: the low half of a byte comes first."""
    bits = codes.view(torch.uint8).long()
    both = torch.stack((bits & 15, bits >> 4), dim=-1).flatten(-2)
    return torch.where(both > 7, -1.0, 1.0) * _E2M1[both & 7]


def spread(scales: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    """Expands one scale per block to one per weight."""
    rows, columns = (torch.arange(size) // of_block for size, of_block in zip(shape, block))
    return scales.double()[rows][:, columns]


def amax(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    rows = [part.abs() for part in weight.split(block[0])]
    return torch.stack([torch.stack([part.max() for part in one.split(block[1], dim=1)]) for one in rows])


def in_fp8(
    weight: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, scales, and the exact weights, in fp32."""
    scales = amax(weight.double(), block) / 448
    if scale_dtype == torch.uint8:
        bits = torch.ceil(torch.log2(scales)) + 127
        stored, scales = bits.to(torch.uint8), 2.0 ** (bits - 127)
    else:
        stored = scales.to(scale_dtype)
        scales = stored.double()
    of_weights = spread(scales, weight.shape, block)
    codes = (weight.double() / of_weights).clamp(-448, 448).float().to(E4M3)
    return codes, stored, (e4m3_values(codes) * of_weights).float()


def in_mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes `(out, in / 2)`, scales as bytes `(out, in / 32)`, and the exact weights."""
    exponent = torch.floor(torch.log2(amax(weight.double(), (1, 32)))) - 2
    of_weights = spread(2.0**exponent, weight.shape, (1, 32))
    ratios = weight.double() / of_weights
    near = (ratios.abs()[..., None] - _E2M1).abs().argmin(dim=-1) | (ratios < 0).long() << 3
    codes = (near[:, ::2] | near[:, 1::2] << 4).to(torch.uint8)
    return codes, (exponent + 127).to(torch.uint8), (e2m1_values(codes) * of_weights).float()


def in_nvfp4(weight: torch.Tensor, is_inverse: bool) -> tuple[torch.Tensor, ...]:
    """Codes `(out, in / 2)`, scales `(out, in / 16)`, the second-level scale, and the exact weights.

    The product of both scales is rounded to fp32, as in engines.
    """
    sizes = amax(weight.double(), (1, 16))
    whole = (sizes.max() / (6 * 448)).float()
    whole = (1 / whole) if is_inverse else whole
    factor = 1 / whole.double() if is_inverse else whole.double()
    scales = (sizes / 6 / factor).clamp(max=448).float().to(E4M3)
    both = (e4m3_values(scales) / whole.double() if is_inverse else e4m3_values(scales) * whole.double()).float()
    of_weights = spread(both, weight.shape, (1, 16))
    near = (weight.double() / of_weights).abs()[..., None].sub(_E2M1).abs().argmin(dim=-1) | (weight < 0).long() << 3
    codes = (near[:, ::2] | near[:, 1::2] << 4).to(torch.uint8)
    return codes, scales, whole, (e2m1_values(codes) * of_weights).float()


def in_integers(
    weight: torch.Tensor, num_bits: int, block: tuple[int, int], scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes over the whole range of the bits, as in compressed-tensors, scales, and the exact weights."""
    scales = (amax(weight.double(), block) / (2 ** (num_bits - 1) - 0.5)).to(scale_dtype)
    of_weights = spread(scales, weight.shape, block)
    codes = (weight.double() / of_weights).round().clamp(-(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1)
    return codes.to(torch.int8), scales, (codes * of_weights).float()


Packed = tuple[Tensors, torch.Tensor]
"""The packed tensors of a weight, by key, and its exact weights."""


def fp8(name: str, weight: torch.Tensor, block=(128, 128), dtype=torch.float32, suffix="weight_scale_inv") -> Packed:
    codes, scales, values = in_fp8(weight, block, dtype)
    return {f"{name}.weight": codes, f"{name}.{suffix}": scales}, values


def _per_tensor(name: str, weight: torch.Tensor) -> Packed:
    codes, scales, values = in_fp8(weight, tuple(weight.shape))
    of_inputs = {f"{name}.activation_scale": torch.tensor(0.01)}
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales.view(()), **of_inputs}, values


def _per_channel(name: str, weight: torch.Tensor) -> Packed:
    return fp8(name, weight, (1, weight.shape[1]), torch.bfloat16, "weight_scale")


def _ct_tensor(name: str, weight: torch.Tensor) -> Packed:
    codes, scales, values = in_fp8(weight, tuple(weight.shape))
    tensors = {f"{name}.weight": codes, f"{name}.weight_scale": scales.view(1), f"{name}.input_scale": torch.ones(1)}
    return tensors, values


def _e8m0(name: str, weight: torch.Tensor) -> Packed:
    codes, scales, values = in_fp8(weight, (128, 128), torch.uint8)
    return {f"{name}.weight": codes, f"{name}.scale": scales.view(E8M0)}, values


def _dsv4(name: str, weight: torch.Tensor) -> Packed:
    if ".experts." not in name:
        return _e8m0(name, weight)
    codes, scales, values = in_mxfp4(weight)
    return {f"{name}.weight": codes.view(torch.int8), f"{name}.scale": scales.view(E8M0)}, values


def _ct_mxfp4(name: str, weight: torch.Tensor) -> Packed:
    codes, scales, values = in_mxfp4(weight)
    return {f"{name}.weight_packed": codes, f"{name}.weight_scale": scales}, values


def _ct_nvfp4(name: str, weight: torch.Tensor) -> Packed:
    codes, scales, whole, values = in_nvfp4(weight, True)
    tensors = {"weight_packed": codes, "weight_scale": scales, "weight_global_scale": whole.view(1)}
    tensors["input_global_scale"] = torch.tensor([100.0])
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, values


def _modelopt(name: str, weight: torch.Tensor) -> Packed:
    codes, scales, whole, values = in_nvfp4(weight, False)
    tensors = {"weight": codes, "weight_scale": scales, "weight_scale_2": whole, "input_scale": torch.tensor(0.01)}
    return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, values


def _ct_int8(block: tuple[int, int] | None, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Packed]:
    def pack(name: str, weight: torch.Tensor) -> Packed:
        codes, scales, values = in_integers(weight, 8, block or tuple(weight.shape), dtype)
        tensors = {f"{name}.weight": codes, f"{name}.weight_scale": scales if block else scales.view(1)}
        return tensors, values

    return pack


def _int8_channel(name: str, weight: torch.Tensor) -> Packed:
    tensors, values = _ct_int8((1, weight.shape[1]))(name, weight)
    return {**tensors, f"{name}.input_scale": torch.ones(1)}, values


def _packed_integers(num_bits: int, group: int, dtype: torch.dtype = torch.bfloat16) -> Callable[..., Packed]:
    """The first column in the lowest bits of 32; half of the range is added."""

    def pack(name: str, weight: torch.Tensor) -> Packed:
        codes, scales, values = in_integers(weight, num_bits, (1, group or weight.shape[1]), dtype)
        unsigned = (codes.long() + 2 ** (num_bits - 1)).unflatten(1, (-1, 32 // num_bits))
        words = (unsigned << torch.arange(0, 32, num_bits)).sum(dim=-1)
        packed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
        shape = torch.tensor(weight.shape, dtype=torch.int64 if group else torch.int32)
        tensors = {"weight_packed": packed, "weight_scale": scales, "weight_shape": shape}
        return {f"{name}.{part}": tensor for part, tensor in tensors.items()}, values

    return pack


def _int4_beside_fp8(name: str, weight: torch.Tensor) -> Packed:
    return _packed_integers(4, 32)(name, weight) if ".experts." in name else _per_channel(name, weight)


def _compressed(layout: str, **weights) -> dict:
    weights = {"type": "float", "num_bits": 8, "symmetric": True, "dynamic": False, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {"quant_method": "compressed-tensors", "format": layout, "config_groups": groups, "ignore": ["lm_head"]}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
STATIC = {**FP8, "activation_scheme": "static", "weight_block_size": None}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "model.layers.*.mlp.gate"]}
MX = {**FP8, "quant_method": "mxfp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0"}


def _mixed(*configs: dict) -> dict:
    """Groups in several layouts, each with its own config."""
    groups = [{**config["config_groups"]["group_0"], "format": config["format"]} for config in configs]
    return {
        **configs[0],
        "format": "mixed-precision",
        "config_groups": {f"group_{n}": g for n, g in enumerate(groups)},
    }


_MIXED = _mixed(
    _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32),
    _compressed("float-quantized", strategy="channel"),
)


@dataclass(frozen=True)
class Published:
    """A layout with one set of tensors per expert.

    Args:
        config: the `quantization_config`.
        pack: name without `.weight` and weight -> its tensors.
        experts, linear: names of the formats that they are read as.
        turn: bits in which a byte of codes differs from the loaded code.
    """

    config: dict
    pack: Callable[[str, torch.Tensor], Packed]
    experts: str
    linear: str = field(default="")
    turn: int = 0


PER_EXPERT = {
    "fp8": Published(FP8, fp8, "fp8/128x128"),
    "fp8, bf16 scales": Published(
        FP8, lambda n, w: fp8(n, w, dtype=torch.bfloat16), "fp8/128x128+bf16", "fp8/128x128+bf16"
    ),
    "fp8, fp16 scales, blocks of 64 x 32": Published(
        {**FP8, "weight_block_size": [64, 32]}, lambda n, w: fp8(n, w, (64, 32), torch.float16), "fp8/64x32+fp16"
    ),
    "fp8, powers of two": Published({**FP8, "scale_fmt": "ue8m0"}, _e8m0, "fp8/128x128+e8m0"),
    "fp8 per tensor": Published(STATIC, _per_tensor, "fp8/tensor"),
    "mxfp8": Published(MX, lambda n, w: fp8(n, w, (1, 32), torch.uint8), "fp8/1x32+e8m0"),
    "compressed, channel": Published(
        _compressed("float-quantized", strategy="channel"), _per_channel, "fp8/channel+bf16"
    ),
    "compressed, tensor": Published(_compressed("float-quantized", strategy="tensor"), _ct_tensor, "fp8/tensor"),
    "compressed, block": Published(
        _compressed("float-quantized", strategy="block", block_structure=[128, 128]),
        lambda n, w: fp8(n, w, suffix="weight_scale"),
        "fp8/128x128",
    ),
    "mxfp4 experts beside fp8": Published(
        {**FP8, "scale_fmt": "ue8m0", "expert_dtype": "fp4"}, _dsv4, "mxfp4", "fp8/128x128+e8m0"
    ),
    "compressed, mxfp4": Published(
        _compressed("mxfp4-pack-quantized", num_bits=4, strategy="group", group_size=32), _ct_mxfp4, "mxfp4"
    ),
    "int8": Published(
        _compressed("int-quantized", type="int", strategy="channel"), _int8_channel, "int8/channel+bf16"
    ),
    "int8 per tensor": Published(
        _compressed("int-quantized", type="int", strategy="tensor"), _ct_int8(None, torch.float32), "int8/tensor"
    ),
    "int8 in groups": Published(
        _compressed("int-quantized", type="int", strategy="group", group_size=64),
        _ct_int8((1, 64), torch.float16),
        "int8/1x64+fp16",
    ),
    "nvfp4": Published(MODELOPT, _modelopt, "nvfp4"),
    "compressed, nvfp4": Published(
        _compressed("nvfp4-pack-quantized", num_bits=4, strategy="tensor_group", group_size=16),
        _ct_nvfp4,
        "nvfp4/inverse",
    ),
    "int4": Published(
        _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=32),
        _packed_integers(4, 32),
        "int4/32+bf16",
    ),
    "int4 in groups of 64, fp16 scales": Published(
        _compressed("pack-quantized", type="int", num_bits=4, strategy="group", group_size=64, actorder="weight"),
        _packed_integers(4, 64, torch.float16),
        "int4/64+fp16",
    ),
    "int4 per channel": Published(
        _compressed("pack-quantized", type="int", num_bits=4, strategy="channel"),
        _packed_integers(4, 0, torch.float32),
        "int4/channel",
    ),
    "int8, packed": Published(
        _compressed("pack-quantized", type="int", strategy="channel"),
        _packed_integers(8, 0),
        "int8/channel+bf16",
        turn=128,
    ),
    "int4 experts beside fp8": Published(_MIXED, _int4_beside_fp8, "int4/32+bf16", "fp8/channel+bf16"),
    "int8 in blocks": Published(
        _compressed("int-quantized", type="int", strategy="block", block_structure=[128, 128]),
        _ct_int8((128, 128)),
        "int8/128x128+bf16",
    ),
}


def is_packed(key: str) -> bool:
    return re.search(r"(_proj|\.w[123])\.weight$", key) is not None


def set_config(directory: Path, config: dict) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))


def publish(
    model: torch.nn.Module,
    directory: Path,
    layout: Published,
    num_shards: int = 1,
    is_packed: Callable[[str], bool] = is_packed,
) -> Tensors:
    """Saves a model with quantized experts and linear layers; returns the exact weights by their 16-bit keys."""
    model.save_pretrained(directory)
    stored, true = {}, {}
    for key, tensor in cut(read_tensors(directory)).items():
        if is_packed(key):
            tensors, true[key] = layout.pack(key.removesuffix(".weight"), tensor.float())
            stored |= tensors
        else:
            stored[key] = true[key] = tensor
    write_tensors(directory, stored, num_shards)
    set_config(directory, layout.config)
    return true


def cut(tensors: Tensors) -> Tensors:
    """Splits stacks into one weight `(out, in)` for each expert and projection; those of Llama 4 are `(in, out)`."""
    found = {}
    for key, tensor in tensors.items():
        path, _, name = key.rpartition(".")
        if not path.endswith("experts") or tensor.dim() != 3:
            found[key] = tensor
            continue
        names = ("gate_proj", "up_proj") if name == "gate_up_proj" else (name,)
        for expert, weight in enumerate(tensor):
            weight = weight.T if "feed_forward" in path else weight
            parts = zip(names, weight.chunk(len(names)))
            found |= {f"{path}.{expert}.{part}.weight": one.contiguous() for part, one in parts}
    return found


def joined(tensors: Tensors) -> Tensors:
    """The inverse of `cut`."""
    found, experts = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)_proj\.weight", key)
        if match is None:
            found[key] = tensor
        else:
            name = "down_proj" if match[3] == "down" else "gate_up_proj"
            experts.setdefault(f"{match[1]}.{name}", {}).setdefault(int(match[2]), []).append(tensor)
    for key, parts in experts.items():
        stack = torch.stack([torch.cat(parts[expert]) for expert in sorted(parts)])
        found[key] = stack.transpose(1, 2) if "feed_forward" in key else stack
    return found


def publish_fused(
    model: torch.nn.Module, directory: Path, config: dict, pack: Callable[[str, torch.Tensor], Packed]
) -> Tensors:
    """The same for stacks stored as one tensor, under the model's names; returns the exact state of the model."""
    model.save_pretrained(directory, save_original_format=False)
    stored, true = {}, {}
    for key, tensor in read_tensors(directory).items():
        if re.search(r"experts\.(gate_up_proj|down_proj)$", key):
            tensors, true[key] = pack(key, tensor.float())
            stored |= tensors
        else:
            stored[key] = true[key] = tensor
    write_tensors(directory, stored)
    set_config(directory, config)
    return true


def fused_fp8(block: tuple[int, int] | None, scales_of_gate_up: int = 1) -> Callable[[str, torch.Tensor], Packed]:
    """Stacks `(E, out, in)` with block scales for separate gate and up, or per-expert scales: one, or one per half."""

    def pack(key: str, stack: torch.Tensor) -> Packed:
        found = []
        for weight in stack:
            is_cut = key.endswith("gate_up_proj") and (block is not None or scales_of_gate_up == 2)
            parts = weight.chunk(2) if is_cut else (weight,)
            one = [in_fp8(part, block or tuple(part.shape)) for part in parts]
            found.append([torch.cat(tensors) for tensors in zip(*one)])
        codes, scales, values = (torch.stack(tensors) for tensors in zip(*found))
        return {key: codes, f"{key}_scale_inv": scales, f"{key}_activation_scale": torch.ones(len(stack))}, values

    return pack


def gpt_oss(key: str, stack: torch.Tensor) -> Packed:
    """`(E, in, out)` in the class, `(E, out, in)` in the file, blocks along the inputs."""
    found = [in_mxfp4(weight.T.contiguous()) for weight in stack]
    codes, scales, values = (torch.stack(tensors) for tensors in zip(*found))
    tensors = {f"{key}_blocks": codes.unflatten(-1, (-1, 16)), f"{key}_scales": scales}
    return tensors, values.transpose(1, 2).contiguous()
