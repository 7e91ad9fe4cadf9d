"""Merging an adapter into a checkpoint on disk: shard by shard, in the layout that the checkpoint has.

In memory there are one shard and one expert at a time. The result is an ordinary checkpoint, which needs nothing of
this package.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ... import __version__
from ...loading.checkpoint import INDEX_NAME, Checkpoint, TensorInfo
from ...loading.load import quantization_of
from ...quantization import Fidelity
from ..adapter_file import AdapterFile
from ..base_model import BaseModel
from ..readers.read import read_adapter
from .edits import ONTO, Edit, MergePlan, plan_merge
from .partial_directory import PartialDirectory
from .report import REPORT_NAME, FidelityRow, MergeReport

_NOT_NEEDED = ["*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.onnx", "original/*"]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    directory: str | Path,
    onto: str = "quantized",
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    progressbar: bool = True,
) -> MergeReport:
    """Writes the checkpoint that a base and an adapter are together.

    Deltas are added in fp32 and rounded once. The directory appears when all of it is written; an interrupted merge is
    taken up by the same call.

    Args:
        base: directory of the base's checkpoint, in floating point, or its name on the hub.
        adapter: directory of the adapter.
        directory: to be written to; must be empty or not there.
        onto: `"quantized"`: onto the weights as the training has seen them, that is, quantized and dequantized. The
            adapter has learnt to make up for their errors as well. `"base"`: onto the checkpoint's own.
        dtype: of the floating-point tensors. Default: what each has in the checkpoint.
        dry_run: settle everything, write nothing.
        progressbar: show one.

    Returns:
        What was done, which also stands in `merge_report.json`.

    Raises:
        ValueError: see `read_adapter`, `plan_merge` and `PartialDirectory`; or the base has this adapter in it
            already, or not every tensor that the adapter changes came out changed.
        CheckpointError: see `Checkpoint`.
        OSError: the disk is full; what is finished is kept.
    """
    if onto not in ONTO:
        raise ValueError(f"onto={onto!r} is unknown; choose one of {ONTO}.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype={dtype} can't hold merged weights; choose one of {', '.join(map(str, _DTYPES))}.")
    base, adapter = checkpoint_directory(base), Path(adapter)
    found = read_adapter(adapter, base)
    digest = adapter_digest(adapter)
    refuse_merged(base, digest)
    model = BaseModel.open(base)
    refuse_quantized(model)
    checkpoint = Checkpoint.open(base)
    plan = plan_merge(model, checkpoint, found, onto)
    task = _task(checkpoint, digest, onto, dtype)
    output = PartialDirectory(directory, task)
    merge = _Merge(checkpoint, plan, model, dtype, output, progressbar)
    notes = _notes(found, plan, onto)

    def report(expected: int, changed: int, written: int, fidelities: dict[str, Fidelity]) -> MergeReport:
        stacks = {edit.name for edit in plan.stacks}
        rows = [FidelityRow.of(name, fidelity) for name, fidelity in fidelities.items()]
        return MergeReport(
            base=str(base),
            adapter=str(adapter),
            adapter_sha256=digest,
            onto=onto,
            storage=str(dtype or "the checkpoint's dtypes").removeprefix("torch."),
            tensors_expected=expected,
            tensors_changed=changed,
            tensors_written=written,
            stacks=tuple(row for row in rows if row.name in stacks),
            others=tuple(row for row in rows if row.name not in stacks),
            notes=notes,
        )

    if dry_run:
        return report(merge.num_planned(), 0, 0, {})
    merge.check_space()
    output.start()
    results = [merge.shard(file) for file in checkpoint.files]
    changed = sum(result["changed"] for result in results)
    unchanged = [key for result in results for key in result["unchanged"]]
    written = sum(result["written"] for result in results)
    if unchanged or written != len(checkpoint.tensors):
        raise ValueError(
            f"Of {changed + len(unchanged)} tensors that the adapter changes, {changed} came out changed, and of "
            f"{len(checkpoint.tensors)} tensors {written} were written. "
            + (
                f"{unchanged[0]} is the same as without the adapter: its delta is lost in rounding. "
                if unchanged
                else ""
            )
            + f"Nothing is left at {directory}; try dtype=torch.float32."
        )
    done = report(changed, changed, written, merge.fidelities(results))
    merge.write_index()
    output.copy_beside(base, {"config.json": config_for_all(base, dtype), REPORT_NAME: done.to_dict()})
    output.finish([_result_name(file) for file in checkpoint.files])
    return done


class _Merge:
    """Goes through the shards of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: MergePlan,
        model: BaseModel,
        dtype: torch.dtype | None,
        output: PartialDirectory,
        progressbar: bool,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.dtype = dtype
        self.kept_in_fp32 = tuple(
            {*(model.model._keep_in_fp32_modules or ()), *(model.model._keep_in_fp32_modules_strict or ())}
        )
        self.output = output
        self.bar = tqdm(total=len(checkpoint.tensors), desc="Merging", unit="tensor", disable=not progressbar)

    def num_planned(self) -> int:
        """How many tensors the adapter may change; those whose factors are zero don't count in the end."""
        with_factors = [
            key for key, edits in self.plan.of_experts.items() if any(edit.factors is not None for edit, _ in edits)
        ]
        others = [edit for edit in self.plan.of_tensors.values() if edit.delta or edit.replacement is not None]
        return len(with_factors) + len(others)

    def check_space(self) -> None:
        """Refuses to begin what the disk can't hold."""
        missing = [file for file in self.checkpoint.files if not self.output.is_written(file.name)]
        needed = sum(
            info.numel * self.dtype_of(info).itemsize
            for info in self.checkpoint.tensors.values()
            if info.file in missing
        )
        parent = self.output.directory.absolute().parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(f"{parent} has {free / 1e9:.2f} GB left; the merged checkpoint takes {needed / 1e9:.2f} GB.")

    def dtype_of(self, info: TensorInfo) -> torch.dtype:
        """What a tensor is written in."""
        if info.dtype is None or not info.dtype.is_floating_point or info.dtype.itemsize < 2 or self.dtype is None:
            return info.dtype or torch.uint8
        is_kept = info.dtype == torch.float32 and any(name in info.key for name in self.kept_in_fp32)
        return info.dtype if is_kept else self.dtype

    def shard(self, file: Path) -> dict[str, Any]:
        """Writes one file; gives what is to be known of it, as plain data."""
        keys = [key for key, info in self.checkpoint.tensors.items() if info.file == file]
        keys.sort(key=self.checkpoint.position)
        if not self.output.is_written(_result_name(file)):
            written = _Shard(self, file, keys)
            for key in keys:
                if key not in written.done:
                    written.add(key)
                self.bar.update()
            save_file(written.tensors, self.output.path_to_write(file.name), self.checkpoint.metadata[file] or None)
            self.output.written(file.name)
            self.output.write_json(_result_name(file), written.result())
        return self.output.read_json(_result_name(file))

    @staticmethod
    def fidelities(results: list[dict[str, Any]]) -> dict[str, Fidelity]:
        """Of each stack and tensor, over all shards."""
        total: dict[str, Fidelity] = defaultdict(Fidelity)
        for result in results:
            for name, sums in result["fidelity"].items():
                for part, value in sums.items():
                    setattr(total[name], part, getattr(total[name], part) + value)
        return dict(total)

    def write_index(self) -> None:
        self.bar.close()
        if len(self.checkpoint.files) == 1:
            return
        infos = self.checkpoint.tensors.values()
        size = sum(info.numel * self.dtype_of(info).itemsize for info in infos)
        weight_map = {info.key: info.file.name for info in sorted(infos, key=lambda info: info.key)}
        self.output.write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


