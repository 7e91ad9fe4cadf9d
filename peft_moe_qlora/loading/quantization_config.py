"""The `quantization_config` of models with quantized experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..options import COUNT, FLAG
from ..quantization import Format, format_of, parse_format, spelled
from .checkpoint import CheckpointError
from .disk import is_read, quant_method
from .disk.bitsandbytes import is_in_4_bits

QUANT_METHOD = "peft_moe_qlora"
LOADING = "pip install peft-moe-qlora, and import peft_moe_qlora before from_pretrained"
"""Saved in config.json, for readers that do not know the method."""
CHECKPOINT_FORMAT_VERSION = 1
"""Version of the checkpoints written by `save_pretrained`: names and shapes of the experts' tensors."""
AS_STORED = "as stored"
PACKED_LINEAR = (AS_STORED, "16 bits", "4 bits")


def refuse_unreadable(found: dict[str, Any] | None, place: str | Path) -> None:
    """Rejects a checkpoint whose config declares an unsupported quantization. Tensors are not checked.

    Args:
        found: the `quantization_config` in its config.json; None for an unquantized checkpoint.
        place: directory or name of the checkpoint.

    Raises:
        CheckpointError: the quantization method is not supported.
    """
    if found is None:
        return
    method = quant_method(found)
    if method == QUANT_METHOD or is_read(found):
        return
    bits = " in 8 bits" if method == "bitsandbytes" else ""
    raise CheckpointError(
        f"{place} is quantized by {method!r}{bits}, which is not supported for experts. Use the 16-bit checkpoint of "
        "the model, or one in a format listed in docs/formats.md."
    )


