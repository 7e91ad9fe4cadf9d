"""Linear layers that LoRA cannot train, by class, with the reasons."""

from __future__ import annotations

from torch import nn

BYPASSED = "its module reads the weight without calling the layer, so LoRA on it has no effect"
SELECTS = "it only selects tokens for attention, so LoRA on it gets no gradient"
GROUPED = "it has one weight for each group of features, so the shape of the LoRA output does not match"

_INDEXER = ("wq_b", "wk", "weights_proj")

UNADAPTABLE = {
    # out_proj only in training on a GPU, dt_proj only with 16-bit linear layers
    BYPASSED: {
        **dict.fromkeys(("GraniteMoeHybridMambaLayer", "NemotronHMamba2Mixer"), ("conv1d", "out_proj")),
        "JambaMambaMixer": ("conv1d", "dt_proj"),
        "Lfm2MoeShortConv": ("conv",),
        **dict.fromkeys(
            (
                "BailingHybridDeltaAttention",
                "Glm5NextTextLinearAttention",
                "Inkling2LoopShortConvolution",
                "Inkling2ShortConvolution",
                "InklingShortConvolution",
                "KimiLinearDeltaAttention",
                "LaraMiniGatedDeltaNet",
                "Qwen3NextGatedDeltaNet",
                "Qwen3_5MoeGatedDeltaNet",
                "Qwen4ExpTextGatedDeltaNet",
            ),
            ("conv1d",),
        ),
    },
    SELECTS: {
        **dict.fromkeys(
            (
                "AXK2Indexer",
                "DeepseekV32Indexer",
                "Dots3NoteTextIndexer",
                "Glm5NextTextIndexer",
                "GlmMoeDsaIndexer",
                "HYV4Indexer",
                "HYV4VLIndexer",
                "MistralLarge4TextIndexer",
            ),
            _INDEXER,
        ),
        "DeepseekV4Indexer": ("q_b_proj", "kv_proj", "gate_proj"),
        "DeepseekV4IndexerScorer": ("weights_proj",),
        "MiniMaxM3VLIndexer": ("q_proj", "k_proj"),
        "Qwen4ExpTextQSAIndexer": ("index_qk_proj",),
    },
    GROUPED: {"DeepseekV4Attention": ("o_a_proj",)},
}
"""Reason -> class that contains the layers -> names of the layers."""


def why_unadaptable(path: str, model: nn.Module) -> str | None:
    """The reason why LoRA cannot train the layer at a path; None if it can."""
    parent, _, name = path.rpartition(".")
    classes = {cls.__name__ for cls in type(model.get_submodule(parent)).__mro__}
    for reason, layers in UNADAPTABLE.items():
        if any(name in layers.get(cls, ()) for cls in classes):
            return reason
    return None


def check_adaptable(paths: list[str], model: nn.Module, is_read: bool = False) -> None:
    """Rejects layers that LoRA cannot train.

    Args:
        paths: paths of the layers to adapt.
        model: the model with the layers.
        is_read: whether the adapter comes from a file. Selecting layers are then accepted: LoRA on them has an effect,
            and may have been trained in another way.

    Raises:
        ValueError: the error names the first layer, the reason, and the exclude_modules for all of them.
    """
    reasons = {path: reason for path in paths if (reason := why_unadaptable(path, model))}
    if is_read:
        reasons = {path: reason for path, reason in reasons.items() if reason != SELECTS}
    if reasons:
        path, reason = next(iter(reasons.items()))
        names = sorted({".".join(path.split(".")[-2:]) for path in reasons})
        raise ValueError(
            f"target_modules matches {path}, which LoRA cannot train: {reason}. Remove it from target_modules, or set "
            f"exclude_modules={names}."
        )