class _Shard:
    """The tensors of one file, as they come to be."""

    def __init__(self, merge: _Merge, file: Path, keys: list[str]) -> None:
        self.merge = merge
        self.checkpoint = merge.checkpoint
        self.file = file
        # all at once: what is freed between them would leave gaps as large as themselves
        self.tensors = {
            info.key: torch.empty(info.shape, dtype=merge.dtype_of(info))
            for info in (self.checkpoint.tensors[key] for key in keys)
        }
        self.done: set[str] = set()
        self.fidelity: dict[str, Fidelity] = defaultdict(Fidelity)
        self.with_delta: set[str] = set()
        self.changed: set[str] = set()

    def add(self, key: str) -> None:
        """One tensor, and those of the same expert that are in this file too."""
        plan = self.merge.plan
        if key in plan.of_tensors:
            edit = plan.of_tensors[key]
            self._put(key, self.tensors[key], edit.name, edit.edit(self.checkpoint.read(key)))
        elif key in plan.of_experts:
            for stack, expert in plan.of_experts[key]:
                for part, edit in stack.edits(expert, self.checkpoint):
                    if part.key in self.tensors:
                        whole = self.tensors[part.key]
                        place = whole[expert : expert + 1] if part.is_stack else whole
                        self._put(part.key, place, stack.name, edit)
        else:
            self.tensors[key].copy_(self.checkpoint.read(key))
            self.done.add(key)

    def _put(self, key: str, place: torch.Tensor, name: str, edit: Edit) -> None:
        """Rounds new values and puts them in their place."""
        place.copy_(edit.exact)
        if not torch.isfinite(place).all():
            raise ValueError(
                f"{key} would have values that are not finite in {place.dtype}. Choose a dtype of wider range."
            )
        self.fidelity[name].add(edit.before, edit.exact, place)
        if edit.has_delta:
            self.with_delta.add(key)
            if not torch.equal(place, edit.before.to(place.dtype)):
                self.changed.add(key)
        self.done.add(key)

    def result(self) -> dict[str, Any]:
        return {
            "written": len(self.done),
            "changed": len(self.changed),
            "unchanged": sorted(self.with_delta - self.changed),
            "fidelity": {
                name: {part: float(value) for part, value in vars(fidelity).items()}
                for name, fidelity in self.fidelity.items()
            },
        }


