"""Index of the quantized weights of a checkpoint and of their tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..checkpoint import Checkpoint, TensorInfo
from .base import DiskLayout, Group, PackedTensor


class PackedIndex:
    """The quantized weights of a checkpoint, recognized by their tensors; lists of layers in the config are not used.

    Args:
        checkpoint: the checkpoint; only its headers are used.
        layouts: layouts that its weights may have.
    """

    def __init__(self, checkpoint: Checkpoint, layouts: Sequence[DiskLayout]) -> None:
        self.checkpoint = checkpoint
        self._found: dict[str, tuple[DiskLayout, Group]] = {}
        self._plain: dict[str, str] = {}
        self._codes: set[str] = set()
        self.orphans: dict[str, str] = {}
        """Key -> key of the weight, for scales and other metadata of a weight that is missing or not quantized."""
        for layout in layouts:
            self._find(layout)
        self.orphans = {key: plain for key, plain in self.orphans.items() if key not in self._plain}

    def _find(self, layout: DiskLayout) -> None:
        groups: dict[str, dict] = defaultdict(dict)
        for key, info in self.checkpoint.tensors.items():
            plain, ending = layout.plain_key(key)
            groups[plain][ending] = info
        for plain, tensors in groups.items():
            group = Group(plain, tensors)
            codes = layout.codes_of(group)
            if codes is not None and plain not in self._found:
                self._found[plain] = (layout, group)
                self._plain |= dict.fromkeys(group.keys, plain)
                self._codes.add(codes)
            elif codes is None:
                self.orphans |= {tensors[one].key: plain for one in tensors.keys() & {*layout.describing}}

    def __contains__(self, key: str) -> bool:
        """Whether a weight, given by its key in a 16-bit checkpoint, is quantized."""
        return key in self._found

    def plain_key(self, key: str) -> str:
        """The key in a 16-bit checkpoint of the weight that a tensor belongs to; the same key for other tensors."""
        return self._plain.get(key, key)

    def is_beside_codes(self, key: str) -> bool:
        """Whether a tensor belongs to a quantized weight, but is not its codes."""
        return key in self._plain and key not in self._codes

    def weights(self) -> list[str]:
        """The keys of the quantized weights in a 16-bit checkpoint."""
        return list(self._found)

    def layout(self, key: str) -> DiskLayout:
        return self._found[key][0]

    def info(self, key: str) -> TensorInfo:
        """The tensor of a weight, given by its key in a 16-bit checkpoint; its codes if it is quantized."""
        if key not in self._found:
            return self.checkpoint.tensors[key]
        layout, group = self._found[key]
        return self.checkpoint.tensors[layout.codes_of(group)]

    def keys_of(self, key: str) -> tuple[str, ...]:
        """Keys of all tensors of a quantized weight."""
        return self._found[key][1].keys

    def packed_tensor(self, key: str, parts: int = 1) -> PackedTensor:
        """`DiskLayout.packed_tensor`."""
        layout, group = self._found[key]
        return layout.packed_tensor(self.checkpoint, group, parts)
