"""The page docs/formats.md, made of the layouts that the tests write, load, train on and merge back into.

`python tests/format_table.py` writes it. Every layout of `PER_EXPERT` goes through all tests of
`test_published_layouts.py` and `test_merge_published.py`, that of gpt-oss through those of fused stacks.
"""

from __future__ import annotations

from pathlib import Path

from published_writers import PER_EXPERT

from peft_moe_qlora.quantization import parse_format
from peft_moe_qlora.quantization.format import registered_formats

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"

FORMATS = {
    "FourBitFormat": (
        "`nf4/64`, `fp4/64`, `nf4/64+dq`",
        "4 bits of bitsandbytes, in blocks of the flattened matrix; `+dq` stores the scales in 8 bits",
    ),
    "Fp8Format": (
        "`fp8/128x128`, `fp8/channel`, `fp8/tensor`, `fp8/1x32+e8m0`",
        "e4m3 with a scale for each block of rows and columns, row or matrix; the last is MXFP8",
    ),
    "Mxfp4Format": ("`mxfp4`", "e2m1 with a power of two for 32 columns (OCP MX)"),
    "Int8Format": ("`int8/channel`, `int8/1x128`", "whole numbers from -128 to 127"),
    "Int4Format": ("`int4/32`, `int4/128`", "whole numbers from -8 to 7 in groups of columns"),
    "Nvfp4Format": ("`nvfp4`", "e2m1 with an e4m3 scale for 16 columns and an fp32 scale for the matrix"),
}
"""Class -> names, and what it stores. Kinds of scales are written behind: `+bf16`, `+fp16`, `+e8m0`; fp32 isn't."""


def documentation() -> str:
    """The page."""
    missing = {cls.__name__ for cls in registered_formats() if cls.__module__.startswith("peft_moe_qlora")}
    missing -= FORMATS.keys()
    if missing:
        raise ValueError(f"{missing} are registered, but have no row in {Path(__file__).name}.")
    lines = [
        "# Formats",
        "",
        "Written by `python tests/format_table.py`; the tests hold every row.",
        "",
        "## What experts can be stored as",
        "",
        "By `storage=...` of `MoeQLoraConfig`, `quantize_experts` or `MoeQuantizationConfig`. Each is trained on by",
        "the kernels, saved, reloaded and merged into.",
        "",
        "| storage | is |",
        "|--|--|",
        *(f"| {names} | {what} |" for names, what in FORMATS.values()),
        "",
        "## What is read as it is published",
        "",
        "`load_quantized(DIRECTORY)` takes codes and scales over bit for bit, of experts and of linear layers.",
        "*back*: `peft-moe-qlora merge BASE ADAPTER OUT --quantize FORMAT` writes the layout that the base has, and",
        "copies what the adapter doesn't change. *16 bits*: the same without `--quantize`.",
        "",
        "| layout | `quant_method` | experts are | linear layers are | load | train | merge: 16 bits | merge: back |",
        "|--|--|--|--|--|--|--|--|",
    ]
    for name, layout in PER_EXPERT.items():
        linear = parse_format(layout.linear or layout.experts)
        method = layout.config["quant_method"]
        lines.append(
            f"| {name} | `{method}` | `{parse_format(layout.experts)}` | `{linear}` | yes | yes | yes | yes |"
        )
    lines.append("| gpt-oss | `mxfp4` | `mxfp4` | 16 bits | yes | yes | yes | yes |")
    lines += [
        "",
        "Refused by name: e5m2 and e4m3fnuz codes, zero points, activation orders, and other `quant_method`s. Static",
        "scales of inputs are never applied to weights; merging copies them.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(documentation(), encoding="utf-8")
