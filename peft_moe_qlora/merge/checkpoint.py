"""Merging an adapter into a checkpoint on disk: shard by shard, in the checkpoint's own layout.

One shard and one expert are in memory at a time. The result is an ordinary checkpoint that loads without this package.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tqdm.auto import tqdm

from .. import __version__
from ..layouts.adapter_file import AdapterFile
from ..layouts.base_model import BaseModel
from ..layouts.foreign import ReadOptions
from ..layouts.read import read_adapter, read_config
from ..loading.checkpoint import INDEX_NAME, QUANTIZATION_NAME, SINGLE_NAME, Checkpoint, TensorInfo
from ..loading.decoded import DecodedCheckpoint, without_quantization
from ..loading.disk.for_engines import Stored, engine_layout
from ..loading.load import readable_quantization
from ..quantization import Fidelity
from .beside import copy_beside, names_beside
from .edits import ONTO, Edit, MergePlan, TensorEdit, plan_merge
from .for_engines import Encoding, plan_encoding
from .inputs import adapter_digest, checkpoint_directory, digests_merged_before
from .partial_directory import PartialDirectory
from .report import REPORT_NAME, FidelityRow, MergeReport, note_of_lost

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE_OF_DECODED = torch.bfloat16
"""Dtype of decoded weights of a quantized checkpoint, unless the model's config has another one."""


def merge_checkpoint(
    base: str | Path,
    adapter: str | Path,
    directory: str | Path,
    onto: str = "quantized",
    dtype: torch.dtype | None = None,
    dry_run: bool = False,
    progressbar: bool = True,
    options: ReadOptions | None = None,
    allow_unchanged: bool = False,
    serve_as: str | None = None,
) -> MergeReport:
    """Merges an adapter into its base and writes a 16-bit checkpoint.

    Deltas are added in fp32 and rounded once. The directory is created atomically; the same call resumes an
    interrupted merge.

    Args:
        base: directory of the base's checkpoint, or its name on the hub. The checkpoint is in floating point, or
            quantized by a tool other than bitsandbytes, in which case it is decoded.
        adapter: directory of the adapter, of this package or another tool.
        directory: output directory; must be empty or not exist.
        onto: `"quantized"`: merge onto the weights used in training, that is, quantized and dequantized. The adapter
            compensates for part of their quantization error. `"base"`: merge onto the checkpoint's own weights.
            Weights that were not quantized in training are used as in the checkpoint in both cases.
        dtype: dtype of the floating-point tensors. Default: the dtype of each tensor in the checkpoint, and for
            quantized ones the dtype in config.json.
        dry_run: run all checks, but write nothing.
        progressbar: whether to show a progress bar.
        options: information that adapter files of other tools lack. By default such adapters are assumed to have been
            trained with experts in floating point.
        allow_unchanged: continue if a delta is too small for the dtype; the report then names the tensors.
        serve_as: quantize the weights that vLLM and SGLang serve quantized, with nearest rounding, in the layout that
            they read: `"fp8"` for experts and linear layers, in blocks of 128 x 128; `"mxfp4"` for experts of gpt-oss.
            Default: no quantization.

    Returns:
        The report, which is also saved as `merge_report.json`.

    Raises:
        ValueError: see `read_adapter`, `open_in_floating_point`, `plan_merge`, `plan_encoding` and `PartialDirectory`;
            `serve_as` is unknown; this adapter is already merged into the base; or a tensor that the adapter should
            change stays unchanged.
        CheckpointError: see `Checkpoint` and `names_beside`.
        OSError: the disk is full; finished shards are kept.
    """
    if onto not in ONTO:
        raise ValueError(f"onto={onto!r} is unknown. Choose one of {ONTO}.")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(
            f"dtype={dtype} is not supported for merged weights. Choose one of {', '.join(map(str, DTYPES))}."
        )
    layout = None if serve_as is None else engine_layout(serve_as)
    adapter = Path(adapter)
    base = checkpoint_directory(base, adapter)
    found = read_adapter(adapter, base, options, usual_quant_type="none")
    digest = adapter_digest(adapter)
    merged_before = digests_merged_before(base, digest)
    model = BaseModel.open(base, found.stacks)
    checkpoint = open_in_floating_point(model)
    plan = plan_merge(model, checkpoint, found, onto, every_stack=layout is not None)
    encoding = None if layout is None else plan_encoding(layout, model, checkpoint, plan)
    config = config_for_all(json.loads((base / "config.json").read_text(encoding="utf-8")), dtype)
    if model.quantization is not None:
        config = without_quantization(config)
    if encoding is not None:
        config["quantization_config"] = encoding.config
    task = _task(checkpoint, config, adapter, digest, onto, dtype, options)
    output = PartialDirectory(directory, task)
    is_left_out = {QUANTIZATION_NAME} if model.quantization is not None or encoding is not None else set()
    beside = [name for name in names_beside(base, output) if name not in is_left_out]
    planned = MergeReport(
        base=str(base.resolve()),
        adapter=str(adapter.resolve()),
        adapter_sha256=digest,
        onto=onto,
        storage=str((layout and layout.storage) or dtype or "the checkpoint's dtypes").removeprefix("torch."),
        tensors_expected=len(plan.changed),
        tensors_changed=0,
        tensors_written=0,
        merged_before=merged_before,
        notes=_notes(found, onto, plan) + (encoding.notes if encoding is not None else ()),
    )
    merge = _Merge(checkpoint, plan, encoding, model, dtype, output)
    merge.check_space()
    if dry_run:
        return planned
    with output.open():
        try:
            merge.run(progressbar)
            unchanged = merge.check_changed(allow_unchanged)
            num_written = merge.check_written()
        except ValueError:
            output.discard()  # a rerun would fail in the same way
            raise
        stacks = {edit.name for edit in plan.stacks}
        rows = [FidelityRow.of(name, fidelity) for name, fidelity in merge.fidelities().items()]
        done = replace(
            planned,
            tensors_changed=len(merge.changed()),
            tensors_written=num_written,
            stacks=tuple(row for row in rows if row.name in stacks),
            others=tuple(row for row in rows if row.name not in stacks),
            notes=planned.notes + ((note_of_lost("tensors", unchanged),) if unchanged else ()),
        )
        merge.write_index()
        copy_beside(base, beside, output, {"config.json": config, REPORT_NAME: done.to_dict()})
        output.finish()
    return done