def _result_name(file: Path) -> str:
    return f"{file.name}.result.json"


def _task(checkpoint: Checkpoint, digest: str, onto: str, dtype: torch.dtype | None) -> dict[str, Any]:
    stats = {file.name: file.stat() for file in checkpoint.files}
    return {
        "base": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "adapter_sha256": digest,
        "onto": onto,
        "dtype": str(dtype),
        "version": __version__,
    }


def _notes(adapter: AdapterFile, plan: MergePlan, onto: str) -> tuple[str, ...]:
    if onto == "quantized" and adapter.config.base is None:
        return (
            "The adapter doesn't say what it was trained on: experts are taken to have been stored as "
            f"{adapter.config.storage or 'in the checkpoint'}, linear layers as in the checkpoint.",
        )
    return ()


def checkpoint_directory(base: str | Path) -> Path:
    """Where a checkpoint is, downloaded from the hub unless it is a directory."""
    return Path(base) if Path(base).is_dir() else Path(snapshot_download(str(base), ignore_patterns=_NOT_NEEDED))


def adapter_digest(adapter: Path) -> str:
    """SHA-256 of an adapter's weights."""
    digest = hashlib.sha256()
    for path in sorted(adapter.glob("*.safetensors")):
        with path.open("rb") as file:
            while part := file.read(2**20):
                digest.update(part)
    return digest.hexdigest()


def refuse_merged(base: Path, digest: str) -> None:
    """Refuses a base that this adapter has been merged into.

    Raises:
        ValueError: it has.
    """
    report = base / REPORT_NAME
    if report.is_file() and json.loads(report.read_text()).get("adapter_sha256") == digest:
        raise ValueError(
            f"{base} has this adapter merged into it already, as {report} says. Merging twice adds it twice."
        )


def refuse_quantized(base: BaseModel) -> None:
    """Refuses a base that isn't in floating point.

    Raises:
        ValueError: it is quantized.
    """
    found = quantization_of(base.model.config)
    if found is not None:
        raise ValueError(
            f"{base.directory} is quantized by {found.get('quant_method')!r}; a checkpoint in floating point was "
            "expected. Name the unquantized base, or merge in memory with merge_and_unload."
        )


def config_for_all(base: Path, dtype: torch.dtype | None) -> dict[str, Any]:
    """The base's config.json, so that all readers find the number of experts, some by one name and some by another."""
    config = json.loads((base / "config.json").read_text())
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        for own, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
            if isinstance(part.get(own), int):
                part.setdefault(other, part[own])
        for name in ("dtype", "torch_dtype"):
            if dtype is not None and name in part:
                part[name] = str(dtype).removeprefix("torch.")
    return config
