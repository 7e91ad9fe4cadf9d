"""Loading an adapter with its base as in training, and evaluating models on a text."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import AutoTokenizer

from ..base_identity import BaseIdentity
from ..config import MoeQLoraConfig, MoeQLoraPeftType
from ..layouts.adapter_file import PREFIX
from ..layouts.base_model import BaseModel, revision_of_base
from ..layouts.read import read_config
from ..loading import Checkpoint, MoeQuantizationConfig, load_quantized
from ..loading.finder import SourceFinder
from ..loading.packed_sources import PackedSource
from ..loading.sources import each_source
from ..quantization import FourBitFormat, parse_format

_WINDOW, _MOST_WINDOWS = 512, 16
_POSITIONS_AT_A_TIME = 64


@dataclass(frozen=True)
class UnmergedPlan:
    """How base and adapter are loaded.

    Args:
        base: directory of the model, or its name on the hub.
        adapter: directory of the adapter.
        model_class: the class whose `from_pretrained` loads the base.
        dtype: dtype of the model, or `"auto"` for that of the checkpoint.
        quantization: quantization config for loading; None to load the base as stored.
        is_quantized: whether any part of the model is quantized.
        revision: revision of a base on the hub; None for the default.
    """

    base: str | Path
    adapter: str | Path
    model_class: type
    dtype: torch.dtype | str
    quantization: MoeQuantizationConfig | None
    is_quantized: bool
    revision: str | None = None


def plan_unmerged(base: str | Path, adapter: str | Path, dtype: torch.dtype | None = None) -> UnmergedPlan:
    """Determines from the configs alone how to load base and adapter as they were in training.

    Args:
        base: directory of the model, or its name on the hub.
        adapter: directory of the adapter.
        dtype: dtype of the model. Default: that of the training, or of the checkpoint.

    Raises:
        ValueError: the adapter is not one of this package, or was trained with a storage of linear layers that one
            quantization config cannot reproduce.
    """
    options = read_config(Path(adapter))
    found_type = options.get("peft_type")
    if found_type != MoeQLoraPeftType.MOE_QLORA.value:
        raise ValueError(
            f"{adapter} contains an adapter of type {found_type}, which does not record the storage of its base. "
            "Convert it first (peft-moe-qlora convert --to moe-qlora)."
        )
    config = MoeQLoraConfig.from_pretrained(str(adapter))
    if config.stored is None:
        raise ValueError(
            f"{adapter} contains no {SAFETENSORS_WEIGHTS_NAME}. Expected the directory of a saved adapter."
        )
    revision = revision_of_base(options, base)
    found = BaseModel.open(base, (key.removeprefix(PREFIX) for key in config.stored.shapes), revision)
    identity = BaseIdentity.of(config.base)
    dtype = dtype or (getattr(torch, identity.dtype) if identity is not None and identity.dtype else "auto")
    quantization = None if found.quantization is not None else _quantization(found, config, identity)
    if found.is_of_others:
        quantization = _of_quantized(found, config, identity)
    is_quantized = config.format is not None or quantization is not None or found.is_of_others
    return UnmergedPlan(base, adapter, found.model_class, dtype, quantization, is_quantized, revision)


def load_unmerged(plan: UnmergedPlan, device: str) -> PeftModel:
    """Loads base and adapter, with the base stored as in training.

    Args:
        plan: the result of `plan_unmerged`.
        device: device of the model.

    Raises:
        ValueError: the adapter was trained on other weights.
    """
    how = {"dtype": plan.dtype, "device_map": device, "use_safetensors": True}
    if plan.revision is not None:
        how["revision"] = plan.revision
    if plan.is_quantized:
        model = load_quantized(str(plan.base), plan.quantization, plan.model_class, **how)
    else:
        model = plan.model_class.from_pretrained(plan.base, **how)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The adapter was trained on other weights")
        try:
            return PeftModel.from_pretrained(model, str(plan.adapter)).eval()
        except RuntimeWarning as error:
            raise ValueError(f"{plan.base} is not the base model of {plan.adapter}. {error}") from error


def _of_quantized(
    base: BaseModel, config: MoeQLoraConfig, identity: BaseIdentity | None
) -> MoeQuantizationConfig | None:
    """The config with which a base quantized by another tool was loaded in training; None if loaded as stored.

    Raises:
        ValueError: no single quantization config reproduces it.
    """
    finder = SourceFinder(base.model, Checkpoint.open(base.directory))
    stored = {source.storage for source in each_source(finder.find()) if isinstance(source, PackedSource)}
    linear = list(identity.linear) if identity is not None else []
    in_4_bits = [name for name in linear if isinstance(parse_format(name), FourBitFormat)]
    are_kept = identity is None or len(linear) > len(in_4_bits)
    if config.format in stored and not in_4_bits and (are_kept or not finder.packed_beside):
        return None
    if config.format is None and not in_4_bits:
        raise ValueError(
            f"{base.directory} is quantized, but the adapter was trained on experts in 16 bits, which no single "
            "quantization config reproduces. Load the model as it was loaded for training, and call merge_and_unload."
        )
    return MoeQuantizationConfig(
        None,
        storage="as stored" if config.format in stored else config.format and str(config.format),
        double_quant=any(name.endswith("+dq") for name in in_4_bits),
        quantize_linear=bool(in_4_bits),
        packed_linear=None if are_kept else "4 bits" if in_4_bits else "16 bits",
    )


def _quantization(
    base: BaseModel, config: MoeQLoraConfig, identity: BaseIdentity | None
) -> MoeQuantizationConfig | None:
    """The quantization config that reproduces the training's base from a floating-point checkpoint."""
    linear = list(identity.linear) if identity is not None else []
    if config.format is None and not linear:
        return None
    experts = config.format
    is_spelled = isinstance(experts, FourBitFormat)
    expected = [str(replace(experts, blocksize=64))] if is_spelled else linear[:1]
    are_known = all(isinstance(parse_format(name), FourBitFormat) for name in linear)
    if linear and (linear != expected or not are_known):
        raise ValueError(
            f"The adapter was trained with linear layers in {', '.join(linear)} and experts in {experts}, which no "
            "single quantization config reproduces. Load the model as it was loaded for training, and call "
            "merge_and_unload."
        )
    skipped = list(identity.dense_stacks) if identity is not None else []
    skipped = {name.rpartition(".")[0] for name in skipped}
    if linear:
        skipped |= {
            name
            for name, module in base.model.named_modules()
            if isinstance(module, nn.Linear) and identity.linear_storage(name) is None
        }
    return MoeQuantizationConfig(
        None,
        storage=None if experts is None else str(experts),
        double_quant=bool(linear) and linear[0].endswith("+dq"),
        quantize_linear=bool(linear),
        skip_modules=[f"^{re.escape(name)}$" for name in sorted(skipped)] or None,
    )