@register_quantization_config(QUANT_METHOD)
class MoeQuantizationConfig(QuantizationConfigMixin):
    """Quantizes experts, and by default linear layers, to 4 bits or another format while a checkpoint loads.

    Pass it to `from_pretrained(..., quantization_config=MoeQuantizationConfig())`. A saved model contains its
    configuration and reloads without this argument, once this package is imported.

    Args:
        quant_type: storage of the experts, `"nf4"` or `"fp4"`; None leaves them in 16 bits.
        blocksize: number of weights of an expert that share a scale. Linear layers always have blocks of 64.
        double_quant: store the scales of experts and linear layers in 8 bits.
        quantize_linear: store linear layers in 4 bits with bitsandbytes, except routers, the head and layers that
            transformers keeps in higher precision.
        skip_modules: linear layers and experts modules to leave in 16 bits: paths, ends of paths or regular
            expressions.
        compute_dtype: compute dtype of the linear layers, such as `"bfloat16"`. Default: the dtype of the model.
        flipped_stacks: stacks whose matrices are stored in the opposite orientation to their class; set when a model
            is saved.
        format_version: version of the saved checkpoint; set by this package.
        quant_method: fixed.
        storage: name of the storage format of the experts, such as `"nf4/64"`, instead of the first three options; or
            `"as stored"` to keep the storage of the checkpoint.
        packed_linear: storage of linear layers that are quantized in the checkpoint by a tool other than bitsandbytes:
            `"as stored"` keeps codes and scales, `"16 bits"` dequantizes them, `"4 bits"` requantizes them like
            `quantize_linear`. Default: as stored.
        linear_storage: storage format of the linear layers that are kept as stored; set by this package.
        loading: how to load the saved checkpoint; set by this package, and not read.

    Raises:
        ValueError: an option is unknown, has an invalid value, or was written by a later version.
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
        storage: str | None = None,
        packed_linear: str | None = None,
        linear_storage: str | None = None,
        loading: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            it = "it" if len(unknown) == 1 else "them"
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"MoeQuantizationConfig has no option {names}. Correct or remove {it}.")
        if quant_method != QUANT_METHOD:
            raise ValueError(
                f"quant_method={quant_method!r}: MoeQuantizationConfig expects {QUANT_METHOD!r}. Remove it."
            )
        for name, value, values in (
            ("format_version", format_version, COUNT),
            ("double_quant", double_quant, FLAG),
            ("quantize_linear", quantize_linear, FLAG),
        ):
            if not values.include(value):
                raise ValueError(f"{name}={value!r:.200}: expected {values.expected}.")
        if format_version > CHECKPOINT_FORMAT_VERSION:
            raise ValueError(
                f"The checkpoint has format_version {format_version}. This version of peft-moe-qlora reads up to "
                f"{CHECKPOINT_FORMAT_VERSION}. Upgrade peft-moe-qlora."
            )
        if packed_linear not in (None, *PACKED_LINEAR):
            raise ValueError(f"packed_linear={packed_linear!r:.200} is unknown. Choose one of {PACKED_LINEAR}.")
        if packed_linear == "4 bits" and not quantize_linear:
            raise ValueError("packed_linear='4 bits' requires quantize_linear=True.")
        if linear_storage is not None:
            parse_format(linear_storage)
        found = None if storage == AS_STORED else format_of(storage, quant_type, blocksize, double_quant)
        if found is None and not quantize_linear and storage != AS_STORED and linear_storage is None:
            raise ValueError("quant_type=None and quantize_linear=False leave nothing to quantize. Set one of them.")
        if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
            name, compute_dtype = compute_dtype, getattr(torch, str(compute_dtype), None)
            if not isinstance(compute_dtype, torch.dtype):
                raise ValueError(f"compute_dtype={name!r}: expected a torch dtype, such as 'bfloat16'.")
        for name, value in (("skip_modules", skip_modules), ("flipped_stacks", flipped_stacks)):
            if not isinstance(value, (list, tuple, set, type(None))) or not all(
                isinstance(one, str) for one in value or ()
            ):
                raise ValueError(f"{name}={value!r:.200}: expected a list of names.")
        self.quant_method = QUANT_METHOD
        self.storage, self.quant_type, self.blocksize, self.double_quant = storage, quant_type, blocksize, double_quant
        if storage not in (None, AS_STORED):
            self.set_format(found)
            self.double_quant |= double_quant  # of linear layers
        self.quantize_linear = quantize_linear
        self.skip_modules = None if skip_modules is None else list(skip_modules)
        self.compute_dtype = compute_dtype
        self.flipped_stacks = None if flipped_stacks is None else list(flipped_stacks)
        self.format_version = format_version
        self.packed_linear, self.linear_storage = packed_linear, linear_storage

    @property
    def format(self) -> Format | None:
        """Storage format of the experts; None for 16 bits, and for `"as stored"` before the checkpoint is read."""
        if self.storage == AS_STORED:
            return None
        return format_of(self.storage, self.quant_type, self.blocksize, self.double_quant)

    def set_format(self, found: Format | None) -> None:
        """Sets the storage format of the experts, None for 16 bits."""
        self.storage, self.quant_type, self.blocksize, self.double_quant = spelled(found)

    def linear_config(self) -> BitsAndBytesConfig:
        """The configuration of bitsandbytes' quantizer for linear layers."""
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type or "nf4",
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=self.compute_dtype,
            llm_int8_skip_modules=self.skip_modules,
        )

    @classmethod
    def from_checkpoint(cls, declared: dict[str, Any]) -> MoeQuantizationConfig:
        """Creates a configuration from the `quantization_config` of a checkpoint quantized by another tool.

        Args:
            declared: a `quantization_config` accepted by `refuse_unreadable`.
        """
        if quant_method(declared) == "bitsandbytes":
            return cls.from_bitsandbytes(declared)
        return cls(storage=AS_STORED, quantize_linear=False)

    @classmethod
    def from_bitsandbytes(cls, config: dict[str, Any]) -> MoeQuantizationConfig:
        """Creates a configuration from the `quantization_config` of a checkpoint packed by bitsandbytes.

        Raises:
            ValueError: it is not packed in 4 bits.
        """
        if not is_in_4_bits(config):
            raise ValueError(
                "The checkpoint is quantized by bitsandbytes, but not in 4 bits. Expected load_in_4bit=True in its "
                "quantization_config. Use the 16-bit checkpoint."
            )
        return cls(
            quant_type=config.get("bnb_4bit_quant_type", "fp4"),
            compute_dtype=config.get("bnb_4bit_compute_dtype"),
            skip_modules=config.get("llm_int8_skip_modules"),
        )

    def to_dict(self) -> dict[str, Any]:
        values = {**self.__dict__, "loading": LOADING}
        if self.compute_dtype is not None:
            values["compute_dtype"] = str(self.compute_dtype).removeprefix("torch.")
        return values
