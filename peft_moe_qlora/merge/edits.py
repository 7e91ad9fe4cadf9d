"""The changes that merging an adapter makes to a checkpoint's tensors: planned from headers, computed on demand."""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ..base_identity import BaseIdentity, differing_sample, sample
from ..layouts.adapter_file import AdapterFile, ExpertFactors, linear_scaling
from ..layouts.base_model import BaseModel
from ..layouts.non_expert import Pair, adapted_weights, beside_factors, factor_pairs, name_in_model
from ..loading.checkpoint import Checkpoint, CheckpointError
from ..loading.decoded import DecodedCheckpoint
from ..loading.finder import SourceFinder
from ..loading.sources import DenseSource, ExpertPart, Places, Source, each_source
from ..quantization import Format, QuantizedStack
from ..targets import UNTIE

ONTO = ("quantized", "base")
"""The weights that a delta is added to: those used in training, or the checkpoint's own."""

_STACKS_AT_A_TIME = 4
_REMEDY = "Merge in memory instead: load base and adapter, and call merge_and_unload(dtype=...)."


class Edit(NamedTuple):
    """New values of a checkpoint tensor, or of a slice of one.

    Args:
        before: fp32 values before the merge.
        exact: fp32 values with the delta.
    """

    before: torch.Tensor
    exact: torch.Tensor


@dataclass(frozen=True)
class StackEdit:
    """A stack of experts as used in training, plus the adapter.

    Args:
        source: the stack's tensors in the checkpoint.
        factors: factors of the delta; None if the adapter does not change the stack.
        storage: format of the experts in training; None for that of the checkpoint.
        dtype: dtype that they were cast to before quantization; None for that of the checkpoint.
    """

    source: DenseSource
    factors: ExpertFactors | None
    storage: Format | None
    dtype: torch.dtype | None

    @property
    def name(self) -> str:
        return self.source.target.name

    def features_of(self, places: torch.Tensor) -> torch.Tensor:
        """The output features covered by a part of the matrix with the given `ExpertPart.places`."""
        _, _, columns = self.source.target.shape
        return (places % columns if self.source.target.is_transposed else places // columns).unique()

    def has_delta(self, expert: int, features: torch.Tensor) -> bool:
        """Whether the adapter changes features of an expert; an expert without training tokens has zero deltas."""
        if self.factors is None:
            return False
        return bool(self.factors.A[expert].any() and self.factors.B[expert][features].any())

    def edits(self, expert: int, checkpoint: Checkpoint, places: Places) -> Iterator[tuple[ExpertPart, Edit]]:
        """The edits of the tensors, or slices, of one expert.

        Raises:
            CheckpointError: a weight is not finite.
        """
        matrix = self.source.read_expert(expert, checkpoint)
        is_transposed = self.source.target.is_transposed
        before = _as_trained(matrix, is_transposed, self.storage, self.dtype, self.name, self.source.target.parts)
        exact = before
        if self.factors is not None:
            A, B = self.factors.A[expert].float(), self.factors.B[expert].float()
            delta = (self.factors.scaling * B) @ A  # same order as in memory, for bitwise equal results
            exact = before + (delta.T if is_transposed else delta)
        for part in self.source.parts_of_expert(expert, checkpoint, places):
            of_before = part.of(before)
            yield part, Edit(of_before, of_before if exact is before else part.of(exact))


@dataclass(frozen=True)
class TensorEdit:
    """A single tensor as used in training, plus a delta; or its replacement.

    Args:
        name: name in the model.
        delta: returns the fp32 delta; None for no delta.
        replacement: the tensor that replaces it; None to keep it.
        storage: as in `StackEdit`.
        dtype: as in `StackEdit`.
    """

    name: str
    delta: Callable[[], torch.Tensor] | None = None
    replacement: torch.Tensor | None = None
    storage: Format | None = None
    dtype: torch.dtype | None = None

    def edit(self, tensor: torch.Tensor) -> Edit:
        before = _as_trained(tensor, False, self.storage, self.dtype, self.name)
        if self.replacement is not None:
            return Edit(before, self.replacement.float())
        return Edit(before, before if self.delta is None else before + self.delta())


@dataclass
class MergePlan:
    """The edits of a checkpoint's tensors; a tensor that is in neither dictionary is copied.

    Args:
        of_experts: key -> stacks and experts that the tensor contains; all experts if the stack is one tensor.
        of_tensors: key -> edit.
        changed: keys of the tensors that the adapter should change.
        kept_in_fp32: keys of fp32 tensors that the model keeps in fp32, regardless of the requested dtype.
    """

    of_experts: dict[str, list[tuple[StackEdit, int]]] = field(default_factory=lambda: defaultdict(list))
    of_tensors: dict[str, TensorEdit] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)
    kept_in_fp32: frozenset[str] = frozenset()
    _places: OrderedDict[str, Places] = field(default_factory=OrderedDict)

    def places(self, source: DenseSource, checkpoint: Checkpoint) -> Places:
        """`source.find_places`, cached for a few stacks; for all stacks the cache would be as large as the model."""
        name = source.target.name
        if name not in self._places:
            self._places[name] = source.find_places(checkpoint)
        self._places.move_to_end(name)
        if len(self._places) > _STACKS_AT_A_TIME:
            self._places.popitem(last=False)
        return self._places[name]

    @property
    def stacks(self) -> list[StackEdit]:
        return list({id(edit): edit for edits in self.of_experts.values() for edit, _ in edits}.values())


