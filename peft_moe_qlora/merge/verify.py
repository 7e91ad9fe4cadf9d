"""Whether a merged model says what the live adapter says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ..layouts.base_model import BaseModel
from ..loading import load_quantized
from .inputs import adapter_digest
from .partial_directory import write_json
from .report import REPORT_NAME, MergeReport, Verification
from .unmerged import kl_divergence, load_unmerged, logits_of_window, plan_unmerged, read_windows


def verify_merge(
    directory: str | Path,
    text: str | Path,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    progressbar: bool = True,
) -> MergeReport:
    """Compares the next-token distributions of a merged checkpoint and the live adapter on a text.

    The two models are loaded one after the other. The head of the first and its inputs, `(tokens, hidden size)`, stay
    in memory; logits are computed for one window of 512 tokens at a time.

    Args:
        directory: of a merged checkpoint, whose report names base and adapter; the result is added to it.
        text: file of plain text, of which up to 8192 tokens are taken.
        dtype: that both are run in. Default: that of the training.
        device: where.
        progressbar: show one.

    Returns:
        The report with `verification`.

    Raises:
        ValueError: there is no report, what it names is gone or another, the text is too short, the base can't be
            loaded as it was trained on, or its class makes logits in an unusual way.
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
    model = load_unmerged(plan_unmerged(report.base, report.adapter, dtype), device)
    dtype = model.dtype
    kl_of_base, kl, equal = 0.0, 0.0, 0
    with tqdm(total=2 * len(windows), desc="Verifying", unit="window", disable=not progressbar) as bar:
        hidden = []
        for window in windows:
            logits, of_window = _logits_and_hidden(model, window)
            hidden.append(of_window)
            with model.disable_adapter():
                kl_of_base += kl_divergence(logits, logits_of_window(model, window)) / len(windows)
            bar.update()
        head = _head(model)
        del model
        merged = _load_merged(Path(directory), dtype, device)
        for window, of_window in zip(windows, hidden):
            found, logits = _logits_of_both(merged, window, head, of_window)
            kl += kl_divergence(logits, found) / len(windows)
            equal += int((logits.argmax(dim=-1) == found.argmax(dim=-1)).sum())
            bar.update()
    found = Verification(
        num_tokens=windows.numel(), kl=kl, equal_argmax=equal / windows.numel(), kl_of_base=kl_of_base
    )
    report = replace(report, verification=found)
    write_json(Path(directory, REPORT_NAME), report.to_dict())
    return report


def _head(model: nn.Module) -> nn.Module:
    """What makes logits of hidden states, but for what the model does to logits afterwards.

    Raises:
        ValueError: the model doesn't say.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} doesn't say what makes its logits, so they can't be compared.")
    return head


def _logits_and_hidden(model: nn.Module, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_of_window`, and on the CPU what the head was given for them, `(1, L, hidden size)`."""
    given = []
    handle = _head(model).register_forward_pre_hook(lambda _, args: given.append(args[0].cpu()))
    try:
        logits = logits_of_window(model, window)
    finally:
        handle.remove()
    if [one.shape[:2] for one in given] != [logits.shape[:2]]:
        raise ValueError(
            f"{type(model).__name__} makes its logits in another way than by its head, of all tokens at once, so they "
            "can't be compared."
        )
    return logits, given[0]


def _logits_of_both(
    model: nn.Module, window: torch.Tensor, other_head: nn.Module, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_of_window`, and those that a model of the same class has made of `hidden` with its head.

    The second go along from the head on, so that the model does to both what it does to logits.
    """

    def join(head: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output, other_head(hidden.to(output.device))])

    handle = _head(model).register_forward_hook(join)
    try:
        own, other = logits_of_window(model, window).split(1)
    finally:
        handle.remove()
    return own, other


def _load_merged(directory: Path, dtype: torch.dtype, device: str) -> nn.Module:
    merged = BaseModel.open(directory)
    how = {"dtype": dtype, "device_map": device, "use_safetensors": True}
    if merged.quantization is not None:
        return load_quantized(str(directory), **how).eval()
    return merged.model_class.from_pretrained(directory, **how).eval()
