"""Layers that LoRA can't train although they look like any other: which, by class, and why."""

from __future__ import annotations

from torch import nn

BYPASSED = "its module reads the weight without calling the layer, so that LoRA on it has no effect"
SELECTS = "it only scores what attention selects, so that LoRA on it gets no gradient"
GROUPED = "it has a weight for each group of features, so that the shape of LoRA's result doesn't fit"

_INDEXER = ("wq_b", "wk", "weights_proj")

UNADAPTABLE = {
    # out_proj in training on a GPU only, dt_proj where linear layers are in 16 bits
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
"""Reason -> class that has the layers -> their names in it."""


def why_unadaptable(path: str, model: nn.Module) -> str | None:
    """Why LoRA can't train the layer at a path, None where it can."""
    parent, _, name = path.rpartition(".")
    classes = {cls.__name__ for cls in type(model.get_submodule(parent)).__mro__}
    for reason, layers in UNADAPTABLE.items():
        if any(name in layers.get(cls, ()) for cls in classes):
            return reason
    return None


def check_adaptable(paths: list[str], model: nn.Module, is_read: bool = False) -> None:
    """Refuses layers that LoRA can't train.

    Args:
        paths: of the layers that are to be adapted.
        model: that has them.
        is_read: whether the adapter comes from a file. What selects is taken then: it has its effect, and was trained
            in some other way, or not at all.

    Raises:
        ValueError: names the first, the reason, and what excludes all of them.
    """
    reasons = {path: reason for path in paths if (reason := why_unadaptable(path, model))}
    if is_read:
        reasons = {path: reason for path, reason in reasons.items() if reason != SELECTS}
    if reasons:
        path, reason = next(iter(reasons.items()))
        names = sorted({".".join(path.split(".")[-2:]) for path in reasons})
        raise ValueError(
            f"target_modules reaches {path}, which LoRA can't train: {reason}. Leave it out of target_modules, or "
            f"exclude it with exclude_modules={names}."
        )
