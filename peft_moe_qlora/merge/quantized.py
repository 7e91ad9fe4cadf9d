"""Merging an adapter into a checkpoint with quantized experts.

The model is loaded as it was in training, because second-order rounding depends on the inputs of the layers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .. import __version__
from ..layouts.adapter_file import AdapterFile
from ..layouts.base_model import BaseModel
from ..layouts.non_expert import TOKENS, adapted_weights, beside_factors, factor_pairs, name_in_model
from ..layouts.read import read_adapter
from ..loading import Checkpoint, save_bitsandbytes
from ..loading.finder import SourceFinder
from ..loading.load import readable_quantization, saved_config
from ..loading.packed_sources import PackedSource
from ..loading.quantization_config import LOADING
from ..loading.quantizer import quantized_stacks
from ..loading.sources import Source, each_source
from ..quantization import Stack, parse_format
from .beside import copy_beside, names_beside
from .calibration import random_token_ids
from .check import take_reference
from .checkpoint import config_for_all
from .edits import check_base, check_not_tied
from .inputs import adapter_digest, checkpoint_directory, digests_merged_before
from .own_layout import notes_of_second_scales, write_in_own_layout
from .partial_directory import PartialDirectory
from .report import REPORT_NAME, FidelityRow, MergeReport, note_of_lost
from .unmerged import load_unmerged, plan_unmerged, read_windows

LAYOUTS = ("native", "bitsandbytes", "base")
"""The output layouts of a quantized merge."""


def merge_quantized(
    base: str | Path,
    adapter: str | Path,
    directory: str | Path,
    quant_type: str = "nf4",
    layout: str | None = None,
    rounding: str = "second-order",
    calibration: str | Path | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    progressbar: bool = True,
    allow_unchanged: bool = False,
) -> MergeReport:
    """Merges an adapter into its base and writes a checkpoint with quantized experts.

    Args:
        base: directory of the base's checkpoint, or its name on the hub, in floating point, or quantized as in
            training.
        adapter: directory of the adapter.
        directory: output directory; must be empty or not exist.
        quant_type: name of the experts' format, such as `"nf4"` or `"nf4/64"`; must be the format that the adapter was
            trained on.
        layout: `"native"`, which this package loads; `"bitsandbytes"`, one set of keys per expert; or `"base"`, the
            layout of a base that another tool has quantized, in which unchanged tensors are copied. Default: `"base"`
            for such a base, else `"native"`.
        rounding: rounding of experts, as in `MoeQLoraModel.merge_and_unload`.
        calibration: plain text file for second-order rounding. Default: random tokens.
        device: device of the model.
        dry_run: run all checks, but load no weights and write nothing.
        progressbar: whether to show a progress bar.
        allow_unchanged: continue if a delta is lost in rounding; the report then names the stacks and layers.

    Returns:
        The report, which is also saved as `merge_report.json`.

    Raises:
        ValueError: see `read_adapter`, `plan_unmerged`, `load_unmerged` and `PartialDirectory`; or this adapter is
            already merged into the base, was trained on another storage, or changes only one of two tied weights; or
            a stack or layer that the adapter should change stays unchanged.
        CheckpointError: see `readable_quantization`, `Checkpoint`, `SourceFinder` and `names_beside`.
    """
    if layout not in (None, *LAYOUTS):
        raise ValueError(f"layout={layout!r} is unknown. Choose one of {LAYOUTS}.")
    adapter = Path(adapter)
    base = checkpoint_directory(base, adapter)
    found = read_adapter(adapter, base)
    name = str(found.config.format or "16 bits")
    accepted = dict.fromkeys((name, name.partition("/")[0]))
    if quant_type not in accepted:
        raise ValueError(
            f"The adapter was trained on experts in {name}, so a merge requantizes them to {' or '.join(accepted)}; "
            f"found {quant_type!r}. For another format, merge without --quantize, then load the result with "
            "MoeQuantizationConfig and save it."
        )
    digest = adapter_digest(adapter)
    merged_before = digests_merged_before(base, digest)
    model = BaseModel.open(base, found.stacks)
    finder = _finder(model)
    sources = {source.target.name: source for source in each_source(finder.find())}
    stored = {source.storage for source in sources.values() if isinstance(source, PackedSource)}
    can_be_base = model.is_of_others and stored == {found.config.format}
    layout = layout or ("base" if can_be_base else "native")
    if layout == "base" and not can_be_base:
        raise ValueError(
            f"layout='base' requires a base that another tool has quantized in {name}, which {base} is not. Set "
            "layout='native' or layout='bitsandbytes' (--layout)."
        )
    notes = _check_checkpoint(found, model, finder, sources)
    if layout == "base":
        notes = ()  # all tensors are written
    plan = plan_unmerged(base, adapter)
    tokens = None if calibration is None else read_windows(calibration, base)
    task = {
        "base": str(base.resolve()),
        "adapter_sha256": digest,
        "options": [quant_type, layout, rounding, str(calibration)],
        "version": __version__,
    }
    output = PartialDirectory(directory, task, can_be_taken_up=False)
    beside = names_beside(base, output)
    in_full = {key: tensor for key, tensor in beside_factors(found.non_expert).items() if not key.endswith(TOKENS)}
    num_with_delta = _num_with_delta(found)
    planned = MergeReport(
        base=str(base.resolve()),
        adapter=str(adapter.resolve()),
        adapter_sha256=digest,
        onto="quantized",
        storage=f"{found.config.format}, {rounding} rounding",
        tensors_expected=num_with_delta + len(in_full),
        tensors_changed=0,
        tensors_written=0,
        merged_before=merged_before,
        notes=notes,
    )
    if dry_run:
        return planned
    with output.open():
        unmerged = load_unmerged(plan, device)
        before = _checksums_of_adapted(unmerged)
        if len(before) != num_with_delta:
            raise ValueError(
                f"The adapter has deltas for {num_with_delta} stacks and layers, but the loaded model has "
                f"{len(before)} with a delta. Merge in memory, and report this error."
            )
        tuner, reference = unmerged.base_model, None
        if rounding == "nearest":  # in this case the merge itself does not run the model
            tokens_run = random_token_ids(tuner.model.config)
            reference = take_reference(tuner, tuner.active_adapters, tokens_run, progressbar)
        merged = unmerged.merge_and_unload(progressbar, rounding=rounding, calibration=tokens)
        check = tuner.merge_check if reference is None else reference.check(merged, progressbar)
        unchanged = _unchanged(merged, before, allow_unchanged)
        _check_trained_in_full(merged, in_full)
        if layout == "base":
            changed = _changed_names(merged, before, found)
            notes += notes_of_second_scales(merged, finder, changed)
            write_in_own_layout(merged, finder, sources, changed, output, progressbar)
            config = None
        else:
            config = _save(merged, layout, output.partial)
        of_stacks = {name: stack for name, _, stack in quantized_stacks(merged)}
        notes += tuple(f"{name}: {note}" for name, stack in of_stacks.items() for note in stack.merge_notes)
        notes += (note_of_lost("stacks and layers", unchanged),) if unchanged else ()
        notes += (check.problem,) if check is not None and check.problem is not None else ()
        done = replace(
            planned,
            tensors_changed=planned.tensors_expected - len(unchanged),
            tensors_written=len(Checkpoint.open(output.partial).tensors),
            stacks=tuple(
                FidelityRow.of(name, stack.fidelity) for name, stack in of_stacks.items() if stack.fidelity is not None
            ),
            notes=notes,
            check=check,
        )
        new = {REPORT_NAME: done.to_dict()} if config is None else {"config.json": config, REPORT_NAME: done.to_dict()}
        copy_beside(base, beside, output, new)
        if layout == "native" and "README.md" not in beside:
            output.write_text("README.md", f"A checkpoint with quantized experts. To load it: {LOADING}.\n")
        output.finish()
    return done


def _finder(base: BaseModel) -> SourceFinder:
    readable_quantization(base.config, base.directory)
    storage = saved_config(base.directory)
    return SourceFinder(base.model, Checkpoint.open(base.directory), (storage and storage.flipped_stacks) or ())


def _changed_names(merged: nn.Module, before: dict[str, int], adapter: AdapterFile) -> list[str]:
    """The names of the stacks and parameters that an adapter has changed."""
    found = []
    for path in (name.rpartition(".")[0] for name in before):
        found.append(path if isinstance(merged.get_submodule(path), Stack) else f"{path}.weight")
    for key in beside_factors(adapter.non_expert):
        tokens = next((ending for ending in TOKENS if key.endswith(ending)), None)
        found.append(name_in_model(key) if tokens is None else f"{key.removesuffix(tokens)}.weight")
    return list(dict.fromkeys(found))


def _check_checkpoint(
    adapter: AdapterFile, base: BaseModel, finder: SourceFinder, sources: dict[str, Source]
) -> tuple[str, ...]:
    """Checks the adapter against the tensors of its base and returns notes for the report.

    Raises:
        ValueError: the adapter belongs to another base, or changes tied or shared weights.
        CheckpointError: see `readable_quantization`, `Checkpoint` and `SourceFinder`.
    """
    check_base(adapter, base, finder.checkpoint, sources)
    check_not_tied(adapted_weights(adapter.non_expert), base, finder.plain_tensors())
    tied = getattr(base.model, "all_tied_weights_keys", None) or {}
    shared = [name for name in adapter.stacks if name in tied or name in tied.values()]
    if shared:
        raise ValueError(
            f"{shared[0]} is shared by two modules of the base, and a saved checkpoint stores it once for both. Merge "
            "into 16 bits in memory: load base and adapter, and call merge_and_unload(dtype=...)."
        )
    dropped = sorted(_dropped(base, finder, sources))
    if not dropped:
        return ()
    return (f"{len(dropped)} tensors that the model does not load are omitted, {dropped[0]} first.",)


def _unchanged(merged: nn.Module, before: dict[str, int], allow_unchanged: bool) -> list[str]:
    """The stacks and layers that the merge left unchanged.

    Raises:
        ValueError: there are unchanged ones and `allow_unchanged` is False.
    """
    unchanged = [name for name, checksum in before.items() if _checksum(merged.get_parameter(name)) == checksum]
    if unchanged and not allow_unchanged:
        raise ValueError(
            f"{len(unchanged)} of {len(before)} stacks and layers that the adapter should change are unchanged after "
            f"the merge, {unchanged[0]} first: their deltas are lost in rounding. Merge into 16 bits instead, or "
            "allow unchanged weights (allow_unchanged=True, --allow-unchanged)."
        )
    return unchanged


def _save(merged: PreTrainedModel, layout: str, directory: Path) -> dict[str, Any]:
    """Writes the tensors and returns their config."""
    with TemporaryDirectory(dir=directory) as saved:
        if layout == "native":
            merged.save_pretrained(saved)
        else:
            save_bitsandbytes(merged, saved)
        for file in Path(saved).glob("*.safetensors*"):
            file.rename(directory / file.name)
        return config_for_all(json.loads(Path(saved, "config.json").read_text(encoding="utf-8")), None)


def _num_with_delta(adapter: AdapterFile) -> int:
    """Number of stacks and layers with a nonzero delta, according to the adapter file."""
    experts = sum(bool(one.A.any() and one.B.any()) for one in adapter.experts)
    return experts + sum(pair.has_delta for pair in factor_pairs(adapter.non_expert))


def _check_trained_in_full(merged: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Checks that the merged model contains the modules that were trained in full.

    Raises:
        ValueError: a tensor differs; the error names the first.
    """
    in_model = {**dict(merged.named_parameters()), **dict(merged.named_buffers())}
    for key, tensor in tensors.items():
        found = in_model[name_in_model(key)].cpu()
        if not torch.equal(found, tensor.to(found.dtype)):
            raise ValueError(
                f"The adapter's {key} was not applied to the merged model. Merge in memory, and report this error."
            )