def plan_merge(
    base: BaseModel, checkpoint: Checkpoint, adapter: AdapterFile, onto: str, every_stack: bool = False
) -> MergePlan:
    """Plans the changes that an adapter makes to the checkpoint of its base.

    Args:
        base: the model.
        checkpoint: its weights, in floating point.
        adapter: the adapter to merge.
        onto: `"quantized"`: merge onto the weights used in training; `"base"`: onto those of the checkpoint.
        every_stack: also plan edits of unchanged stacks.

    Raises:
        ValueError: the adapter belongs to another base, lacks tensors that its config requires, or changes a weight
            that is not a separate tensor in the checkpoint. The error names it.
        CheckpointError: the checkpoint is quantized, incomplete, or belongs to another model.
    """
    identity = BaseIdentity.of(adapter.config.base)
    finder = SourceFinder(base.model, checkpoint)
    sources = {source.target.name: source for source in each_source(finder.find())}
    for source in sources.values():
        if not isinstance(source, DenseSource):
            raise CheckpointError(
                f"{checkpoint.tensors[source.keys[0]]} is quantized. Expected a checkpoint in floating point. Pass "
                "the unquantized base, or merge in memory with merge_and_unload."
            )
    check_base(adapter, base, checkpoint, sources)
    plan = MergePlan(kept_in_fp32=_kept_in_fp32(base, checkpoint, finder))
    trained = onto == "quantized"
    dtype = getattr(torch, identity.dtype) if identity is not None and identity.dtype else None
    factors = {one.name: one for one in adapter.experts}
    for name, source in sources.items():
        is_dense = identity is not None and name in identity.dense_stacks
        storage = adapter.config.format if trained and not is_dense else None
        if storage is not None and storage == checkpoint.storage_of(source.keys[0]):
            storage = None  # the checkpoint decodes to the weights used in training
        edit = StackEdit(source, factors.pop(name, None), storage, dtype if trained else None)
        if edit.factors is None and storage is None and not every_stack:
            continue
        places = plan.places(source, checkpoint)
        features = [edit.features_of(of_part) for of_part in places.values()]
        for expert in range(source.target.num_experts):
            for part, of_part in zip(source.parts_of_expert(expert, checkpoint, places), features):
                plan.of_experts[part.key].append((edit, expert))
                if edit.has_delta(expert, of_part):
                    plan.changed.add(part.key)
    if factors:
        raise ValueError(
            f"The adapter changes {next(iter(factors))}, which is not a separate stack in {base.directory}. {_REMEDY}"
        )
    keys = finder.beside_stacks | finder.plain_tensors()
    _plan_tensors(plan, base, checkpoint, adapter, keys, identity if trained else None)
    return plan


