"""Maps the tensors of a checkpoint to the stacks of a model, using the headers only."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    dot_natural_key,
    rename_source_key,
)

from ..experts import ExpertsLayout, find_experts, read_layout
from ..experts.architectures import checkpoint_conversions
from ..quantization import Format
from .checkpoint import Checkpoint, CheckpointError, stored_quantization
from .disk import BitsAndBytesLayout, DiskLayout, PackedIndex, PackedTensor, layouts_of
from .packed_sources import PackedSource
from .sources import DenseSource, NativeSource, Source, Sources, Target, each_source

_STACK = re.compile(r"experts\.(gate_up_proj|up_proj|down_proj)$")
_OF_STACK = re.compile(r"\.(?:gate_up_proj|up_proj|down_proj)\.(\w+)$")
_OF_EXPERT = re.compile(r"(.+)\.\d+\.(\w+)\.weight$")
_PER_EXPERT = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""Names of the gate, up and down projection of a single expert."""


def conversions_of(model: nn.Module) -> list[WeightTransform]:
    """transformers' conversion mapping of a model, plus entries of this package for classes without a mapping."""
    return get_model_conversion_mapping(model) + checkpoint_conversions(model)


def without_stacks(conversions: Iterable[WeightTransform]) -> list[WeightTransform]:
    """The conversions that don't create stacks of experts: renamings, and conversions of other layers."""
    return [conversion for conversion in conversions if not _STACK.search(conversion.target_patterns[0])]


def stack_targets(model: nn.Module) -> list[Target]:
    """All stacks of a model with unconverted experts, except stacks tied to another stack."""
    tied = getattr(model, "all_tied_weights_keys", {})
    targets = []
    for path, module in find_experts(model):
        layout: ExpertsLayout = read_layout(module, path)
        for projection in layout.projections:
            if f"{path}.{projection}" not in tied:
                parameter = module._parameters[projection]
                shape, parts = tuple(parameter.shape), layout.parts(projection)
                targets.append(Target(path, projection, shape, layout.is_transposed, parameter.dtype, parts))
    return targets


def ignored_keys(model: nn.Module) -> list[re.Pattern]:
    """Patterns of tensors that a model doesn't use: the ones listed by its class, and speculative decoding layers."""
    patterns = list(model._keys_to_ignore_on_load_unexpected or ())
    config = model.config.get_text_config(decoder=True)
    last, more = getattr(config, "num_hidden_layers", None), getattr(config, "num_nextn_predict_layers", None)
    if isinstance(last, int) and isinstance(more, int):
        # a class lists the indices of these layers for the published models only
        patterns += [rf"\blayers\.{number}\." for number in range(last, last + more)]
    return [re.compile(pattern) for pattern in patterns]