def read_windows(file: str | Path, tokenizer_of: str | Path, revision: str | None = None) -> torch.Tensor:
    """Returns token ids `(N, L)` of a text, at most 16 windows of 512.

    Args:
        file: plain text file.
        tokenizer_of: directory of a model, or its name on the hub.
        revision: revision of a model on the hub; None for the default.

    Raises:
        ValueError: the text is not in UTF-8, or has fewer than two tokens.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not valid UTF-8: {error}. Expected a plain text file.") from error
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of, revision=revision or "main")
    ids = torch.tensor(tokenizer(text)["input_ids"])
    length = min(_WINDOW, len(ids))
    if length < 2:
        raise ValueError(
            f"{file} has {len(ids)} tokens with the tokenizer of {tokenizer_of}. Expected a text of a few hundred "
            "tokens. Check that the tokenizer files are complete."
        )
    return ids[: len(ids) // length * length].view(-1, length)[:_MOST_WINDOWS]


@torch.no_grad()
def next_token_logits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Returns logits `(N, L, V)` in fp32 on the CPU, computed window by window."""
    return torch.cat([logits_of_window(model, window) for window in windows])


@torch.no_grad()
def logits_of_window(model: nn.Module, window: torch.Tensor) -> torch.Tensor:
    """`(1, L, V)` fp32 on the CPU."""
    device = next(model.parameters()).device
    return model(input_ids=window[None].to(device), use_cache=False).logits.float().cpu()


def kl_divergence(of: torch.Tensor, against: torch.Tensor) -> float:
    """Mean over positions of the KL divergence in nats, from logits `(N, L, V)`, computed in fp64."""
    total = 0.0
    # few positions at a time: in fp64 the logits of a window can take 1 GB
    for left, right in zip(*(logits.flatten(0, 1).split(_POSITIONS_AT_A_TIME) for logits in (of, against))):
        left, right = left.double().log_softmax(dim=-1), right.double().log_softmax(dim=-1)
        total += (left.exp() * (left - right)).sum().item()
    return total / (of.shape[0] * of.shape[1])