def _kept_in_fp32(base: BaseModel, checkpoint: Checkpoint, finder: SourceFinder) -> frozenset[str]:
    """Keys of fp32 tensors that transformers' loader keeps in fp32, which it selects by their names in the model."""
    patterns = {*(base.model._keep_in_fp32_modules or ()), *(base.model._keep_in_fp32_modules_strict or ())}
    if not patterns:
        return frozenset()
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns))
    in_fp32 = (key for key, info in checkpoint.tensors.items() if info.dtype == torch.float32)
    return frozenset(key for key in in_fp32 if kept.search(finder.name_of(key)))


def check_base(adapter: AdapterFile, base: BaseModel, checkpoint: Checkpoint, sources: Mapping[str, Source]) -> None:
    """Rejects a base that the adapter was not trained on, if the adapter identifies its base; skips packed stacks.

    Args:
        adapter: the adapter to merge.
        base: the model.
        checkpoint: its weights.
        sources: name of a stack -> its tensors in the checkpoint.

    Raises:
        ValueError: model type or weights differ.
    """
    identity = BaseIdentity.of(adapter.config.base)
    if identity is None:
        return
    model_type = base.model.config.model_type
    if identity.model_type != model_type:
        raise ValueError(
            f"The adapter was trained on a model of type {identity.model_type}, but {base.directory} contains a model "
            f"of type {model_type}. Merge the adapter into its own base."
        )
    storage = adapter.config.format
    found = {}
    for name in identity.samples.keys() & sources.keys():
        if not isinstance(sources[name], DenseSource):
            continue
        target = sources[name].target
        if storage is not None and storage == checkpoint.storage_of(sources[name].keys[0]):
            found[name] = _sample_of_stored(sources[name], checkpoint, len(identity.samples[name]))
            continue
        matrix = sources[name].read_expert(0, checkpoint)
        if identity.dtype:
            matrix = matrix.to(getattr(torch, identity.dtype))
        if storage is None or name in identity.dense_stacks:
            found[name] = matrix.float().flatten()[: len(identity.samples[name])].tolist()
        else:
            found[name] = sample(QuantizedStack.from_dense(matrix[None], target.is_transposed, storage, target.parts))
    differing = differing_sample(identity, replace(identity, samples=found))
    if differing is not None:
        raise ValueError(
            f"{base.directory} has other weights than the adapter was trained on: {differing} differs. Merge the "
            "adapter into its own base; if the weights already contain the adapter, do not merge it again. If it was "
            "trained on a 4-bit checkpoint, merge it into that checkpoint (--quantize, or in memory)."
        )


def _sample_of_stored(source: DenseSource, checkpoint: DecodedCheckpoint, count: int) -> list[float]:
    """Like `sample`, for a stack whose first expert is stored in one or several vertically concatenated tensors."""
    scales = [checkpoint.scales_of(key, 0) for key in source.keys_of_expert(0)]
    return torch.cat(scales)[:count].tolist()


