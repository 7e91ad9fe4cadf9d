"""Compares a merged checkpoint with the unmerged adapter on a text."""

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
    """Compares the next-token distributions of a merged checkpoint and the unmerged adapter on a text.

    The two models are loaded one after the other. The head of the first and its inputs, `(tokens, hidden size)`, stay
    in memory; logits are computed for one window of 512 tokens at a time.

    Args:
        directory: directory of a merged checkpoint. Its report names base and adapter; the result is added to it.
        text: plain text file, of which up to 8192 tokens are used.
        dtype: dtype of both models. Default: that of the training.
        device: device of both models.
        progressbar: whether to show a progress bar.

    Returns:
        The report with `verification`.

    Raises:
        ValueError: there is no directory or no report, base or adapter no longer exist or have changed, the text is
            too short, the base cannot be loaded as in training, or its class does not compute logits with its output
            embeddings.
    """
    if not Path(directory).is_dir():
        raise ValueError(f"{directory} is not a directory. Expected a checkpoint that was merged by this package.")
    report = MergeReport.read(Path(directory))
    if report is None:
        raise ValueError(
            f"{directory} contains no {REPORT_NAME}. Expected a checkpoint that was merged by this package."
        )
    for place in (report.base, report.adapter):
        if not Path(place).is_dir():
            raise ValueError(
                f"{place} does not exist, but the report in {directory} names it as an input of the merge. Restore it."
            )
    if adapter_digest(Path(report.adapter)) != report.adapter_sha256:
        raise ValueError(
            f"{report.adapter} has changed since it was merged into {directory}. Merge the new adapter, or restore "
            "the old one."
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
    """The output embeddings, which compute logits from hidden states, without the model's postprocessing of logits.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(model).__name__} has no output embeddings (get_output_embeddings), so its logits cannot be "
            "compared. Compare the two models without verify_merge."
        )
    return head


def _logits_and_hidden(model: nn.Module, window: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_of_window`, and the inputs of the head, `(1, L, hidden size)` on the CPU."""
    given = []
    handle = _head(model).register_forward_pre_hook(lambda _, args: given.append(args[0].cpu()))
    try:
        logits = logits_of_window(model, window)
    finally:
        handle.remove()
    if [one.shape[:2] for one in given] != [logits.shape[:2]]:
        raise ValueError(
            f"{type(model).__name__} does not compute the logits of all tokens with one call of its output "
            "embeddings, so they cannot be compared. Compare the two models without verify_merge."
        )
    return logits, given[0]


def _logits_of_both(
    model: nn.Module, window: torch.Tensor, other_head: nn.Module, hidden: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`logits_of_window`, and the logits of another model of the same class, given its hidden states and its head.

    The second are concatenated after the head, so the model applies its postprocessing of logits to both.
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
