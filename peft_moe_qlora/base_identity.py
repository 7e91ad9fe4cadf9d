"""The identity of the weights that an adapter was trained on, to recognize and to reproduce them.

It is stored in the adapter's config. Samples are scales of quantized experts, or weights of 16-bit experts, of a few
stacks spread over the model. Scales do not depend on the device that quantizes; codes may differ for a weight halfway
between two values.
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from .config import MoeQLoraConfig
from .experts import QuantizedExperts
from .quantization import Format, FourBitFormat, Stack, parse_format
from .quantized_linear import QuantizedLinear

_SAMPLED_STACKS = 8
_SAMPLES = 16
_TOLERANCE, _TOLERANCE_ACROSS_DTYPES = 1e-4, 2.0**-7
_LEAST_EQUAL = 0.9
"""Share of the samples that must be equal. A few scales in 8 bits may differ between devices."""


@dataclass(frozen=True)
class BaseIdentity:
    """The base model as recorded in an adapter's config.

    Args:
        model_type: `model_type` of the transformers config.
        dtype: dtype of the weights before quantization, such as `"bfloat16"`.
        dense_stacks: names of the experts stacks in `dtype` if other experts are quantized.
        linear: format, such as `"nf4/64+dq"` -> linear layers stored in it; `*` stands for any number.
        samples: name of a stack -> scales of the first blocks of expert 0, or its first weights in a 16-bit stack.
    """

    model_type: str
    dtype: str
    dense_stacks: list[str] = field(default_factory=list)
    linear: dict[str, list[str]] = field(default_factory=dict)
    samples: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, recorded: dict[str, Any] | None) -> BaseIdentity | None:
        """Parses `base` of an adapter's config; None if there is none.

        Raises:
            ValueError: it is not a valid `BaseIdentity`.
        """
        if recorded is None:
            return None
        try:
            found = cls(**recorded)
        except TypeError as error:
            raise ValueError(
                f"base in the adapter's config cannot be read: {error}. Expected an object with model_type and dtype."
            ) from error
        found._check_values()
        return found

    def _check_values(self) -> None:
        def are_names(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(one, str) for one in value)

        def are_numbers(value: Any) -> bool:
            return isinstance(value, list) and all(type(one) in (int, float) for one in value)

        dtype = self.dtype
        expected = {
            "model_type": ("a string", isinstance(self.model_type, str)),
            "dtype": (
                "the name of a torch dtype",
                isinstance(dtype, str)
                and (isinstance(getattr(torch, dtype, None), torch.dtype) if dtype else not self.linear),
            ),
            "dense_stacks": ("a list of names", are_names(self.dense_stacks)),
            "linear": (
                "an object that maps formats to lists of names",
                isinstance(self.linear, dict) and all(map(are_names, self.linear.values())),
            ),
            "samples": (
                "an object that maps names to lists of numbers",
                isinstance(self.samples, dict) and all(map(are_numbers, self.samples.values())),
            ),
        }
        for name, (values, fits) in expected.items():
            if not fits:
                raise ValueError(
                    f"base in the adapter's config has {name}={getattr(self, name)!r:.200}. Expected {values}."
                )
        for storage in self.linear:
            try:
                parse_format(storage)
            except ValueError as error:
                raise ValueError(f"base.linear in the adapter's config: {error}") from error

    def linear_storage(self, name: str) -> Format | None:
        """Storage format of a linear layer, None for floating point."""
        for storage, patterns in self.linear.items():
            if name in patterns or _any_number(name) in patterns:
                return parse_format(storage)
        return None


def identify_base(model: nn.Module, adapted: Collection[str] = ()) -> BaseIdentity:
    """Describes a model whose experts are stored as in training. Weights on the meta device are not sampled.

    Args:
        model: model with converted experts.
        adapted: names of the adapted stacks. Most samples are taken from these, because merging changes them.
    """
    stacks = _stacks(model)
    quantized = [name for name, stack in stacks.items() if stack.storage is not None]
    names = [
        *_evenly_picked([name for name in stacks if name in adapted], _SAMPLED_STACKS),
        *_evenly_picked([name for name in stacks if name not in adapted], _SAMPLED_STACKS // 2),
    ]
    config = getattr(model, "config", None)
    return BaseIdentity(
        model_type=str(getattr(config, "model_type", "")),
        dtype=str(next(iter(stacks.values())).dtype).removeprefix("torch.") if stacks else "",
        dense_stacks=[name for name in stacks if name not in quantized] if quantized else [],
        linear=_linear_storage(model),
        samples={name: sample(stacks[name]) for name in names if _can_be_sampled(stacks[name])},
    )


def _can_be_sampled(stack: Stack) -> bool:
    """Whether the first expert is loaded in this process."""
    return stack.device.type != "meta" and (stack.experts_read is None or 0 in stack.experts_read)


def _evenly_picked(names: list[str], most: int) -> list[str]:
    return names[:: -(-len(names) // most) or 1]


def sample(stack: Stack) -> list[float]:
    """Values of a stack that identify it."""
    if stack.storage is None:
        return stack.decode_expert(0, torch.float32).flatten()[:_SAMPLES].tolist()
    return stack.scales(slice(0, 1))[0, :_SAMPLES].tolist()


def differing_sample(recorded: BaseIdentity, found: BaseIdentity) -> str | None:
    """Name of the first stack whose samples differ; None if all stacks sampled in both agree."""
    tolerance = _TOLERANCE if recorded.dtype == found.dtype else _TOLERANCE_ACROSS_DTYPES
    for name, expected in recorded.samples.items():
        values = found.samples.get(name)
        if values is None or len(values) != len(expected):
            continue
        largest = max(map(abs, expected), default=0.0)
        equal = sum(abs(a - b) <= tolerance * largest for a, b in zip(expected, values))
        if equal < _LEAST_EQUAL * len(expected):
            return name
    return None


def settle_base(config: MoeQLoraConfig, recorded: BaseIdentity | None, found: BaseIdentity) -> None:
    """Records the base of a new adapter; warns if a saved adapter is loaded onto another base.

    Args:
        config: config of the adapter.
        recorded: base recorded in the adapter file; None for a new adapter.
        found: identity of the model.
    """
    if recorded is None:
        config.base = found.to_dict()
        return
    differing = differing_sample(recorded, found)
    if differing is not None:
        warnings.warn(
            f"The adapter was trained on other weights: {differing} differs. Shapes match, so the adapter is loaded "
            f"anyway. It was trained on {config.base_model_name_or_path}; load that base instead.",
            RuntimeWarning,
            stacklevel=2,
        )
    # older files may lack the storage of linear layers
    if recorded.linear and recorded.linear.keys() != found.linear.keys():
        trained, present = (", ".join(one.linear) or "floating point" for one in (recorded, found))
        warnings.warn(
            f"The adapter was trained with linear layers in {trained}, but this base has them in {present}, so "
            "outputs differ from training. Load the base with the quantization_config used in training, such as "
            "MoeQuantizationConfig().",
            RuntimeWarning,
            stacklevel=2,
        )


def _stacks(model: nn.Module) -> dict[str, Stack]:
    return {
        f"{path}.{projection}": module.stack(projection)
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for projection in module.layout.projections
    }


def _linear_storage(model: nn.Module) -> dict[str, list[str]]:
    """Storage -> linear layers, as patterns where all layers that match a pattern have the same storage."""
    storages = {
        path.removesuffix(".base_layer"): _storage(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    by_pattern: dict[str, set[str]] = defaultdict(set)
    for name, storage in storages.items():
        by_pattern[_any_number(name)].add(storage)
    found: dict[str, set[str]] = defaultdict(set)
    for name, storage in storages.items():
        if storage:
            pattern = _any_number(name)
            found[storage].add(pattern if len(by_pattern[pattern]) == 1 else name)
    return {storage: sorted(names) for storage, names in sorted(found.items())}


def _storage(module: nn.Linear) -> str:
    """Name of the layer's storage format, empty for floating point."""
    if isinstance(module, QuantizedLinear):
        return str(module.storage)
    if not isinstance(module, Linear4bit):
        return ""
    weight = module.weight
    state = weight.quant_state
    blocksize = weight.blocksize if state is None else state.blocksize
    return str(FourBitFormat(weight.quant_type, blocksize, bool(weight.compress_statistics)))


def _any_number(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
