"""Which weights an adapter was trained on: enough to tell them from others of the same shape, and to make them anew.

Stored in the adapter's config. Samples are scales of quantized experts, or weights of those in 16 bits: few, of
experts spread over the model. Scales are the same whatever device quantizes; codes might not be, where two are near.
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
"""Of the samples; scales in 8 bits may differ in the last of them from device to device."""


@dataclass(frozen=True)
class BaseIdentity:
    """What an adapter's config says of its base.

    Args:
        model_type: of transformers.
        dtype: that weights were cast to before they were quantized, such as `"bfloat16"`.
        dense_stacks: experts that were left in `dtype` although the others are quantized.
        linear: format, such as `"nf4/64+dq"` -> linear layers stored in it; `*` stands for any number.
        samples: name of a stack -> scales of the first blocks of expert 0, or its first weights.
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
        """What an adapter's config has; None if it has nothing.

        Raises:
            ValueError: it has something else.
        """
        if recorded is None:
            return None
        try:
            found = cls(**recorded)
        except TypeError as error:
            raise ValueError(
                f"What the adapter's config says of its base can't be read: {error}. An object with model_type and "
                "dtype was expected."
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
                "the name of a dtype of torch",
                isinstance(dtype, str)
                and (isinstance(getattr(torch, dtype, None), torch.dtype) if dtype else not self.linear),
            ),
            "dense_stacks": ("a list of names", are_names(self.dense_stacks)),
            "linear": (
                "an object of formats and lists of names",
                isinstance(self.linear, dict) and all(map(are_names, self.linear.values())),
            ),
            "samples": (
                "an object of names and lists of numbers",
                isinstance(self.samples, dict) and all(map(are_numbers, self.samples.values())),
            ),
        }
        for name, (values, fits) in expected.items():
            if not fits:
                raise ValueError(
                    f"What the adapter's config says of its base has {name}={getattr(self, name)!r:.200}; "
                    f"{values} was expected."
                )
        for storage in self.linear:
            try:
                parse_format(storage)
            except ValueError as error:
                raise ValueError(f"What the adapter's config says of its base has, in linear, {error}") from error

    def linear_storage(self, name: str) -> Format | None:
        """How a linear layer was stored, None for floating point."""
        for storage, patterns in self.linear.items():
            if name in patterns or _any_number(name) in patterns:
                return parse_format(storage)
        return None


def identify_base(model: nn.Module, adapted: Collection[str] = ()) -> BaseIdentity:
    """Describes a model whose experts are stored as they are trained on; nothing is read of weights on meta.

    Args:
        model: with its experts converted.
        adapted: stacks that are adapted, which most samples are of: a merge changes these.
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
    """Whether its first expert is here."""
    return stack.device.type != "meta" and (stack.experts_read is None or 0 in stack.experts_read)


def _evenly_picked(names: list[str], most: int) -> list[str]:
    return names[:: -(-len(names) // most) or 1]


def sample(stack: Stack) -> list[float]:
    """What is kept of a stack to know it again."""
    if stack.storage is None:
        return stack.decode_expert(0, torch.float32).flatten()[:_SAMPLES].tolist()
    return stack.scales(slice(0, 1))[0, :_SAMPLES].tolist()


def differing_sample(recorded: BaseIdentity, found: BaseIdentity) -> str | None:
    """Name of the first stack whose samples are others than recorded; None if all that both have agree."""
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
    """Remembers what a new adapter is trained on; warns where one is put on weights that it wasn't trained on.

    Args:
        config: of the adapter.
        recorded: what the adapter's file says; None for a new one.
        found: of the model.
    """
    if recorded is None:
        config.base = found.to_dict()
        return
    differing = differing_sample(recorded, found)
    if differing is not None:
        warnings.warn(
            f"The adapter was trained on other weights: {differing} differs. It has the same shape, so it is "
            f"loaded; it was made for {config.base_model_name_or_path}.",
            RuntimeWarning,
            stacklevel=2,
        )
    # files of before may not say how linear layers were stored
    if recorded.linear and recorded.linear.keys() != found.linear.keys():
        trained, present = (", ".join(one.linear) or "floating point" for one in (recorded, found))
        warnings.warn(
            f"The adapter was trained with linear layers in {trained}; those of this base are in {present}, so that "
            "outputs differ from those of the training. Load the base with the quantization_config of the training, "
            "such as MoeQuantizationConfig().",
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
    """Linear layers by their storage, as patterns where all that fit one are stored alike."""
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
    """By its format's name, empty for floating point."""
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