def _dropped(base: BaseModel, finder: SourceFinder, sources: dict[str, Source]) -> set[str]:
    """Keys that the model does not load, such as those of layers for speculative decoding."""
    used = {key for source in sources.values() for key in source.keys}
    used |= {*finder.beside_stacks.values(), *finder.known_keys()}
    saved = saved_config(finder.checkpoint.directory)
    if saved is not None and saved.linear_storage is not None:
        linear = finder.saved_linear(base.model, parse_format(saved.linear_storage))
        used |= {key for keys in linear.values() for key in keys.values()}
    return finder.checkpoint.tensors.keys() - used


def _checksums_of_adapted(model: PeftModel) -> dict[str, int]:
    """Name -> checksum of the weights of every stack and layer for which the adapter has a delta."""
    found = {}
    for path, layer in model.base_model.model.named_modules():
        if isinstance(layer, LoraLayer) and any(_has_delta(layer, name) for name in layer.active_adapters):
            # for a stack, its codes or 16-bit weights
            name, weight = next(layer.get_base_layer().named_parameters())
            found[f"{path}.{name}"] = _checksum(weight)
    return found


def _has_delta(layer: LoraLayer, name: str) -> bool:
    if name in layer.lora_embedding_A:
        return bool(layer.lora_embedding_A[name].any() and layer.lora_embedding_B[name].any())
    return name in layer.lora_A and bool(layer.lora_A[name].weight.any() and layer.lora_B[name].weight.any())


def _checksum(tensor: torch.Tensor) -> int:
    total = 0
    for number, part in enumerate(tensor.detach().contiguous().flatten().view(torch.uint8).split(2**22)):
        places = torch.arange(1, len(part) + 1, device=part.device)
        total += (number + 1) * int((part.long() * places).sum())
    return total
