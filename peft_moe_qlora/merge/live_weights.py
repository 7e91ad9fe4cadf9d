"""The merged weights of a model in training under its checkpoint's keys, for an engine that generates with them.

Weights are not requantized and the model stays unchanged. The tensors are bitwise equal to those that
`merge_and_unload(dtype=...)` and `save_pretrained` would write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from ..experts import QuantizedExperts
from ..layer import ExpertsLora
from ..linear_lora import four_bit_matrix
from ..loading.checkpoint_names import CheckpointNames
from ..loading.restoring import dtypes_as_loaded
from ..quantization import Stack
from ..quantized_linear import QuantizedLinear
from ..quantized_linear_lora import QuantizedLinearLora
from ..sharded import refuse_sharded
from ..targets import trained_expert_biases
from .in_memory import check_mergeable

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLOATING = (*_DTYPES, torch.float64)
JOINING = ("vllm",)
"""Engines that fuse layers and can load only all parts of a fused layer together."""

_ENGINES = (None, *JOINING)


@dataclass(frozen=True)
class Weight:
    """A weight of the merged model.

    Args:
        name: name in the model.
        is_adapted: whether an adapter covers it, regardless of its values.
        block: path of the module that contains it and its sibling layers.
        value: returns the weight; fp32 if there is a delta.
    """

    name: str
    is_adapted: bool
    block: str
    value: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class MergedStack:
    """A stack of the merged model, computed expert by expert.

    Args:
        path: path of the experts module.
        projection: name of the stack.
        is_adapted: as in `Weight`.
        num_parts: number of matrices that are vertically concatenated in an expert's matrix in the model class.
        shape: `(E, rows, columns)` in the model class.
        matrix: returns the `(rows, columns)` fp32 matrix of an expert.
    """

    path: str
    projection: str
    is_adapted: bool
    num_parts: int
    shape: tuple[int, int, int]
    matrix: Callable[[int], torch.Tensor]

    @property
    def name(self) -> str:
        return f"{self.path}.{self.projection}"

    @property
    def block(self) -> str:
        return self.path


class LiveWeights:
    """Iterates over `(checkpoint key, tensor)` of a model merged with the current state of its adapters.

    Names are resolved once, when the object is created; iterate over it after each step. One weight is in memory at a
    time: one expert in fp32 and in `dtype` or, if the checkpoint stores a stack as one tensor, that stack in `dtype`.
    Unchanged tensors are the model's own: read them before the next step, and do not write to them.

    Args:
        model: a PeftModel of this package, on any device, with unmerged adapters.
        engine: `"vllm"`: include sibling layers of adapted ones, because vLLM fuses such layers (q, k and v; gate and
            up; all projections of experts) and loads only complete fused layers. None: only adapted layers.
        only_adapted: exclude weights that no adapter changes. Otherwise all weights are included, and quantized ones
            are decoded.
        dtype: dtype of the weights, as for `from_pretrained(dtype=dtype)`. Default: the model's dtype.
        adapter_names: the adapters to merge. Default: the adapters that are active at creation.

    Raises:
        ValueError: an option has an unknown value, an adapter is unknown or already merged, parameters are sharded, or
            a layer's class is not supported. The error names it.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: str | None = "vllm",
        only_adapted: bool = True,
        dtype: torch.dtype | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        tuner = model.base_model if isinstance(model, PeftModel) else model
        if not isinstance(tuner, LoraModel) or not isinstance(tuner.model, PreTrainedModel):
            raise ValueError(
                f"model is a {type(model).__name__}. Expected a PeftModel with LoRA on a transformers model."
            )
        if engine not in _ENGINES:
            raise ValueError(f"engine={engine!r} is unknown. Choose one of {_ENGINES}.")
        self.tuner, self.model = tuner, tuner.model
        self.dtype = dtype or self.model.dtype
        if self.dtype not in _DTYPES:
            raise ValueError(
                f"dtype={self.dtype} is not supported for merged weights. Choose torch.bfloat16, torch.float16 or "
                "torch.float32."
            )
        self.adapter_names = list(dict.fromkeys(tuner.active_adapters if adapter_names is None else adapter_names))
        unknown = [name for name in self.adapter_names if name not in tuner.peft_config]
        if unknown:
            raise ValueError(
                f"The model has no adapter {', '.join(map(repr, unknown))}. Choose from {sorted(tuner.peft_config)}."
            )
        refuse_sharded(self.model, "streaming merged weights")
        self._names = CheckpointNames(self.model)
        self._dtypes = dtypes_as_loaded(self.model, self.dtype)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        found = [one for one in _weights(self.model, self.adapter_names) if one.name not in tied]
        self._found = {one.name: one for one in _with_biases(found, tuner, self.adapter_names)}
        adapted = [one for one in self._found.values() if one.is_adapted]
        names = {one.name for one in adapted}
        if engine in JOINING:
            blocks = {one.block for one in adapted}
            names |= {one.name for one in self._found.values() if one.block in blocks}
        groups = self._names.groups(self._found)
        plain = self._names.keys(one for group in groups for one in group if self._is_plain(group))
        wanted = [group for group in groups if not only_adapted or not names.isdisjoint(group)]
        self._plan = [(group, [plain[group[0]]] if group[0] in plain else self._keys(group)) for group in wanted]

    def _is_plain(self, group: list[str]) -> bool:
        return isinstance(self._found[group[0]], Weight) and self._names.is_plain(group[0])

    def _keys(self, group: list[str]) -> list[str] | None:
        """The keys of a stack with separate tensors for each expert's parts; None for all other weights."""
        one = self._found[group[0]]
        is_stack = len(group) == 1 and isinstance(one, MergedStack)
        return self._names.of_parts(one.name, one.shape[0], one.num_parts) if is_stack else None

    @property
    def names(self) -> list[str]:
        """The names in the model of all streamed weights."""
        return [name for group, _ in self._plan for name in group]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        check_mergeable(self.model, self.adapter_names)
        _check_not_merged(self.model)
        for group, keys in self._plan:
            one = self._found[group[0]]
            if keys is None:
                with torch.no_grad():
                    converted = self._names.convert({name: self._whole(self._found[name]) for name in group})
                while converted:
                    key = next(iter(converted))
                    yield key, converted.pop(key).contiguous()
            elif isinstance(one, MergedStack):
                yield from self._parts(one, keys)
            else:
                yield keys[0], self._whole(one)

    def _parts(self, stack: MergedStack, keys: list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        dtype = self._dtypes.get(stack.name, self.dtype)
        for expert in range(stack.shape[0]):
            of_expert = keys[expert * stack.num_parts : (expert + 1) * stack.num_parts]
            rounded = _rounded(stack.matrix(expert), dtype, f"{stack.name} of expert {expert}")
            yield from zip(of_expert, rounded.chunk(stack.num_parts))

    @torch.no_grad()
    def _whole(self, one: Weight | MergedStack) -> torch.Tensor:
        """The weight or stack as one tensor, rounded once."""
        dtype = self._dtypes.get(one.name, self.dtype)
        if isinstance(one, Weight):
            value = one.value().detach()
            return _rounded(value, dtype, one.name) if value.dtype in _FLOATING else value
        first = one.matrix(0)
        stack = torch.empty(one.shape, dtype=dtype, device=first.device)
        for expert in range(one.shape[0]):
            stack[expert] = _rounded(first if expert == 0 else one.matrix(expert), dtype, one.name)
        return stack


def live_weights(
    model: nn.Module,
    engine: str | None = "vllm",
    only_adapted: bool = True,
    dtype: torch.dtype | None = None,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterates over the merged weights once; to repeat it, keep a `LiveWeights`, which caches the names."""
    return iter(LiveWeights(model, engine, only_adapted, dtype, adapter_names))


def _rounded(exact: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    rounded = exact.to(dtype)
    # factors and weights are finite, so only the narrower range of float16 can result in infinite values
    if rounded is not exact and dtype == torch.float16 and not torch.isfinite(rounded).all():
        raise ValueError(f"{name} contains values that exceed the range of {dtype}. Set dtype=torch.bfloat16.")
    return rounded


def _check_not_merged(model: nn.Module) -> None:
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ValueError(
                f"{path} has merged adapters, so its weights were already rounded. Call unmerge_adapter() first."
            )


def _weights(model: nn.Module, names: Sequence[str]) -> Iterator[Weight | MergedStack]:
    """All weights and persistent buffers, under their names in the model without adapters."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, path: str, is_saved: bool) -> Iterator[Weight | MergedStack]:
        if module in seen:
            return
        seen.add(module)
        if isinstance(module, ModulesToSaveWrapper):
            own = [name for name in names if name in module.modules_to_save]
            yield from walk(module.modules_to_save[own[0]] if own else module.original_module, path, bool(own))
            return
        if isinstance(module, AuxiliaryTrainingWrapper):
            yield from walk(module.token_adapter, path, is_saved)
            return
        layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(module, QuantizedExperts):
            yield from _stacks(module, path, names)
        is_linear = isinstance(layer, (nn.Linear, nn.Embedding))
        if isinstance(module, LoraLayer) and not is_linear:
            raise ValueError(
                f"{path} is of class {type(layer).__name__}, for which streaming merged weights is not supported. "
                "Exclude it from target_modules, or merge the adapter into a directory."
            )
        if is_linear:
            own = _adapters_on(module, names)
            is_adapted = bool(own) or is_saved or getattr(layer.weight, "requires_grad", False)
            yield Weight(f"{path}.weight", is_adapted, path.rpartition(".")[0], _value_of(module, layer, path, own))
        tensors = dict(layer._parameters)
        tensors |= {
            name: tensor for name, tensor in layer._buffers.items() if name not in layer._non_persistent_buffers_set
        }
        block = path if isinstance(module, QuantizedExperts) else path.rpartition(".")[0]
        of_storage = layer.tensors if isinstance(layer, QuantizedLinear) else {}
        for name, tensor in tensors.items():
            if tensor is None or name in of_storage or (is_linear and name == "weight"):
                continue
            own_name = f"{path}.{name}".removeprefix(".")
            yield Weight(own_name, is_saved or tensor.requires_grad, block, _getter(layer, name))
        for name, child in layer.named_children():
            if isinstance(child, (Stack, ExpertsLora)):
                continue
            # other parameters of the replaced experts module keep their original names
            is_rest = isinstance(module, QuantizedExperts) and name == "original"
            yield from walk(child, path if is_rest else f"{path}.{name}".removeprefix("."), is_saved)

    yield from walk(model, "", False)


def _getter(module: nn.Module, name: str) -> Callable[[], torch.Tensor]:
    # looked up at each call, because training engines and casts replace the tensors
    return lambda: getattr(module, name)


def _stacks(experts: QuantizedExperts, path: str, names: Sequence[str]) -> Iterator[MergedStack]:
    for projection in experts.layout.projections:
        stack, child = experts.stack(projection), experts._modules[projection]
        is_adapted = isinstance(child, ExpertsLora) and any(name in child.lora_A for name in names)
        is_turned = stack.is_transposed != experts.layout.is_transposed
        rows, columns = stack.shape[1:][::-1] if is_turned else stack.shape[1:]
        yield MergedStack(
            path,
            projection,
            is_adapted,
            experts.layout.parts(projection),
            (stack.num_experts, rows, columns),
            _matrix_of(experts, projection, is_adapted, is_turned, names),
        )


def _matrix_of(
    experts: QuantizedExperts, projection: str, is_adapted: bool, is_turned: bool, names: Sequence[str]
) -> Callable[[int], torch.Tensor]:
    @torch.no_grad()
    def matrix(expert: int) -> torch.Tensor:
        stack = experts.stack(projection)
        if is_adapted:
            layer = experts._modules[projection]
            exact = stack.merged_matrices(lambda number: layer.expert_delta(names, number))(expert)
        else:
            exact = stack.decode_expert(expert, torch.float32)
        return exact.T.contiguous() if is_turned else exact

    return matrix


def _adapters_on(module: nn.Module, names: Sequence[str]) -> list[str]:
    """The given adapters that exist on a layer."""
    if isinstance(module, TrainableTokensLayer):
        return [name for name in names if name in module.trainable_tokens_delta]
    return [name for name in names if isinstance(module, LoraLayer) and name in module.scaling]


def _value_of(module: nn.Module, layer: nn.Module, path: str, names: list[str]) -> Callable[[], torch.Tensor]:
    """Returns a function that computes the merged weight of a linear layer or an embedding.

    Args:
        module: the layer, or the adapter layer around it.
        layer: the layer without adapters.
        path: path of the layer.
        names: names of its adapters.
    """
    if names and isinstance(module, TrainableTokensLayer):
        return lambda: module.get_merged_weights(names)
    decode = _decoder_of(layer, path)
    if not names:
        return decode
    add = module._delta if isinstance(module, QuantizedLinearLora) else partial(_delta, module)
    return lambda: decode().float() + add(names)


def _delta(module: LoraLayer, names: Sequence[str]) -> torch.Tensor:
    """`(out, in)` fp32; `(rows, features)` of an embedding. PEFT's `get_delta_weight` rounds to the factors' dtype."""
    total = None
    for name in names:
        if name in module.lora_embedding_A:
            A, B = module.lora_embedding_A[name], module.lora_embedding_B[name]
            delta = (module.scaling[name] * (B.float() @ A.float())).T
        else:
            delta = module.scaling[name] * (module.lora_B[name].weight.float() @ module.lora_A[name].weight.float())
        total = delta if total is None else total + delta
    return total


def _decoder_of(layer: nn.Module, path: str) -> Callable[[], torch.Tensor]:
    """Returns a function that computes the weight of a layer, decoded to fp32 if it is quantized."""
    if isinstance(layer, QuantizedLinear):
        return lambda: layer.decode(torch.float32)
    if isinstance(layer, Linear4bit):

        def decode() -> torch.Tensor:
            matrix = four_bit_matrix(layer)
            if matrix is None:
                raise ValueError(
                    f"{path} is a 4-bit layer of bitsandbytes that this package cannot decode: it is not quantized "
                    "yet, packed for a CPU, or has unknown scales. Load the model with MoeQuantizationConfig."
                )
            return matrix.decode(torch.float32)

        return decode
    if layer.weight.dtype not in _FLOATING:
        raise ValueError(
            f"{path} is of class {type(layer).__name__} with weights in {layer.weight.dtype}, for which streaming is "
            "not supported. Load the model with MoeQuantizationConfig, or load these layers in 16 bits."
        )
    return _getter(layer, "weight")


def _with_biases(
    found: list[Weight | MergedStack], tuner: LoraModel, names: Sequence[str]
) -> list[Weight | MergedStack]:
    """Marks biases that a config trains as adapted, since in inference mode `requires_grad` does not show it."""
    changed: set[str] = set()
    for name in names:
        bias = tuner.peft_config[name].bias
        if bias == "all":
            changed |= {one.name for one in found if one.name.endswith("bias")}
        elif bias == "lora_only":
            changed |= {
                f"{path}.bias"
                for path, layer in tuner.model.named_modules()
                if isinstance(layer, LoraLayer) and name in layer.scaling
            }
            changed |= {own for own, _ in trained_expert_biases(tuner.model, bias)}
    return [replace(one, is_adapted=True) if one.name in changed else one for one in found]