class _Merge:
    """Merges the shards of a checkpoint one after the other."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: MergePlan,
        encoding: Encoding | None,
        model: BaseModel,
        dtype: torch.dtype | None,
        output: PartialDirectory,
    ) -> None:
        self.checkpoint = checkpoint
        self.plan = plan
        self.encoders = {} if encoding is None else encoding.encoders
        self.names_of_encoded = {} if encoding is None else encoding.names
        self.dtype = dtype
        self.output = output
        self.names = {file: file.relative_to(model.directory).as_posix() for file in checkpoint.files}
        self.results: list[dict[str, Any]] = []
        of_model = getattr(model.config, "dtype", None)
        self.dtype_of_decoded = of_model if of_model in DTYPES else DTYPE_OF_DECODED

    def check_space(self) -> None:
        """Raises an error if the disk has too little free space for the merged checkpoint."""
        missing = [file for file, name in self.names.items() if not self.output.is_written(name)]
        needed = sum(self._nbytes(info) for info in self.checkpoint.tensors.values() if info.file in missing)
        parent = self.output.directory.parent
        while not parent.exists():
            parent = parent.parent
        free = shutil.disk_usage(parent).free
        if needed > free:
            raise OSError(
                f"{parent} has {free / 1e9:.2f} GB of free disk space, but the merged checkpoint requires "
                f"{needed / 1e9:.2f} GB. Free disk space or choose another directory."
            )

    def dtype_of(self, info: TensorInfo) -> torch.dtype | None:
        """The dtype that a tensor is cast to; None if it is not cast."""
        if self.checkpoint.storage_of(info.key) is not None:
            return self.dtype or self.dtype_of_decoded
        if self.dtype is None or info.dtype not in (*DTYPES, torch.float64):
            return None
        return None if info.key in self.plan.kept_in_fp32 else self.dtype

    def stored(self, info: TensorInfo) -> dict[str, Stored]:
        """Key -> shape and dtype of the tensors that a tensor is written as."""
        if info.key in self.encoders:
            return self.encoders[info.key].stored()
        return {info.key: Stored(info.shape, self.dtype_of(info) or info.dtype)}

    def _nbytes(self, info: TensorInfo) -> int:
        if info.key not in self.encoders and self.dtype_of(info) is None:
            return info.nbytes
        return sum(stored.nbytes for stored in self.stored(info).values())

    def run(self, progressbar: bool) -> None:
        """Writes all files that an interrupted run has not written yet."""
        total = len(self.checkpoint.tensors)
        with tqdm(total=total, desc="Merging", unit="tensor", disable=not progressbar) as bar:
            for file, name in self.names.items():
                keys = [key for key, info in self.checkpoint.tensors.items() if info.file == file]
                result = self.output.read_note(_result_name(name))
                if result is None:
                    result = self._write(file, name, sorted(keys, key=self.checkpoint.position), bar)
                else:
                    bar.update(len(keys))
                self.results.append(result)

    def _write(self, file: Path, name: str, keys: list[str], bar: tqdm) -> dict[str, Any]:
        shard = _Shard(self, keys)
        for key in keys:
            if key not in shard.done:
                shard.add(key)
            bar.update()
        try:
            save_file(shard.tensors, self.output.path_to_write(name), self.checkpoint.metadata[file] or None)
        except SafetensorError as error:
            raise OSError(
                f"Writing {self.output.place(name)} failed: {error}. Free disk space, then rerun the same command to "
                "resume."
            ) from error
        self.output.written(name)
        result = shard.result()
        self.output.write_note(_result_name(name), result)
        return result

    def changed(self) -> set[str]:
        """Keys of tensors whose written values differ from those without the adapter."""
        return {key for result in self.results for key in result["changed"]}

    def check_changed(self, allow_unchanged: bool) -> list[str]:
        """Keys of tensors that the adapter should change and whose written values are unchanged.

        Raises:
            ValueError: there are unchanged tensors and `allow_unchanged` is False.
        """
        unchanged = sorted(self.plan.changed - self.changed())
        if unchanged and not allow_unchanged:
            remedy = "into float32 (dtype=torch.float32, --dtype float32)"
            if not self.encoders.keys().isdisjoint(unchanged):
                remedy = "into 16 bits (without serve_as, --serve-as)"
            raise ValueError(
                f"{len(unchanged)} of {len(self.plan.changed)} tensors that the adapter should change are unchanged "
                f"after the merge, {unchanged[0]} first: their deltas are lost in rounding. Merge {remedy}, or allow "
                "unchanged tensors (allow_unchanged=True, --allow-unchanged)."
            )
        return unchanged

    def check_written(self) -> int:
        """Compares the headers of the written files with the expected ones and returns the number of tensors.

        Raises:
            ValueError: a tensor is missing, unexpected, or has another shape.
        """
        written = Checkpoint([self.output.place(name) for name in self.names.values()])
        infos = self.checkpoint.tensors.values()
        expected = {key: (info, stored) for info in infos for key, stored in self.stored(info).items()}
        for key in expected.keys() | written.tensors.keys():
            before, stored = expected.get(key, (None, None))
            after = written.tensors.get(key)
            if stored is None or after is None or stored.shape != after.shape:
                raise ValueError(
                    f"The merged checkpoint is inconsistent for {key}: the base has {before or 'no such tensor'}, the "
                    f"result has {after or 'no such tensor'}. Rerun the merge, and report this error if it persists."
                )
        return len(written.tensors)

    def fidelities(self) -> dict[str, Fidelity]:
        """Name -> fidelity of each stack and tensor, over all shards."""
        total: dict[str, Fidelity] = defaultdict(Fidelity)
        for result in self.results:
            for name, sums in result["fidelity"].items():
                for part, value in sums.items():
                    setattr(total[name], part, getattr(total[name], part) + value)
        return dict(total)

    def write_index(self) -> None:
        names = list(self.names.values())
        if names == [SINGLE_NAME]:
            return
        infos = sorted(self.checkpoint.tensors.values(), key=lambda info: info.key)
        weight_map = {key: self.names[info.file] for info in infos for key in self.stored(info)}
        size = sum(self._nbytes(info) for info in infos)
        self.output.write_json(INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": weight_map})


class _Shard:
    """The tensors of one output file while they are computed."""

    def __init__(self, merge: _Merge, keys: list[str]) -> None:
        self.merge = merge
        self.checkpoint = merge.checkpoint
        plan = merge.plan
        infos = [self.checkpoint.tensors[key] for key in keys]
        # allocated together: freeing temporary tensors between them would fragment memory
        self.tensors = {
            key: torch.empty(stored.shape, dtype=stored.dtype)
            for info in infos
            if info.key in plan.of_tensors or info.key in plan.of_experts or self._is_made(info)
            for key, stored in merge.stored(info).items()
        }
        self.keys = set(keys)
        self.done: set[str] = set()
        self.changed: set[str] = set()
        self.fidelity: dict[str, Fidelity] = defaultdict(Fidelity)

    def _is_made(self, info: TensorInfo) -> bool:
        """Whether a tensor is encoded or cast, with or without an edit."""
        return info.key in self.merge.encoders or self.merge.dtype_of(info) is not None

    def add(self, key: str) -> None:
        """Adds one tensor, and all tensors of the same expert in this file."""
        plan = self.merge.plan
        if key in plan.of_tensors:
            edit = plan.of_tensors[key]
            self._put(key, None, edit.name, edit.edit(self.checkpoint.read(key)))
        elif key in plan.of_experts:
            for stack, expert in plan.of_experts[key]:
                places = plan.places(stack.source, self.checkpoint)
                for part, edit in stack.edits(expert, self.checkpoint, places):
                    if part.key in self.keys:
                        self._put(part.key, expert if part.is_stack else None, stack.name, edit)
        elif key in self.merge.encoders:
            name = self.merge.names_of_encoded[key]
            self._put(key, None, name, TensorEdit(name).edit(self.checkpoint.read(key)))
        elif key in self.tensors:
            tensor = self.checkpoint.read(key)
            self.tensors[key].copy_(tensor)
            _check_range(key, tensor, self.tensors[key])
        else:
            self.tensors[key] = self.checkpoint.read(key)
        self.done.add(key)

    def _put(self, key: str, expert: int | None, name: str, edit: Edit) -> None:
        """Rounds new values and stores them in the tensor, or in the slice of an expert if one is given."""
        if not torch.isfinite(edit.exact).all():  # base weights and factors are checked before
            raise ValueError(
                f"The merged weights of {name} exceed the range of float32. The adapter is probably damaged. Save or "
                "train it again."
            )
        put = self._put_encoded if key in self.merge.encoders else self._put_rounded
        stored, is_changed = put(key, expert, edit)
        self.fidelity[name].add(edit.before, edit.exact, stored)
        if is_changed:
            self.changed.add(key)
        self.done.add(key)

    def _put_rounded(self, key: str, expert: int | None, edit: Edit) -> tuple[torch.Tensor, bool]:
        """Returns the written values, and whether they differ from those without the delta."""
        whole = self.tensors[key]
        place = whole if expert is None else whole[expert : expert + 1]
        place.copy_(edit.exact)
        _check_range(key, edit.exact, place)
        return place, not torch.equal(place, edit.before.to(place.dtype))

    def _put_encoded(self, key: str, expert: int | None, edit: Edit) -> tuple[torch.Tensor, bool]:
        """Returns the decoded values of the written tensors, and whether they differ from those without the delta."""
        encoder = self.merge.encoders[key]
        written, decoded = encoder.encode(edit.exact, expert)
        for stored_key, place, tensor in written:
            whole = self.tensors[stored_key]
            (whole if place is None else whole[place]).copy_(tensor)
        is_known = key in self.changed or key not in self.merge.plan.changed
        return decoded, not is_known and encoder.differ(edit.exact, edit.before)

    def result(self) -> dict[str, Any]:
        return {
            "changed": sorted(self.changed),
            "fidelity": {
                name: {part: float(value) for part, value in vars(fidelity).items()}
                for name, fidelity in self.fidelity.items()
            },
        }


def _check_range(key: str, exact: torch.Tensor, rounded: torch.Tensor) -> None:
    if torch.isfinite(exact).all() and not torch.isfinite(rounded).all():
        raise ValueError(
            f"{key} contains values that exceed the range of {rounded.dtype}. Choose a dtype with a wider range, such "
            "as bfloat16 (dtype=torch.bfloat16, --dtype bfloat16)."
        )


def _result_name(name: str) -> str:
    return f"{name}.result.json"


def _task(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    adapter: Path,
    digest: str,
    onto: str,
    dtype: torch.dtype | None,
    options: ReadOptions | None,
) -> dict[str, Any]:
    """The inputs and options that must match for a run to resume the work of another."""
    stats = {str(file): file.stat() for file in checkpoint.files}
    return {
        "base": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
        "base_config": config,
        "adapter_sha256": digest,
        "adapter_config": read_config(adapter),
        "onto": onto,
        "dtype": str(dtype),
        "options": str(options),
        "version": __version__,
    }


def _notes(adapter: AdapterFile, onto: str, plan: MergePlan) -> tuple[str, ...]:
    notes = () if plan.changed else ("The adapter changes no weight: all of its deltas are zero.",)
    if onto == "quantized" and adapter.config.base is None:
        notes += (
            "The adapter does not record the storage of its base in training. Assumed storage: experts as "
            f"{adapter.config.format or 'in the checkpoint'}, linear layers as in the checkpoint.",
        )
    return notes


def open_in_floating_point(base: BaseModel) -> Checkpoint:
    """The checkpoint of a base, decoded if another tool has quantized it.

    Raises:
        ValueError: the checkpoint is quantized by bitsandbytes or this package; see also `readable_quantization`.
        CheckpointError: see `DecodedCheckpoint`.
    """
    readable_quantization(base.config, base.directory)
    checkpoint = Checkpoint.open(base.directory)
    if base.quantization is None:
        return checkpoint
    if base.is_of_others:
        return DecodedCheckpoint(base.model, checkpoint)
    raise ValueError(
        f"{base.directory} is quantized by {base.quantization!r}. Expected a checkpoint in floating point, or one "
        "that a tool other than bitsandbytes and this package has quantized. Pass the unquantized base, merge into 4 "
        "bits (--quantize), or merge in memory with merge_and_unload."
    )


def config_for_all(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Adds the number of experts to a config.json under both names that readers use.

    Args:
        config: the base's config, or a nested part of it.
        dtype: replaces existing dtype entries; None to keep them.
    """
    found = {key: config_for_all(part, dtype) if isinstance(part, dict) else part for key, part in config.items()}
    for own, other in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if isinstance(found.get(own), int):
            found.setdefault(other, found[own])
    for name in ("dtype", "torch_dtype"):
        if dtype is not None and name in found:
            found[name] = str(dtype).removeprefix("torch.")
    return found
