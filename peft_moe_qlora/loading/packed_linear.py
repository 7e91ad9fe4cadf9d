"""Linear layers quantized in the checkpoint: loaded unchanged, or dequantized after the rest of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn import Params4bit
from torch import nn
from tqdm.auto import tqdm
from transformers.quantizers.quantizers_utils import should_convert_module

from ..progress import PATIENCE
from ..quantization import Format, QuantizedStack
from ..quantized_linear import QuantizedLinear
from .checkpoint import Checkpoint, CheckpointError
from .disk import PackedTensor
from .finder import SourceFinder


class PackedWeight(NamedTuple):
    """A weight that is read after transformers has loaded the others.

    Args:
        name: name of the parameter in the model.
        packed: the weight in the checkpoint.
        template: the parameter to create from the dequantized weight; None if its codes are kept.
    """

    name: str
    packed: PackedTensor
    template: nn.Parameter | None

    @property
    def tensor_names(self) -> list[str]:
        """Names in the model that transformers must not find in the checkpoint."""
        path = self.name if self.template is not None else self.name.rpartition(".")[0]
        return [f"{path}.{name}" for name in self.packed.storage.tensors(*self.packed.shape)]


def attach_packed_weights(
    model: nn.Module, found: Mapping[str, PackedTensor], keeps_codes: bool, skip_modules: list[str] | None = None
) -> list[PackedWeight]:
    """Creates modules for quantized weights in a model on the meta device, under names not found in the checkpoint.

    Args:
        model: changed in place: if codes are kept, plain linear layers are replaced by `QuantizedLinear`; in all other
            modules, a placeholder replaces the parameter until `fill_packed_weights`.
        found: name of the parameter -> weight.
        keeps_codes: whether to keep the codes.
        skip_modules: modules to dequantize even if `keeps_codes`.

    Raises:
        CheckpointError: a weight and its parameter have different shapes; the model is then unusable.
    """
    weights = []
    for name, packed in found.items():
        path, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(path)
        parameter = module._parameters[parameter_name]
        if len(packed.shape) != 2 or packed.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{packed.key} is a quantized weight of shape {list(packed.shape)}. Expected {list(parameter.shape)} "
                f"for {name}. Checkpoint and config do not match; download both again."
            )
        # a subclass may use its weight differently
        is_skipped = not should_convert_module(path, skip_modules)
        is_kept = keeps_codes and not is_skipped and type(module) is nn.Linear and parameter_name == "weight"
        if is_kept:
            out_features, in_features = packed.shape
            layer = QuantizedLinear(
                in_features, out_features, packed.storage, module.bias is not None, parameter.dtype, "meta"
            )
            layer.bias = module.bias
            _replace(model, path, layer)
        else:
            holder = QuantizedStack(torch.Size((1, *packed.shape)), parameter.dtype, False, packed.storage, "meta")
            holder._is_hf_initialized = module._is_hf_initialized = True
            del module._parameters[parameter_name]
            module.add_module(parameter_name, holder)
        weights.append(PackedWeight(name, packed, None if is_kept else parameter))
    return weights


def attach_saved_linear(model: nn.Module, finder: SourceFinder, storage: Format) -> None:
    """Replaces the linear layers of a model on the meta device whose codes this package has saved.

    Args:
        model: changed in place; transformers' loader then finds the tensors under their names.
        finder: finder of the checkpoint.
        storage: storage format of those layers.

    Raises:
        CheckpointError: a tensor of a layer is missing, or has another shape or dtype.
    """
    for path, keys in finder.saved_linear(model, storage).items():
        module = model.get_submodule(path)
        bias = module.bias
        layer = QuantizedLinear(
            module.in_features, module.out_features, storage, bias is not None, module.weight.dtype, "meta"
        )
        for name, spec in storage.tensors(module.out_features, module.in_features).items():
            if name not in keys:
                raise CheckpointError(
                    f"The checkpoint has {next(iter(keys.values()))}, but not {path}.{name} of the same layer. It is "
                    "incomplete; save or download it again."
                )
            info = finder.checkpoint.tensors[keys[name]]
            if (info.shape, info.dtype) != (tuple(spec.shape), spec.dtype):
                raise CheckpointError(
                    f"{info} does not match the layer {path} stored as {storage}. Expected {spec.dtype} "
                    f"{list(spec.shape)}. Save or download the checkpoint again."
                )
        layer.bias = bias
        _replace(model, path, layer)


def _replace(model: nn.Module, path: str, layer: QuantizedLinear) -> None:
    layer._is_hf_initialized = True
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


@torch.no_grad()
def fill_packed_weights(model: nn.Module, weights: list[PackedWeight], checkpoint: Checkpoint) -> None:
    """Reads quantized weights into the modules created by `attach_packed_weights`, on their devices.

    Raises:
        CheckpointError: see `PackedTensor.read`.
        ValueError: a module is offloaded.
    """
    for name, packed, template in tqdm(weights, desc="Reading quantized layers", unit="layer", delay=PATIENCE):
        path, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(path)
        holder = module if template is None else module._modules[parameter_name]
        if any(tensor.is_meta for tensor in holder.parameters()):
            raise ValueError(
                f"device_map offloads {name} to the CPU or the disk, which is not supported for quantized weights. "
                "Allow more GPU memory (device_map, max_memory), or use device_map='cpu'."
            )
        tensors = packed.read(checkpoint)
        if template is None:
            module.set_tensors(tensors)
            continue
        holder.set_tensors(0, tensors)
        weight = holder.decode_expert(0, holder.dtype)
        del module._modules[parameter_name]
        module.register_parameter(parameter_name, _parameter(weight, template))


def _parameter(weight: torch.Tensor, template: nn.Parameter) -> nn.Parameter:
    if not isinstance(template, Params4bit):
        return nn.Parameter(weight, requires_grad=False)
    options: dict[str, Any] = dict(template.__dict__)
    options.pop("_is_hf_initialized", None)
    # `to` quantizes the weight
    return Params4bit(weight, requires_grad=False, **options).to(weight.device)


def linear_storage(weights: list[PackedWeight]) -> Format | None:
    """The storage format of the layers whose codes are kept; None if there are no such layers.

    Raises:
        CheckpointError: the layers have different formats.
    """
    kept = [weight for weight in weights if weight.template is None]
    for weight in kept:
        if weight.packed.storage != kept[0].packed.storage:
            raise CheckpointError(
                f"{weight.name} is stored as {weight.packed.storage} and {kept[0].name} as {kept[0].packed.storage}. "
                "Expected one storage for all linear layers. Load them in 16 bits: "
                "MoeQuantizationConfig(storage='as stored', packed_linear='16 bits')."
            )
    return kept[0].packed.storage if kept else None
