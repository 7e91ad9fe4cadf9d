"""Merging into 4 bits while the model runs, which rounds each layer of experts for its actual inputs.

One forward is enough: every layer gets the inputs of the unmerged model, and is merged and unwrapped right after its
own forward. Second moments of only a few experts are in memory at a time.
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
"""Shape of the random calibration tokens, used if no text is given."""

_NAMED = 8


def config_with_vocabulary(model: nn.Module) -> PreTrainedConfig | None:
    """The config that has the vocabulary size: the model's own, or that of a submodule, such as its experts."""
    configs = (getattr(part, "config", None) for part in model.modules())
    return next((config for config in configs if _has_vocabulary(config)), None)


def _has_vocabulary(config: Any) -> bool:
    return isinstance(config, PreTrainedConfig) and hasattr(config.get_text_config(decoder=True), "vocab_size")


def random_token_ids(config: Any, num_sequences: int = NUM_SEQUENCES, length: int = LENGTH) -> torch.Tensor:
    """`(num_sequences, length)` ids drawn uniformly from the vocabulary, the same for every call.

    The resulting layer inputs suffice to distinguish directions of large inputs from those of small ones.

    Args:
        config: config of the model; its special tokens (`..._token_id`) are excluded.
        num_sequences: number of sequences.
        length: length of each sequence, limited to the model's maximum.
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
    """The projections of an experts module for which at least one of the adapters has factors."""
    layers = {projection: experts.get_submodule(projection) for projection in experts.layout.projections}
    return {
        projection: layer
        for projection, layer in layers.items()
        if isinstance(layer, ExpertsLora) and any(name in layer.lora_A for name in adapter_names)
    }


@torch.no_grad()
def run_without_head(model: nn.Module, token_ids: torch.Tensor) -> Any:
    """Output of a model without its head for `(N, L)` token ids, in evaluation mode.

    Logits are not needed here, and with a large vocabulary they would dominate memory. A model that is not a
    transformers model is called with only the ids.
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
    """Runs a model and merges adapters into its quantized experts during the forward.

    Warns about inputs that could not be used; the `merge_notes` of the stacks have the full list.

    Args:
        model: the model that contains the layers, with the adapters active; if it is not a transformers model, it is
            called with only the ids.
        layers: path -> experts module; merged in place and irreversibly.
        adapter_names: the adapters to merge.
        token_ids: `(N, L)`.
        on_merged: called with each merged experts module.
        progressbar: whether to show a progress bar.

    Returns:
        Paths of layers that the forward did not run; they are not merged.
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
    """Issues one warning for all stacks that have merge notes."""
    notes = [
        f"{path}.{projection}: {note}"
        for path, experts in merged.items()
        for projection in experts.layout.projections
        for note in experts.stack(projection).merge_notes
    ]
    if notes:
        more = f"; experts_report(model) lists {len(notes) - _NAMED} more notes" if len(notes) > _NAMED else ""
        warnings.warn("; ".join(notes[:_NAMED]) + f"{more}.", RuntimeWarning, stacklevel=4)


def _inputs(
    experts: QuantizedExperts, args: tuple, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, selected experts and routing weights of a call."""
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
    """Merges adapters into one layer's stacks; quantized stacks are rounded for the given inputs.

    Inputs that are not finite are ignored; the stacks' `merge_notes` have their number for each expert.

    Args:
        experts: the unmerged experts module, with the adapters active.
        adapter_names: the adapters to merge.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` ids of the selected experts.
        top_k_weights: `(T, K)`, the routing weights.

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
            # each row is weighted like its expert's output
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
    """One merged stack, rounded for `(S, in)` fp32 rows sorted by expert; `expert_of_row` `(S,)` has the expert ids.

    In some models, activations of a few tokens in the last layers overflow their dtype. Such rows are ignored.
    """
    stack = layer.base_layer
    is_finite = rows.isfinite().all(dim=1)
    num_seen, num_left_out = (
        expert_of_row[mask].bincount(minlength=stack.num_experts).tolist() for mask in (is_finite, ~is_finite)
    )
    rows = rows[is_finite]
    if len(rows):
        # the scale does not matter, and with this one the squares cannot overflow
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
    """Note on the number of ignored rows of each expert."""
    total = sum(num_left_out)
    counts = [f"{count} of expert {expert}" for expert, count in enumerate(num_left_out) if count]
    more = f" and of {len(counts) - _NAMED} more" if len(counts) > _NAMED else ""
    none = "" if num_seen else "; no rows are left, so the weights were rounded without calibration inputs"
    return (
        f"{total} of {total + num_seen} rows of calibration inputs are not finite and were ignored "
        f"({', '.join(counts[:_NAMED])}{more}){none}"
    )
