"""Whether a merged model says what the live adapter says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from ...loading import load_quantized
from ...loading.load import class_of, quantization_of
from ..base_model import BaseModel
from .live import kl_divergence, load_live, next_token_logits, read_windows
from .report import REPORT_NAME, MergeReport, Verification


def verify_merge(
    report: MergeReport, directory: str | Path, text: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> MergeReport:
    """Compares next-token distributions on a text; the result is added to the report and to its file.

    Live adapter and merged model are loaded one after the other.

    Args:
        report: of the merge.
        directory: what it has written.
        text: file of plain text, of which up to 8192 tokens are taken.
        dtype: that both are run in. Default: that of the training.
        device: where.

    Returns:
        The report with `verification`.

    Raises:
        ValueError: the text is too short, or the base can't be loaded as it was trained on.
    """
    base = BaseModel.open(report.base)
    windows = read_windows(text, report.base)
    model = load_live(base, report.adapter, dtype, device)
    dtype = model.dtype
    live = next_token_logits(model, windows)
    with model.disable_adapter():
        of_base = next_token_logits(model, windows)
    del model
    kl_of_base = kl_divergence(live, of_base)
    del of_base
    merged = next_token_logits(_load_merged(Path(directory), dtype, device), windows)
    found = Verification(
        num_tokens=windows.numel(),
        kl=kl_divergence(live, merged),
        equal_argmax=(live.argmax(dim=-1) == merged.argmax(dim=-1)).double().mean().item(),
        kl_of_base=kl_of_base,
    )
    report = replace(report, verification=found)
    Path(directory, REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _load_merged(directory: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    config = BaseModel.open(directory).model.config
    if quantization_of(config) is not None:
        return load_quantized(str(directory), dtype=dtype, device_map=device).eval()
    return class_of(config).from_pretrained(directory, dtype=dtype, device_map=device).eval()
