"""The tensors of a checkpoint: reads headers, and single tensors on demand."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from ..progress import PATIENCE
from ..quantization import Format
from .paths import is_plain_name, leads_out

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
QUANTIZATION_NAME = "hf_quant_config.json"

# https://huggingface.co/docs/safetensors: the names of dtypes in headers
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class CheckpointError(ValueError):
    """A checkpoint cannot be used. The error names file and tensor, what was found, and what was expected."""


@dataclass(frozen=True)
class TensorInfo:
    """Header of a tensor of a checkpoint.

    Args:
        key: name of the tensor.
        file: path of the shard.
        shape: shape of the tensor.
        dtype: dtype of the tensor; None if torch has no such dtype.
        dtype_name: name of the dtype in the file.
    """

    key: str
    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * (self.dtype.itemsize if self.dtype is not None else 1)

    def __str__(self) -> str:
        return f"{self.key} ({self.dtype_name} {list(self.shape)} in {self.file.name})"


def read_object(text: str | bytes, what: str, can_repeat: bool = False) -> dict[str, Any]:
    """Parses a JSON object.

    Args:
        text: JSON text.
        what: description of the object, for errors.
        can_repeat: whether names may repeat; the last one counts.

    Raises:
        CheckpointError: the text is not JSON, not an object, or repeats a name.
    """
    try:
        found = json.loads(text, object_pairs_hook=dict if can_repeat else _without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be parsed: {error}. Expected a JSON object.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{what} cannot be parsed. Expected a JSON object, found a {type(found).__name__}.")
    return found


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.200} is repeated")
        found[name] = value
    return found


def stored_quantization(directory: Path) -> dict[str, Any] | None:
    """The `quantization_config` in config.json, of the model or of its text model; None if there is none.

    Older versions of ModelOpt wrote it only to a separate file.

    Raises:
        CheckpointError: config.json is not JSON, or its `quantization_config` is not an object.
    """
    file = directory / "config.json"
    if not file.is_file():
        return None
    config = read_object(file.read_bytes(), str(file), can_repeat=True)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config") is not None), None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{file}: quantization_config={found!r:.200}. Expected an object.")
    beside = directory / QUANTIZATION_NAME
    if found is None and beside.is_file():
        declared = read_object(beside.read_bytes(), str(beside), can_repeat=True).get("quantization")
        if isinstance(declared, dict) and declared.get("quant_algo") is not None:
            return {"quant_method": "modelopt", **declared}
    return found


def read_weight_map(directory: Path, variant: str | None = None) -> dict[str, str] | None:
    """Reads the index of a checkpoint: key -> name of the shard; None for a checkpoint of one file.

    Args:
        directory: directory of the checkpoint.
        variant: `variant` of `from_pretrained`, which is part of the file names.

    Raises:
        CheckpointError: there is no safetensors checkpoint, or there are two; the index is invalid; or a shard is
            missing, or outside the directory by its name or by a link.
    """
    single, index = (directory / _of_variant(name, variant) for name in (SINGLE_NAME, INDEX_NAME))
    if single.is_file():
        # transformers reads this file; a stale index of removed shards may be beside it
        shard = next(directory.glob(f"{single.stem}-*-of-*{single.suffix}"), None)
        if shard is not None:
            raise CheckpointError(
                f"{directory} has both {single.name} and {shard.name}, which belong to two checkpoints. Remove the "
                f"files of one; transformers would read {single.name}."
            )
        check_inside(single, directory)
        return None
    if not index.is_file():
        raise CheckpointError(
            f"{directory} has neither {index.name} nor {single.name}. Expected a checkpoint in safetensors. Pickled "
            "checkpoints (.bin) are never read; convert them first."
        )
    check_inside(index, directory)
    found = read_object(index.read_bytes(), f"{index} is not a checkpoint index: its text")
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} is not a checkpoint index: weight_map={weight_map!r:.200}. Expected an object that maps keys to "
            "names of shards. Download the index again."
        )
    if not isinstance(found.get("metadata"), dict):  # transformers requires it, too
        raise CheckpointError(
            f"{index} is not a checkpoint index: metadata={found.get('metadata')!r:.200}. Expected an object. "
            "Download the index again."
        )
    for key, name in weight_map.items():
        if not is_plain_name(name):
            raise CheckpointError(
                f"{index} maps {key!r:.200} to {name!r:.200}. Expected the name of a file in {directory}, without "
                '"..". Files outside the directory are neither read nor written. Use a checkpoint from a trusted '
                "source."
            )
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} lists {', '.join(missing[:3])}, which {'does' if len(missing) == 1 else 'do'} not exist "
            f"({len(missing)} of {len(files)} shards missing). Download the checkpoint again."
        )
    for name in files:
        check_inside(directory / name, directory)
    return weight_map


def _of_variant(name: str, variant: str | None) -> str:
    stem, _, ending = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{ending}"


def check_inside(file: Path, directory: Path) -> None:
    """Rejects a file that is a symbolic link to a file outside the directory.

    Raises:
        CheckpointError: the file is such a link; the error names the file and the link target.
    """
    if leads_out(file, directory):
        raise CheckpointError(
            f"{file} is a link to {os.path.realpath(file)}, outside {directory}; such links are not followed. If you "
            "trust the file, replace the link by the file itself."
        )


class Checkpoint:
    """Safetensors shards of a checkpoint: headers are read at once, values from memory-mapped files on demand.

    Args:
        files: paths of the shards, in the order in which to read them.
        weight_map: key -> name of the shard, from the index; None without an index.

    Raises:
        CheckpointError: a file is missing, truncated or not in safetensors, or lacks a key that the index maps to it.
    """

    def __init__(self, files: Iterable[str | Path], weight_map: Mapping[str, str] | None = None) -> None:
        self.files = [Path(file) for file in files]
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        self._handles = {}
        for file in tqdm(self.files, desc="Reading headers", unit="file", delay=PATIENCE):
            self._read_header(file)
        for key, name in (weight_map or {}).items():
            if key not in self.tensors:
                raise CheckpointError(
                    f"{self.files[0].parent / name} has no tensor {key}, which {INDEX_NAME} maps to this file. The "
                    "index and the shards belong to different checkpoints. Download both again."
                )

    @classmethod
    def open(cls, directory: str | Path) -> Checkpoint:
        """Opens the checkpoint in a directory, with or without an index.

        Raises:
            CheckpointError: see the class; or there is no safetensors checkpoint.
        """
        directory = Path(directory)
        weight_map = read_weight_map(directory)
        names = [SINGLE_NAME] if weight_map is None else sorted(set(weight_map.values()))
        return cls([directory / name for name in names], weight_map)

    def _read_header(self, file: Path) -> None:
        if file.suffix != ".safetensors":
            raise CheckpointError(
                f"{file} is not a safetensors file. Expected safetensors, the only supported file format. Convert the "
                "checkpoint first."
            )
        try:
            handle = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file} cannot be opened: {error}. It is truncated or not a safetensors file. Download it again."
            ) from error
        self._handles[file] = handle
        self.metadata[file] = handle.metadata() or {}
        for key in handle.keys():  # noqa: SIM118 - a handle can't be iterated
            part = handle.get_slice(key)
            if key in self.tensors:
                raise CheckpointError(
                    f"{file} and {self.tensors[key].file} both contain the tensor {key}. Expected it in one file. "
                    "Remove the files of the other checkpoint."
                )
            name = part.get_dtype()
            self.tensors[key] = TensorInfo(key, file, tuple(part.get_shape()), _DTYPES.get(name), name)

    def read(self, key: str) -> torch.Tensor:
        """Reads a whole tensor to the CPU."""
        return self._handles[self.tensors[key].file].get_tensor(key)

    def read_slice(self, key: str, index: int) -> torch.Tensor:
        """Reads `tensor[index : index + 1]` to the CPU, and nothing else of the tensor."""
        return self._handles[self.tensors[key].file].get_slice(key)[index : index + 1]

    @property
    def directory(self) -> Path:
        """Directory of the shards and config.json."""
        return self.files[0].parent

    def storage_of(self, key: str) -> Format | None:
        """Storage format of a weight that `read` dequantizes; None for a weight that is returned as stored."""
        return None

    def position(self, key: str) -> tuple[int, int]:
        """Sort key for the order on disk, file by file."""
        return self._positions[key]

    @cached_property
    def _positions(self) -> dict[str, tuple[int, int]]:
        order = {file: index for index, file in enumerate(self.files)}
        positions = {}
        for file, handle in self._handles.items():
            for offset, key in enumerate(handle.offset_keys()):
                positions[key] = (order[file], offset)
        return positions
