"""The page docs/optimizers.md, generated from the optimizers that test_optimizers.py runs on factors of experts.

`python tests/optimizer_table.py` writes it, up to the section on times, which is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

PAGE = Path(__file__).parent.parent / "docs" / "optimizers.md"
END = "<!-- what follows is not written by tests/optimizer_table.py -->"
FACTORS = 643e6
"""The number of trained values of Qwen3-30B-A3B with LoRA rank 16 on attention and experts."""

SAME = "same as for matrices"
ONE_CLIP = "same except for clipping"
ONE_RATIO = "one trust ratio per stack"
REFUSED = "rejected"
BLOCKS = "one scale per 256 values; blocks may span two experts. Tensors below 4,096 values stay in fp32"
PAGED = "the state of tensors of at least 100,000 values is paged to CPU memory when the GPU is full"
COMPILED = "compiles its step once per shape"
CLIP = (
    "factored second moments per expert; the update is clipped by its RMS over the whole stack, including experts "
    "without tokens"
)


@dataclass(frozen=True)
class Known:
    """An optimizer.

    Args:
        title: its name in the table.
        optim: of `TrainingArguments`; None if Trainer has no name for it.
        path: module and name of the class.
        options: of the class.
        state_bytes: bytes of state for each trained fp32 value, at rank 16 and 2,048 columns, to two decimals.
        stacks: how it handles 3-D factors.
        notes: for the table.
    """

    title: str
    optim: str | None
    path: str
    state_bytes: float
    options: tuple[tuple[str, Any], ...] = ()
    stacks: str = SAME
    notes: str = ""

    def make(self, parameters: Iterable[torch.nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """Raises ModuleNotFoundError if the package isn't installed."""
        module, _, name = self.path.rpartition(".")
        make: Callable[..., torch.optim.Optimizer] = getattr(import_module(module), name)
        optimizer = make(list(parameters), lr=1e-2, **{**dict(self.options), **options})
        if hasattr(optimizer, "train"):  # schedule-free optimizers
            optimizer.train()
        return optimizer


TORCH, BITSANDBYTES, TORCHAO = "torch.optim", "bitsandbytes.optim", "torchao.optim"
KNOWN = (
    Known("AdamW", "adamw_torch_fused", f"{TORCH}.AdamW", 8.0, (("fused", True),), notes="default of a Trainer"),
    Known("AdamW, foreach", "adamw_torch", f"{TORCH}.AdamW", 8.0, (("foreach", True),)),
    Known("AdamW in 8 bits", "adamw_8bit", f"{BITSANDBYTES}.AdamW8bit", 2.03, notes=BLOCKS),
    Known("AdamW in 8 bits, paged", "paged_adamw_8bit", f"{BITSANDBYTES}.PagedAdamW8bit", 2.03, notes=PAGED),
    Known("AdamW, paged", "paged_adamw_32bit", f"{BITSANDBYTES}.PagedAdamW32bit", 8.0, notes=PAGED),
    Known("AdamW in 8 bits, torchao", "adamw_torch_8bit", f"{TORCHAO}.AdamW8bit", 2.03, notes=COMPILED),
    Known("AdamW in 4 bits, torchao", "adamw_torch_4bit", f"{TORCHAO}.AdamW4bit", 1.06, notes=COMPILED),
    Known("AdamW in FP8, torchao", None, f"{TORCHAO}.AdamWFp8", 2.03, notes=COMPILED),
    Known(
        "Adafactor",
        "adafactor",
        "transformers.optimization.Adafactor",
        0.25,
        (("scale_parameter", False), ("relative_step", False)),
        ONE_CLIP,
        f"{CLIP}. `4 / rows + 4 / columns` bytes",
    ),
    Known("Adafactor, torch", None, f"{TORCH}.Adafactor", 0.25, (), ONE_CLIP, CLIP),
    Known("Lion", "lion_32bit", f"{BITSANDBYTES}.Lion", 4.0),
    Known("Lion in 8 bits", "lion_8bit", f"{BITSANDBYTES}.Lion8bit", 1.02, notes="as AdamW in 8 bits"),
    Known("Lion in 8 bits, paged", "paged_lion_8bit", f"{BITSANDBYTES}.PagedLion8bit", 1.02, notes=PAGED),
    Known("AdEMAMix", "ademamix", f"{BITSANDBYTES}.AdEMAMix", 12.0),
    Known("AdEMAMix in 8 bits", "ademamix_8bit", f"{BITSANDBYTES}.AdEMAMix8bit", 3.05, notes="as AdamW in 8 bits"),
    Known(
        "AdamW, schedule-free",
        "schedule_free_adamw",
        "schedulefree.AdamWScheduleFree",
        8.0,
        notes='with `lr_scheduler_type="constant"`',
    ),
    Known("SGD", "sgd", f"{TORCH}.SGD", 0.0, notes="4 bytes with momentum"),
    Known("RMSprop", "rmsprop", f"{TORCH}.RMSprop", 4.0),
    Known("RMSprop in 8 bits", "rmsprop_bnb_8bit", f"{BITSANDBYTES}.RMSprop8bit", 1.02, notes="as AdamW in 8 bits"),
    Known("Adagrad", "adagrad", f"{TORCH}.Adagrad", 4.0),
    Known("LAMB", None, f"{BITSANDBYTES}.LAMB", 8.0, (), ONE_RATIO, "one step size for all experts of a stack"),
    Known(
        "LARS",
        None,
        f"{BITSANDBYTES}.LARS",
        4.0,
        (("momentum", 0.9),),
        ONE_RATIO,
        "one step size for all experts of a stack",
    ),
)