class SourceFinder:
    """Maps the tensors of a checkpoint to the stacks of a model.

    Args:
        model: model with unconverted experts modules, on any device.
        checkpoint: the checkpoint; only its headers are used.
        flipped: for a checkpoint saved by this package, the stacks stored in the opposite orientation to their class.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, flipped: Iterable[str] = ()) -> None:
        self.checkpoint = checkpoint
        self.flipped = frozenset(flipped)
        self.config = getattr(model, "config", None)
        self.targets = {target.name: target for target in stack_targets(model)}
        conversions = conversions_of(model)
        self.renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        self.prefix = getattr(model, "base_model_prefix", "")
        self.ignored = ignored_keys(model)
        # suffixes of the names of stacks: the tensor names of any format
        stored = {found[1] for key in checkpoint.tensors if (found := _OF_STACK.search(key))}
        native = [f"{name}.{parameter}" for name in self.targets for parameter in sorted(stored | {"weight"})]
        self.names = dict.fromkeys([*model.state_dict(), *native], True)
        self.beside_stacks: dict[str, str] = {}
        """Name in the model -> key of biases and norms of the experts modules; set by `find`."""
        self.native: dict[str, str] = {}
        """Name in the model -> key of tensors of stacks saved by this package; set by `find`."""
        self.packed_dtype: torch.dtype = torch.uint8
        """Dtype of the codes of other layers packed by bitsandbytes; set by `find`."""
        self.packed_beside: dict[str, PackedTensor] = {}
        """Name in the model -> quantized weight of another layer that this package reads; set by `find`."""
        self.index = PackedIndex(checkpoint, _layouts(checkpoint))

    def packed_names(self) -> set[str]:
        """Names in the model of all weights packed by bitsandbytes, including linear layers."""
        return {self._rename(key)[0] for key in self.index.weights() if self._is_for_bitsandbytes(key)}

    def _is_for_bitsandbytes(self, key: str) -> bool:
        return isinstance(self.index.layout(key), BitsAndBytesLayout)

    def plain_tensors(self) -> dict[str, str]:
        """Name in the model -> key of each tensor that is the same in the checkpoint, possibly under another name."""
        found = {}
        for key in self.checkpoint.tensors:
            name, pattern = self._rename(key)
            if pattern is None and name in self.names:
                found[name] = key
        return found

    def saved_linear(self, model: nn.Module, storage: Format) -> dict[str, dict[str, str]]:
        """Path of a linear layer -> name -> key of its tensors, for linear layers saved quantized by this package.

        Args:
            model: model with the linear layers.
            storage: storage format of the layers.
        """
        paths = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        tensors = {name for path in paths for name in _tensor_names(model.get_submodule(path), storage)}
        names = self.names | {f"{path}.{name}": True for path in paths for name in tensors}
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for key in self.checkpoint.tensors:
            if key.rpartition(".")[2] in tensors:
                path, _, name = rename_source_key(key, self.renamings, [], self.prefix, names)[0].rpartition(".")
                if path in paths:
                    found[path][name] = key
        return dict(found)

    def name_of(self, key: str) -> str:
        """Name of the model's parameter that a tensor is, or becomes part of."""
        return self._rename(key)[0]

    def known_keys(self) -> set[str]:
        """Keys of tensors that become part of a parameter of the model, including scales."""
        known = set()
        for key in self.checkpoint.tensors:
            name, _ = self._rename(self.index.plain_key(key))
            if name in self.names:
                known.add(key)
        return known

    def find(self) -> Sources:
        """The sources of all stacks.

        Raises:
            CheckpointError: tensors of a stack are missing, have two different layouts, are packed in a way that is
                not supported, or belong to experts that the model doesn't have.
        """
        plain: dict[str, dict[str | None, list[str]]] = defaultdict(lambda: defaultdict(list))
        paths = tuple(f"{target.path}." for target in self.targets.values())
        for key in sorted(self.checkpoint.tensors, key=dot_natural_key):
            if self.index.is_beside_codes(key):
                continue
            if key in self.index.orphans and self._is_orphan(key, self.index.orphans[key]):
                continue
            base = self.index.plain_key(key)
            name, pattern = self._rename(base)
            if base in self.index and name not in self.targets:
                name, pattern = self._of_single_expert(name, pattern)
            if name in self.targets:
                plain[name][pattern].append(base)
            elif name.rpartition(".")[0] in self.targets:
                self._add_to_stack(name, base, plain)
            elif name in self.names and name.startswith(paths):
                self.beside_stacks[name] = key
            else:
                self._check_unexpected(name, key)
        found: Sources = defaultdict(dict)
        for target in self.targets.values():
            found[target.path][target.projection] = self._source(target, plain)
        for name in self.names:
            is_of_stack = name in self.targets or name.rpartition(".")[0] in self.targets
            if name.startswith(paths) and not is_of_stack and name not in self.beside_stacks:
                raise CheckpointError(
                    f"The checkpoint has no tensor for {name}, a parameter of the experts module. It is incomplete. "
                    "Download it again."
                )
        self._check_packed_beside(found)
        return dict(found)

    def _check_packed_beside(self, found: Sources) -> None:
        """Checks the packed weights of other layers.

        Raises:
            CheckpointError: a weight can't be dequantized.
        """
        of_experts = {key for source in each_source(found) for key in source.keys}
        keys = [key for key in self.index.weights() if of_experts.isdisjoint(self.index.keys_of(key))]
        names = {key: self._rename(key) for key in sorted(keys)}
        others = [key for key, (name, _) in names.items() if name in self.names and self._is_for_bitsandbytes(key)]
        for key in others:
            self.index.packed_tensor(key)
            self.packed_dtype = self.checkpoint.tensors[key].dtype
            if self.packed_dtype != self.checkpoint.tensors[others[0]].dtype:
                raise CheckpointError(
                    f"{self.checkpoint.tensors[others[0]]} and {self.checkpoint.tensors[key]} store their codes in "
                    "different dtypes. Expected the same dtype for all (bnb_4bit_quant_storage). Download the "
                    "checkpoint again, or quantize it again with one dtype."
                )
        for key, (name, pattern) in names.items():
            if name not in self.names or self._is_for_bitsandbytes(key):
                continue
            if pattern is not None:
                operations = ", ".join(type(operation).__name__ for operation in self.by_pattern[pattern].operations)
                raise CheckpointError(
                    f"{self.index.info(key)} is quantized, but loading it into {name} requires {operations}, which is "
                    "not supported for quantized weights. Use the 16-bit checkpoint."
                )
            self.packed_beside[name] = self.index.packed_tensor(key)

    def _rename(self, key: str) -> tuple[str, str | None]:
        name, pattern = rename_source_key(key, self.renamings, self.converters, self.prefix, self.names)
        if name not in self.names and key in self.names:
            # names of the model itself are not renamed, as in transformers
            name, pattern = rename_source_key(key, [], [], self.prefix, self.names)
        if pattern is None and name not in self.names:
            native, _ = rename_source_key(key, self.renamings, [], self.prefix, self.names)
            name = native if native in self.names else name
        return name, pattern

    def _add_to_stack(self, name: str, key: str, plain: dict) -> None:
        target_name, _, parameter = name.rpartition(".")
        if parameter == "weight":
            plain[target_name][None].append(key)
        else:
            self.native[name] = key

    def _is_orphan(self, key: str, base: str) -> bool:
        """Whether neither a tensor of scales or other metadata nor its weight is a parameter of the model.

        Raises:
            CheckpointError: its weight is a parameter of the model, but is missing or not quantized.
        """
        name, _ = self._rename(base)
        if self._rename(key)[0] in self.names:
            return False
        if name.removesuffix(".weight") in self.targets or name in self.names:
            weight = self.checkpoint.tensors.get(base)
            found = "which the checkpoint does not have" if weight is None else f"but {weight} is not quantized"
            raise CheckpointError(
                f"{self.checkpoint.tensors[key]} belongs to {base}, {found}. The checkpoint is incomplete, or a "
                "mixture of two. Download it again."
            )
        return True

    def _of_single_expert(self, name: str, pattern: str | None) -> tuple[str, str | None]:
        """The stack of a weight of a single expert, found by its usual name.

        For classes whose 16-bit checkpoints have fused experts, transformers has no conversion of single experts, but
        quantized checkpoints may store experts separately.
        """
        match = _OF_EXPERT.fullmatch(name)
        if pattern is not None or match is None:
            return name, pattern
        path, projection = match.groups()
        for names in _PER_EXPERT:
            is_gated = f"{path}.gate_up_proj" in self.targets
            stacks = ("gate_up_proj" if is_gated else "", "gate_up_proj" if is_gated else "up_proj", "down_proj")
            stack = stacks[names.index(projection)] if projection in names else ""
            target = self.targets.get(f"{path}.{stack}")
            if target is None:
                continue
            sources = [f"{path}.*.{one}.weight" for one, of_stack in zip(names, stacks) if of_stack == stack]
            joins = [Concatenate(dim=1)] if len(sources) > 1 else []
            if len(sources) not in (1, target.parts):  # interleaved; codes in blocks can't be interleaved
                continue
            if sources[0] not in self.by_pattern:
                converter = WeightConverter(sources, target.name, [MergeModulelist(dim=0), *joins])
                self.by_pattern |= dict.fromkeys(sources, converter)
            return target.name, f"{path}.*.{projection}.weight"
        return name, pattern

    def _check_unexpected(self, name: str, key: str) -> None:
        if name in self.names or any(pattern.search(name) for pattern in self.ignored):
            return
        for target in self.targets.values():
            if name.startswith(f"{target.path}."):
                raise CheckpointError(
                    f"{self.checkpoint.tensors[key]} belongs to the experts module {target.path}, but matches none of "
                    f"its parameters. Checkpoint and config do not match, or the layout is not supported. Use the "
                    f"original checkpoint of the model."
                )

    def _source(self, target: Target, plain: dict) -> Source:
        of_target = {name: key for name, key in self.native.items() if name.rpartition(".")[0] == target.name}
        lists, converter, turn = self._lists(target, plain)
        if of_target and lists:
            self._refuse_mixture(target, next(iter(of_target.values())), next(iter(lists.values()))[0])
        if of_target:
            # compare the names in the checkpoint: the model may be a submodule of the saved one, or contain it
            is_flipped = any(key.rpartition(".")[0] in self.flipped for key in of_target.values())
            return NativeSource(target, of_target, is_flipped)
        if not lists:
            raise CheckpointError(
                f"The checkpoint has no tensor for {target.name} (searched "
                f"{len(self.checkpoint.tensors)} tensors in {len(self.checkpoint.files)} files of "
                f"{self.checkpoint.files[0].parent}). It is incomplete, belongs to another model, or has an "
                "unsupported layout. Use the original checkpoint of the model; key_mapping does not apply to experts."
            )
        keys = [key for keys in lists.values() for key in keys]
        are_packed = [key in self.index for key in keys]
        if any(are_packed) != all(are_packed):
            self._refuse_mixture(target, keys[are_packed.index(True)], keys[are_packed.index(False)])
        if not any(are_packed):
            return DenseSource(target, lists, converter, self.config, self.checkpoint, turn)
        parts = target.parts if len(lists) == 1 else 1
        tensors = {pattern: [self.index.packed_tensor(key, parts) for key in keys] for pattern, keys in lists.items()}
        return PackedSource(target, tensors, converter, turn)

    def _lists(self, target: Target, plain: dict) -> tuple[dict[str, list[str]], WeightConverter | None, int]:
        """Keys by source pattern, in the converter's order; the converter; the index of the stack in its targets."""
        by_pattern = plain.get(target.name, {})
        if not by_pattern:
            for converter in self.converters:
                firsts = converter.target_patterns[0]
                for turn, pattern in enumerate(converter.target_patterns[1:], start=1):
                    other = plain.get(target.name.replace(pattern, firsts), {})
                    if pattern in target.name and not other.keys().isdisjoint(converter.source_patterns):
                        return _in_order(converter, other), converter, turn
            return {}, None, 0
        if len(by_pattern) > 1 and None in by_pattern:
            first, second = (keys[0] for keys in list(by_pattern.values())[:2])
            self._refuse_mixture(target, first, second)
        if None in by_pattern:
            return {target.name: by_pattern[None]}, None, 0
        converter = self.by_pattern[next(iter(by_pattern))]
        return _in_order(converter, by_pattern), converter, 0

    def _refuse_mixture(self, target: Target, one: str, other: str) -> None:
        raise CheckpointError(
            f"{self.index.info(one)} and {self.index.info(other)} both belong to {target.name}, but have "
            "different layouts or storages. The checkpoint is a mixture of two. Download it again."
        )


def _layouts(checkpoint: Checkpoint) -> list[DiskLayout]:
    try:
        return layouts_of(stored_quantization(checkpoint.directory))
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.directory / 'config.json'}: {error}") from error


def _tensor_names(layer: nn.Linear, storage: Format) -> Iterable[str]:
    return storage.tensors(layer.out_features, layer.in_features)


def _in_order(converter: WeightConverter, by_pattern: dict[str | None, list[str]]) -> dict[str, list[str]]:
    """The keys found for each pattern, in the converter's order.

    A pattern may have no keys: floating-point weights have no scales. If required keys are missing, the check of the
    stack's shape fails.
    """
    return {pattern: by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern}
