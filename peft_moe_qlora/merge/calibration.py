"""Merging into 4 bits while the model runs, so that each layer of experts is rounded for the inputs that it gets.

One forward is enough: every layer sees what it sees in the live model, is merged when its own forward is done, and
takes itself off the model then. At no time are there second moments of more than a few experts.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from ..experts import QuantizedExperts
from ..layer import ExpertsLora
from ..quantization import QuantizedStack
from .second_order import MergedExpert, quantize_second_order

NUM_SEQUENCES, LENGTH = 16, 512
"""Of the tokens drawn where no text is given."""

_NAMED = 8


def config_with_vocabulary(model: nn.Module) -> PreTrainedConfig | None:
    """The config that tells a model's vocabulary: its own, or that of a part, such as its experts."""
    configs = (getattr(part, "config", None) for part in model.modules())
    return next((config for config in configs if _has_vocabulary(config)), None)


def _has_vocabulary(config: Any) -> bool:
    return isinstance(config, PreTrainedConfig) and hasattr(config.get_text_config(decoder=True), "vocab_size")


def random_token_ids(config: Any, num_sequences: int = NUM_SEQUENCES, length: int = LENGTH) -> torch.Tensor:
    """`(num_sequences, length)` ids drawn evenly from the vocabulary, the same at every call.

    What they make the layers see is enough to tell directions of large inputs from those of small ones.

    Args:
        config: of the model; ids that it gives a meaning (`..._token_id`) are left out.
        num_sequences: how many.
        length: of each; cut to what the model can take.
    """
    outer, config = config, config.get_text_config(decoder=True)
    options = [*outer.to_dict().items(), *config.to_dict().items()]
    special = [value for name, value in options if name.endswith("token_id")]
    special = {
        one for value in special if value is not None for one in (value if isinstance(value, list) else [value])
    }
    ordinary = torch.tensor([token for token in range(config.vocab_size) if token not in special])
    length = min(length, getattr(config, "max_position_embeddings", None) or length)
    generator = torch.Generator().manual_seed(0)
    return ordinary[torch.randint(len(ordinary), (num_sequences, length), generator=generator)]


def adapted_projections(experts: QuantizedExperts, adapter_names: Collection[str]) -> dict[str, ExpertsLora]:
    """The projections of an experts module that one of the adapters has factors for."""
    layers = {projection: experts.get_submodule(projection) for projection in experts.layout.projections}
    return {
        projection: layer
        for projection, layer in layers.items()
        if isinstance(layer, ExpertsLora) and any(name in layer.lora_A for name in adapter_names)
    }


@torch.no_grad()
def run_without_head(model: nn.Module, token_ids: torch.Tensor) -> Any:
    """What a model's body gives for `(N, L)` token ids, in evaluation mode.

    Nobody looks at logits here, which for a large vocabulary are larger than all else. A model that isn't of
    transformers is called with the ids alone.
    """
    was_training = model.training
    model.eval()
    token_ids = token_ids.to(next(model.parameters()).device)
    try:
        if isinstance(model, PreTrainedModel):
            return model.base_model(input_ids=token_ids, use_cache=False)
        return model(token_ids)
    finally:
        model.train(was_training)


@torch.no_grad()
def merge_while_running(
    model: nn.Module,
    layers: Mapping[str, QuantizedExperts],
    adapter_names: Sequence[str],
    token_ids: torch.Tensor,
    on_merged: Callable[[QuantizedExperts], None],
    progressbar: bool = False,
) -> list[str]:
    """Runs a model, and merges adapters into its quantized experts on the way.

    Warns of inputs that are of no use; the `merge_notes` of the stacks have all of them.

    Args:
        model: that the layers are in, with the adapters active; one that isn't of transformers is called with the ids
            alone.
        layers: path -> experts module; merged in place, without a way back.
        adapter_names: what to merge.
        token_ids: `(N, L)`.
        on_merged: called with each experts module that is merged.
        progressbar: show one.

    Returns:
        Paths of layers that the forward didn't reach; they are not merged.
    """
    bar = tqdm(total=len(layers), desc="Merging experts", unit="layer", disable=not progressbar)
    paths = {layer: path for path, layer in layers.items()}

    def merge(experts: QuantizedExperts, args: tuple, kwargs: dict[str, Any], _: torch.Tensor) -> None:
        if experts in paths:
            merge_layer(experts, adapter_names, *_inputs(experts, args, kwargs))
            on_merged(experts)
            del paths[experts]
            bar.update()

    handles = [layer.register_forward_hook(merge, with_kwargs=True) for layer in layers.values()]
    try:
        run_without_head(model, token_ids)
    finally:
        for handle in handles:
            handle.remove()
        bar.close()
    _warn_of_notes({path: experts for path, experts in layers.items() if experts not in paths})
    return list(paths.values())