OTHERS = (
    (
        "LoRA+",
        "`peft.optimizers.create_loraplus_optimizer`",
        "as its `optimizer_cls`",
        SAME,
        "learning rates by factor name, experts included",
    ),
    (
        "GaLore, APOLLO",
        '`optim="galore_adamw"`, `"apollo_adamw"` with `optim_target_modules`',
        "8.00 for experts",
        SAME,
        "a Trainer projects linear layers only; factors of experts use plain AdamW",
    ),
    (
        "GaLore, APOLLO used directly",
        "factors of experts in a parameter group with `rank`",
        "",
        REFUSED,
        "at the first step, by name",
    ),
    ("Muon", "`torch.optim.Muon`", "", REFUSED, "by torch: matrices only"),
    ("LoRA-FA", "`peft.optimizers.create_lorafa_optimizer`", "", REFUSED, "at the first step, by name"),
    ("Riemannian", "`peft.optimizers.create_riemannian_optimizer`", "", REFUSED, "at the first step, by name"),
)


def documentation() -> str:
    """The text of the page up to the section on times."""
    lines = [
        "# Optimizers",
        "",
        "Generated by `python tests/optimizer_table.py`; `tests/test_optimizers.py` tests every row.",
        "",
        "Factors of experts are stacks: A is `(E, r, in)`, B is `(E, out, r)`. *Same as for matrices*: a step on a",
        "stack is bit-identical to steps on its E matrices. Optimizers that project or precondition matrices are",
        "rejected before they change anything.",
        "",
        "*Bytes*: optimizer state per trainable fp32 parameter, in addition to 4 for the parameter and 4 for its",
        f"gradient. *GiB*: state of {FACTORS / 1e6:.0f} M trainable parameters, those of Qwen3-30B-A3B with r 16 on",
        "attention and all experts. TRL casts the trainable parameters of quantized models to bf16. This halves the",
        "state of torch's optimizers, and loses every update below 1/256 of a value.",
        "",
        "| optimizer | `TrainingArguments(optim=...)`, or class | bytes | GiB | 3-D factors | |",
        "|--|--|--|--|--|--|",
    ]
    for known in KNOWN:
        name = f'`"{known.optim}"`' if known.optim else f"`{known.path}`"
        size = known.state_bytes * FACTORS / 2**30
        lines.append(
            f"| {known.title} | {name} | {known.state_bytes:.2f} | {size:.2f} | {known.stacks} | {known.notes} |"
        )
    lines += [f"| {title} | {name} | {size} | | {stacks} | {notes} |" for title, name, size, stacks, notes in OTHERS]
    lines += [
        "",
        "As for all parameters with zero gradient, AdamW and similar optimizers still update experts without tokens,",
        "by momentum and weight decay. Not compared: LOMO and AdaLOMO, StableAdamW, GrokAdamW, layer-wise variants.",
        "",
        END,
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    rest = PAGE.read_text(encoding="utf-8").partition(f"{END}\n")[2] if PAGE.exists() else ""
    PAGE.write_text(documentation() + rest, encoding="utf-8")
