"""The configuration that `from_pretrained` takes to load a model with quantized experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..options import COUNT, FLAG
from ..quantization import FourBitFormat
from .checkpoint import CheckpointError

QUANT_METHOD = "peft_moe_qlora"
CHECKPOINT_FORMAT_VERSION = 1
"""Version of what `save_pretrained` writes: names and shapes of the experts' tensors."""


def quant_method(found: dict[str, Any]) -> str:
    """By what a checkpoint is quantized, as its `quantization_config` says; bitsandbytes did not always say it."""
    default = "bitsandbytes" if found.keys() & {"load_in_4bit", "load_in_8bit"} else "a method without a name"
    method = found.get("quant_method") or default
    return str(method.value if isinstance(method, QuantizationMethod) else method)


def refuse_unreadable(found: dict[str, Any] | None, place: str | Path) -> None:
    """Refuses a checkpoint whose experts are in a storage that is not read: by its config, not by its tensors.

    Args:
        found: the `quantization_config` in its config.json; None for none.
        place: directory or name of the checkpoint.

    Raises:
        CheckpointError: names the method, and what to do.
    """
    if found is None:
        return
    method = quant_method(found)
    bits = "" if method != "bitsandbytes" or _is_in_4_bits(found) else " in 8 bits"
    if bits or method not in ("bitsandbytes", QUANT_METHOD):
        raise CheckpointError(
            f"{place} is quantized by {method!r}{bits}, whose experts are not read. Use the model's checkpoint in 16 "
            "bits, or one that bitsandbytes or this package has quantized to 4 bits."
        )


def _is_in_4_bits(found: dict[str, Any]) -> bool:
    return bool(found.get("load_in_4bit", found.get("_load_in_4bit", False)))


@register_quantization_config(QUANT_METHOD)
class MoeQuantizationConfig(QuantizationConfigMixin):
    """Experts in 4 bits, and the linear layers too, from the moment they are read.

    For `from_pretrained(..., quantization_config=MoeQuantizationConfig())`. A model that was saved with it reloads
    with it, once this package is imported.

    Args:
        quant_type: storage of the experts, `"nf4"` or `"fp4"`; None leaves them in 16 bits.
        blocksize: number of weights of an expert that share a scale. Linear layers always have blocks of 64.
        double_quant: store the scales in 8 bits, of experts and linear layers.
        quantize_linear: store the linear layers in 4 bits, as bitsandbytes does; routers, the head and what
            transformers keeps in higher precision excepted.
        skip_modules: modules to leave in 16 bits: paths, ends of paths or regular expressions of linear layers, and
            of experts modules.
        compute_dtype: of the linear layers, such as `"bfloat16"`. Default: the dtype of the model.
        flipped_stacks: stacks whose matrices are stored in the other orientation than their class has; set when a
            model is saved.
        format_version: of the saved checkpoint; set by this package.

    Raises:
        ValueError: an option is unknown, has no such value, or comes from a later version.
    """

    def __init__(
        self,
        quant_type: str | None = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        quantize_linear: bool = True,
        skip_modules: list[str] | None = None,
        compute_dtype: torch.dtype | str | None = None,
        flipped_stacks: list[str] | None = None,
        format_version: int = CHECKPOINT_FORMAT_VERSION,
        quant_method: str = QUANT_METHOD,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"MoeQuantizationConfig has no option {', '.join(map(repr, unknown))}.")
        if quant_method != QUANT_METHOD:
            raise ValueError(f"quant_method={quant_method!r} is not that of MoeQuantizationConfig, {QUANT_METHOD!r}.")
        for name, value, values in (
            ("format_version", format_version, COUNT),
            ("double_quant", double_quant, FLAG),
            ("quantize_linear", quantize_linear, FLAG),
        ):
            if not values.include(value):
                raise ValueError(f"{name}={value!r:.200}: {values.expected} was expected.")
        if format_version > CHECKPOINT_FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has format_version {format_version}; this peft-moe-qlora reads up to "
                f"{CHECKPOINT_FORMAT_VERSION}. Upgrade peft-moe-qlora."
            )
        if quant_type is not None:
            FourBitFormat(quant_type, blocksize, double_quant)
        elif not quantize_linear:
            raise ValueError("quant_type=None and quantize_linear=False leave nothing to quantize.")
        if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
            name, compute_dtype = compute_dtype, getattr(torch, str(compute_dtype), None)
            if not isinstance(compute_dtype, torch.dtype):
                raise ValueError(f"compute_dtype={name!r} is no dtype of torch.")
        for name, value in (("skip_modules", skip_modules), ("flipped_stacks", flipped_stacks)):
            if not isinstance(value, (list, tuple, set, type(None))) or not all(
                isinstance(one, str) for one in value or ()
            ):
                raise ValueError(f"{name}={value!r:.200}: a list of names was expected.")
        self.quant_method = QUANT_METHOD
        self.quant_type = quant_type
        self.blocksize = blocksize
        self.double_quant = double_quant
        self.quantize_linear = quantize_linear
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.compute_dtype = compute_dtype
        self.flipped_stacks = None if flipped_stacks is None else list(flipped_stacks)
        self.format_version = format_version

    @property
    def storage(self) -> FourBitFormat | None:
        """How the experts are stored, None for 16 bits."""
        return None if self.quant_type is None else FourBitFormat(self.quant_type, self.blocksize, self.double_quant)

    def linear_config(self) -> BitsAndBytesConfig:
        """The same for linear layers, as bitsandbytes' quantizer understands it."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type or "nf4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=self.skip_modules,
        )

    @classmethod
    def from_bitsandbytes(cls, config: dict[str, Any]) -> MoeQuantizationConfig:
        """What the `quantization_config` of a checkpoint that bitsandbytes has packed means here.

        Raises:
            ValueError: it is not packed in 4 bits.
        """
        if not _is_in_4_bits(config):
            raise ValueError("The checkpoint is quantized by bitsandbytes, but not in 4 bits, which is not supported.")
        return cls(
            quant_type=config.get("bnb_4bit_quant_type", "fp4"),
            compute_dtype=config.get("bnb_4bit_compute_dtype"),
            skip_modules=config.get("llm_int8_skip_modules"),
        )

    def to_dict(self) -> dict[str, Any]:
        values = dict(self.__dict__)
        if self.compute_dtype is not None:
            values["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return values