def _warn_of_notes(merged: Mapping[str, QuantizedExperts]) -> None:
    """One warning for all stacks whose rounding there is something to know of."""
    notes = [
        f"{path}.{projection}: {note}"
        for path, experts in merged.items()
        for projection in experts.layout.projections
        for note in experts.stack(projection).merge_notes
    ]
    if notes:
        more = f"; {len(notes) - _NAMED} more are in the experts' report" if len(notes) > _NAMED else ""
        warnings.warn("; ".join(notes[:_NAMED]) + f"{more}.", RuntimeWarning, stacklevel=4)


def _inputs(
    experts: QuantizedExperts, args: tuple, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, chosen experts and routing weights of a call."""
    given = inspect.signature(experts.forward).bind(*args, **kwargs).arguments
    return experts.routed(given["hidden_states"], given.get("top_k_index"), given.get("top_k_weights"))


@torch.no_grad()
def merge_layer(
    experts: QuantizedExperts,
    adapter_names: Sequence[str],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> None:
    """Merges adapters into one layer's quantized stacks, rounded for the given inputs; others are rounded plainly.

    Inputs that are not finite don't count; the stacks' `merge_notes` say how many, of which experts.

    Args:
        experts: not merged so far, with the adapters active.
        adapter_names: what to merge.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` ids of the chosen experts.
        top_k_weights: `(T, K)`, the router's weights.

    Raises:
        ValueError: a merged weight is not finite.
    """
    low_rank = experts.low_rank_terms(hidden_states.shape[0])
    routing, inputs = experts.projection_inputs(hidden_states, top_k_index, low_rank)
    weight_of_row = torch.empty(routing.num_rows, dtype=torch.float32, device=hidden_states.device)
    weight_of_row[routing.row_of_pair.flatten()] = top_k_weights.flatten().float()
    num_rows = int(routing.offsets[-1])
    expert_of_row, weight_of_row = routing.expert_of_row[:num_rows], weight_of_row[:num_rows, None]
    merged = {}
    for projection, layer in adapted_projections(experts, adapter_names).items():
        if isinstance(layer.base_layer, QuantizedStack):
            # a row counts as much as its expert's output does
            rows = inputs[projection][:num_rows].float() * weight_of_row
            merged[layer] = _merge_for_rows(layer, adapter_names, rows, expert_of_row)
        else:
            merged[layer] = layer.base_layer.merged(partial(layer.expert_delta, adapter_names))
    for layer, stack in merged.items():
        layer.base_layer, layer.merged_adapters = stack, list(adapter_names)


def _merge_for_rows(
    layer: ExpertsLora,
    adapter_names: Sequence[str],
    rows: torch.Tensor,
    expert_of_row: torch.Tensor,
) -> QuantizedStack:
    """One merged stack, rounded for `(S, in)` fp32 rows that are sorted by expert; `(S,)` says whose each is.

    Some models have activations beyond the range of their dtype in a few tokens of their last layers. Rows with such
    values are left out.
    """
    stack = layer.base_layer
    is_finite = rows.isfinite().all(dim=1)
    num_seen, num_left_out = (
        expert_of_row[mask].bincount(minlength=stack.num_experts).tolist() for mask in (is_finite, ~is_finite)
    )
    rows = rows[is_finite]
    if len(rows):
        # the unit is of no account, and with this one squares stay in range
        rows /= torch.linalg.vector_norm(rows, torch.inf).clamp_min(torch.finfo(rows.dtype).tiny)
    rows_of_expert = rows.split(num_seen)

    def merged_expert(expert: int) -> MergedExpert:
        A, B = layer.expert_factors(adapter_names, expert)
        weight = stack.decode_expert(expert, torch.float32)
        own = rows_of_expert[expert]
        return MergedExpert(
            weight=(weight.T if stack.is_transposed else weight) + B @ A,
            moment=own.T @ own / max(len(own), 1),
            core=torch.linalg.qr(B).R @ A,
        )

    merged = quantize_second_order(stack, merged_expert, rows.T @ rows / max(len(rows), 1))
    if any(num_left_out):
        merged.merge_notes += (_note_of_left_out(num_left_out, len(rows)),)
    return merged


def _note_of_left_out(num_left_out: Sequence[int], num_seen: int) -> str:
    """How many rows of which experts don't count."""
    total = sum(num_left_out)
    counts = [f"{count} of expert {expert}" for expert, count in enumerate(num_left_out) if count]
    more = f" and of {len(counts) - _NAMED} more" if len(counts) > _NAMED else ""
    none = "" if num_seen else "; none is left, so that it is rounded without regard to inputs"
    return (
        f"{total} of {total + num_seen} rows of calibration inputs are not finite and were left out "
        f"({', '.join(counts[:_NAMED])}{more}){none}"
    )
