"""Whether a merged model says what the live adapter says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file

from ...loading import load_quantized
from ..base_model import BaseModel
from .inputs import adapter_digest
from .live import kl_divergence, load_live, logits_of_window, plan_live, read_windows
from .report import REPORT_NAME, MergeReport, Verification


def verify_merge(
    directory: str | Path, text: str | Path, dtype: torch.dtype | None = None, device: str = "cpu"
) -> MergeReport:
    """Compares what a merged checkpoint and the live adapter say on a text.

    The two are loaded one after the other; what the first makes of the text lies on the disk meanwhile.

    Args:
        directory: of a merged checkpoint, whose report names base and adapter; the result is added to it.
        text: file of plain text, of which up to 8192 tokens are taken.
        dtype: that both are run in. Default: that of the training.
        device: where.

    Returns:
        The report with `verification`.

    Raises:
        ValueError: there is no report, what it names is gone or another, the text is too short, or the base can't be
            loaded as it was trained on.
    """
    report = MergeReport.read(Path(directory))
    if report is None:
        raise ValueError(
            f"{directory} has no {REPORT_NAME}; a checkpoint that was merged by this package was expected."
        )
    for place in (report.base, report.adapter):
        if not Path(place).is_dir():
            raise ValueError(f"{place}, of which {directory} was merged, is gone. Put it there again.")
    if adapter_digest(Path(report.adapter)) != report.adapter_sha256:
        raise ValueError(
            f"{report.adapter} is another adapter now than the one that was merged into {directory}. Merge it, or put "
            "the other one there again."
        )
    windows = read_windows(text, report.base)
    model = load_live(plan_live(report.base, report.adapter, dtype), device)
    dtype = model.dtype
    kl_of_base, kl, equal = 0.0, 0.0, 0
    with TemporaryDirectory() as live:
        for number, window in enumerate(windows):
            logits = logits_of_window(model, window)
            with model.disable_adapter():
                kl_of_base += kl_divergence(logits, logits_of_window(model, window)) / len(windows)
            save_file({"logits": logits}, Path(live, f"{number}.safetensors"))
        del model
        merged = _load_merged(Path(directory), dtype, device)
        for number, window in enumerate(windows):
            logits, found = load_file(Path(live, f"{number}.safetensors"))["logits"], logits_of_window(merged, window)
            kl += kl_divergence(logits, found) / len(windows)
            equal += int((logits.argmax(dim=-1) == found.argmax(dim=-1)).sum())
    found = Verification(
        num_tokens=windows.numel(), kl=kl, equal_argmax=equal / windows.numel(), kl_of_base=kl_of_base
    )
    report = replace(report, verification=found)
    Path(directory, REPORT_NAME).write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _load_merged(directory: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    merged = BaseModel.open(directory)
    if merged.quantization is not None:
        return load_quantized(str(directory), dtype=dtype, device_map=device).eval()
    return merged.model_class.from_pretrained(directory, dtype=dtype, device_map=device).eval()
