"""Which tensors of a checkpoint are quantized weights, and what belongs to each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from ..checkpoint import Checkpoint, TensorInfo
from .base import DiskLayout, Group, PackedTensor


class PackedIndex:
    """The quantized weights of a checkpoint, tensor by tensor: what the config says of layers isn't asked.

    Args:
        checkpoint: by its headers.
        layouts: in which it may have weights.
    """

    def __init__(self, checkpoint: Checkpoint, layouts: Sequence[DiskLayout]) -> None:
        self.checkpoint = checkpoint
        self._found: dict[str, tuple[DiskLayout, Group]] = {}
        self._plain: dict[str, str] = {}
        self._codes: set[str] = set()
        self.orphans: dict[str, str] = {}
        """Key -> key of the weight, of tensors that describe a weight which isn't there, or not quantized."""
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
        """Whether a weight, by the key that it would have in 16 bits, is quantized."""
        return key in self._found

    def plain_key(self, key: str) -> str:
        """The key that the weight would have in a 16-bit checkpoint, of one of its tensors; others keep theirs."""
        return self._plain.get(key, key)

    def is_beside_codes(self, key: str) -> bool:
        """Whether a tensor belongs to a quantized weight, but isn't its codes."""
        return key in self._plain and key not in self._codes

    def weights(self) -> list[str]:
        """The keys that the quantized weights would have in a 16-bit checkpoint."""
        return list(self._found)

    def layout(self, key: str) -> DiskLayout:
        return self._found[key][0]

    def info(self, key: str) -> TensorInfo:
        """The tensor of a weight, by the key that it would have in 16 bits: its codes, if it is quantized."""
        if key not in self._found:
            return self.checkpoint.tensors[key]
        layout, group = self._found[key]
        return self.checkpoint.tensors[layout.codes_of(group)]

    def keys_of(self, key: str) -> tuple[str, ...]:
        """All tensors of a quantized weight."""
        return self._found[key][1].keys

    def packed_tensor(self, key: str, parts: int = 1) -> PackedTensor:
        """`DiskLayout.packed_tensor`."""
        layout, group = self._found[key]
        return layout.packed_tensor(self.checkpoint, group, parts)
