"""The page docs/models.md, generated from the models that test_every_type.py trains and merges.

`python tests/model_table.py` writes it. Requires transformers 5.24, which has all of them.
"""

from __future__ import annotations

from pathlib import Path

from shrunken_models import MODEL_TYPES, shrunken_model
from test_every_type import TIED

from peft_moe_qlora.experts import ALWAYS_ON_CLASSES, UNSUPPORTED_CLASSES, ExpertsLayout, find_experts, read_layout

PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def layout_in_words(layout: ExpertsLayout) -> str:
    """The properties of a class's layout, in the terms of its declaration."""
    words = ["`(E, in, out)`" if layout.is_transposed else "`(E, out, in)`"]
    if not layout.has_gate:
        words.append("no gate")
    elif not layout.is_concatenated:
        words.append("gate and up interleaved")
    if layout.has_bias:
        words.append("biases")
    if layout.has_post_expert_norm:
        words.append("a norm after the experts")
    return ", ".join(words)


def row(model_type: str) -> str:
    model = shrunken_model(model_type, "meta")
    layouts = [read_layout(module, path) for path, module in find_experts(model)]
    classes = ", ".join(f"`{name}`" for name in dict.fromkeys(layout.class_name for layout in layouts))
    words = "; ".join(dict.fromkeys(map(layout_in_words, layouts)))
    merge = "experts only, in memory into 16 bits" if model_type in TIED else "yes"
    return f"| `{model_type}` | `{type(model).__name__}` | {classes} | {words} | yes | {merge} |"


def documentation() -> str:
    """The text of the page."""
    refused = [
        f"| `{name}` | {reason} |"
        for name, reason in sorted(UNSUPPORTED_CLASSES.items())
        if name not in ALWAYS_ON_CLASSES
    ]
    lines = [
        "# Models",
        "",
        "Written by `python tests/model_table.py` with transformers 5.24. `tests/test_every_type.py` builds a small",
        'model of each type, adapts it with `target_modules="all-linear"`, and checks that every factor gets a',
        "gradient and is updated, and that the merged model gives the same outputs as the adapted model.",
        "",
        "Every class that declares its layout with transformers' `@use_experts_implementation` is supported, custom",
        "classes included. Llama 4 has no such declaration; this package describes its layout. Layouts are never",
        "inferred from shapes.",
        "",
        "| `model_type` | model | experts class | layout | train | merge |",
        "|--|--|--|--|--|--|",
        *map(row, sorted(MODEL_TYPES)),
        "",
        "## Not supported",
        "",
        "These classes are rejected by name:",
        "",
        "| experts class | reason |",
        "|--|--|",
        *refused,
        "",
        f"{', '.join(f'`{name}`' for name in sorted(ALWAYS_ON_CLASSES))} is not routed. It stays in 16 bits",
        "without an adapter; the routed experts of the same model are adapted.",
        "",
        "## Layers that LoRA cannot train",
        "",
        'Some layers look like linear layers, but LoRA on them has no effect or no gradient. `"all-linear"` leaves',
        "them out; naming one is an error. They are the indexers of sparse attention, Jamba's `dt_proj`, the Mamba",
        "`out_proj` of NemotronH and Granite, DeepSeek-V4's `o_a_proj`, and convolutions whose weights kernels read",
        "directly. [unadaptable.py](../peft_moe_qlora/unadaptable.py) lists them with the reasons.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(documentation(), encoding="utf-8")