def _plan_tensors(
    plan: MergePlan,
    base: BaseModel,
    checkpoint: Checkpoint,
    adapter: AdapterFile,
    keys: dict[str, str],
    identity: BaseIdentity | None,
) -> None:
    """Plans edits of linear layers, embeddings, biases and modules that were trained in full.

    Args:
        plan: the plan to extend.
        base: the model.
        checkpoint: its weights.
        adapter: the adapter to merge.
        keys: name in the model -> key in the checkpoint.
        identity: identity of the base in training, to merge onto its weights; None to merge onto the checkpoint's.
    """

    def add(edit: TensorEdit, shape: tuple[int, ...]) -> None:
        key = keys.get(edit.name)
        if key is None:
            raise ValueError(
                f"The adapter changes {edit.name}, which is not a separate tensor in {base.directory}: it is part of "
                f"a larger tensor or does not exist. {_REMEDY}"
            )
        found = checkpoint.tensors[key].shape
        if found != shape:
            raise ValueError(
                f"The adapter changes {edit.name} with shape {list(shape)}, but the checkpoint has "
                f"{checkpoint.tensors[key]}. The adapter belongs to another base. Merge it into its own base."
            )
        plan.of_tensors[key] = edit

    def stored(module: str) -> dict:
        storage = identity.linear_storage(module) if identity is not None else None
        if storage is not None and storage == checkpoint.storage_of(keys.get(f"{module}.weight", "")):
            storage = None
        return {} if storage is None else {"storage": storage, "dtype": getattr(torch, identity.dtype)}

    in_full = _differing(beside_factors(adapter.non_expert), base, checkpoint, keys)
    check_not_tied([*adapted_weights(adapter.non_expert), *map(name_in_model, in_full)], base, keys)
    for pair in factor_pairs(adapter.non_expert):
        weight = f"{pair.name}.weight"
        delta = partial(_product, pair, linear_scaling(adapter.config, pair.name))
        shape = (pair.B.shape[0], pair.A.shape[1])
        add(TensorEdit(weight, delta=delta, **stored(pair.name)), shape[::-1] if pair.is_embedding else shape)
        if pair.has_delta:
            plan.changed.add(keys[weight])
    for saved, tensor in in_full.items():
        name = name_in_model(saved)
        if name not in keys:
            raise ValueError(
                f"The adapter contains {saved}, which is not a separate tensor in {base.directory}. {_REMEDY}"
            )
        add(TensorEdit(name, replacement=tensor), tuple(tensor.shape))
        plan.changed.add(keys[name])
    if identity is not None:
        for name, module in base.model.named_modules():
            weight = f"{name}.weight"
            if not isinstance(module, nn.Linear) or not stored(name) or keys.get(weight) in plan.of_tensors:
                continue
            if weight not in keys:
                raise ValueError(
                    f"{name} was stored as {stored(name)['storage']} in training, but it is not a separate tensor in "
                    f"{base.directory}. Merge onto the base's own weights (onto='base', --onto base), or in memory."
                )
            add(TensorEdit(weight, **stored(name)), tuple(module.weight.shape))


def _differing(
    tensors: dict[str, torch.Tensor], base: BaseModel, checkpoint: Checkpoint, keys: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """The adapter's full tensors that differ from those of the base."""
    tied_to = getattr(base.model, "all_tied_weights_keys", None) or {}
    found = {}
    for saved, tensor in tensors.items():
        name = name_in_model(saved)
        key = keys.get(name, keys.get(tied_to.get(name)))
        if key is None or not torch.equal(tensor.float(), checkpoint.read(key).float()):
            found[saved] = tensor
    return found


def check_not_tied(names: Iterable[str], base: BaseModel, keys: Mapping[str, str]) -> None:
    """Rejects changes of only one of two weights that share a tensor in the checkpoint.

    Args:
        names: names of the weights that an adapter changes.
        base: the model.
        keys: name in the model -> key in the checkpoint.

    Raises:
        ValueError: two weights are tied; the error names them.
    """
    tied_to = getattr(base.model, "all_tied_weights_keys", None) or {}
    for name in names:
        sharers = [other for other, source in tied_to.items() if source == name and other not in keys]
        if name in tied_to and name not in keys:
            sharers.append(tied_to[name])
        if sharers:
            raise ValueError(
                f"The adapter changes only {name}, but in {base.directory} {sharers[0]} is tied to it and would also "
                f"change. {UNTIE}"
            )


def _product(pair: Pair, scaling: float) -> torch.Tensor:
    product = scaling * (pair.B.float() @ pair.A.float())
    return product.T if pair.is_embedding else product


def _as_trained(
    matrix: torch.Tensor,
    is_transposed: bool,
    storage: Format | None,
    dtype: torch.dtype | None,
    name: str,
    parts: int = 1,
) -> torch.Tensor:
    """fp32 weights as used in training, in the orientation of the matrix.

    Raises:
        CheckpointError: a weight is not finite.
    """
    if not torch.isfinite(matrix).all():
        raise CheckpointError(
            f"{name} contains weights that are not finite. The checkpoint is damaged. Download it again."
        )
    if storage is None:
        return matrix.float()
    stack = QuantizedStack.from_dense(matrix.to(dtype or matrix.dtype)[None], is_transposed, storage, parts)
    decoded = stack.decode_expert(0, torch.float32)
    return decoded if stack.is_transposed == is_transposed else decoded.T
