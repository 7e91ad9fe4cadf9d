"""The configuration that `from_pretrained` takes to load a model with quantized experts."""

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
CHECKPOINT_FORMAT_VERSION = 1
"""Version of what `save_pretrained` writes: names and shapes of the experts' tensors."""
AS_STORED = "as stored"
PACKED_LINEAR = (AS_STORED, "16 bits", "4 bits")


def refuse_unreadable(found: dict[str, Any] | None, place: str | Path) -> None:
    """Rejects a checkpoint whose experts are in an unsupported storage, by its config, not by its tensors.

    Args:
        found: the `quantization_config` in its config.json; None for none.
        place: directory or name of the checkpoint.

    Raises:
        CheckpointError: names the method, and what to do.
    """
    if found is None:
        return
    method = quant_method(found)
    if method == QUANT_METHOD or is_read(found):
        return
    bits = " in 8 bits" if method == "bitsandbytes" else ""
    raise CheckpointError(
        f"{place} is quantized by {method!r}{bits}, whose experts are not read. Use the model's checkpoint in 16 "
        "bits, or one in a layout of docs/formats.md."
    )


@register_quantization_config(QUANT_METHOD)
class MoeQuantizationConfig(QuantizationConfigMixin):
    """Quantizes experts, and by default linear layers, to 4 bits or another format while a checkpoint loads.

    For `from_pretrained(..., quantization_config=MoeQuantizationConfig())`. A saved model reloads with the config that
    it was saved with, once this package is imported.

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
        quant_method: fixed.
        storage: format of the experts by its name, such as `"nf4/64"`, instead of the first three; or `"as stored"`,
            as the checkpoint has them.
        packed_linear: what linear layers become that the checkpoint has quantized itself, other than by bitsandbytes:
            `"as stored"`, with codes and scales as they are, `"16 bits"`, or `"4 bits"`, as `quantize_linear` stores
            the others. Default: as stored.
        linear_storage: format of the linear layers that are kept as stored; set by this package.

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
        storage: str | None = None,
        packed_linear: str | None = None,
        linear_storage: str | None = None,
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
        if packed_linear not in (None, *PACKED_LINEAR):
            raise ValueError(f"packed_linear={packed_linear!r:.200} is unknown; choose one of {PACKED_LINEAR}.")
        if packed_linear == "4 bits" and not quantize_linear:
            raise ValueError("packed_linear='4 bits' needs quantize_linear=True, by which linear layers get 4 bits.")
        if linear_storage is not None:
            parse_format(linear_storage)
        found = None if storage == AS_STORED else format_of(storage, quant_type, blocksize, double_quant)
        if found is None and not quantize_linear and storage != AS_STORED and linear_storage is None:
            raise ValueError("quant_type=None and quantize_linear=False leave nothing to quantize.")
        if compute_dtype is not None and not isinstance(compute_dtype, torch.dtype):
            name, compute_dtype = compute_dtype, getattr(torch, str(compute_dtype), None)
            if not isinstance(compute_dtype, torch.dtype):
                raise ValueError(f"compute_dtype={name!r} is not a torch dtype.")
        for name, value in (("skip_modules", skip_modules), ("flipped_stacks", flipped_stacks)):
            if not isinstance(value, (list, tuple, set, type(None))) or not all(
                isinstance(one, str) for one in value or ()
            ):
                raise ValueError(f"{name}={value!r:.200}: a list of names was expected.")
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
        """How the experts are stored, None for 16 bits, and while nobody has looked how they are stored."""
        if self.storage == AS_STORED:
            return None
        return format_of(self.storage, self.quant_type, self.blocksize, self.double_quant)

    def set_format(self, found: Format | None) -> None:
        """Says how the experts are stored, None for 16 bits."""
        self.storage, self.quant_type, self.blocksize, self.double_quant = spelled(found)

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
    def from_checkpoint(cls, declared: dict[str, Any]) -> MoeQuantizationConfig:
        """What the `quantization_config` of a checkpoint that others have quantized means here.

        Args:
            declared: one that `refuse_unreadable` lets pass.
        """
        if quant_method(declared) == "bitsandbytes":
            return cls.from_bitsandbytes(declared)
        return cls(storage=AS_STORED, quantize_linear=False)

    @classmethod
    def from_bitsandbytes(cls, config: dict[str, Any]) -> MoeQuantizationConfig:
        """What the `quantization_config` of a checkpoint that bitsandbytes has packed means here.

        Raises:
            ValueError: it is not packed in 4 bits.
        """
        if not is_in_4_bits(config):
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
