"""Merging into 4 bits while the model runs, so that each layer of experts is rounded for the inputs that it gets.

One forward is enough: every layer sees what it sees in the live model, is merged when its own forward is done, and
takes itself off the model then. At no time are there second moments of more than a few experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .experts import QuantizedExperts
from .layer import ExpertsLora
from .quantization import MergedExpert, QuantizedStack, quantize_second_order

NUM_SEQUENCES, LENGTH = 16, 512
"""Of the tokens drawn where no text is given."""


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
def merge_for_inputs(
    model: nn.Module,
    layers: Mapping[str, QuantizedExperts],
    adapter_names: Sequence[str],
    token_ids: torch.Tensor,
    on_merged: Callable[[QuantizedExperts], None],
    progressbar: bool = False,
) -> list[str]:
    """Runs a model, and merges adapters into its quantized experts on the way.

    Args:
        model: that the layers are in, with the adapters active.
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

    was_training = model.training
    model.eval()
    handles = [layer.register_forward_hook(merge, with_kwargs=True) for layer in layers.values()]
    # without its head: nobody looks at logits, which for a large vocabulary are larger than all else
    body = model.base_model if isinstance(model, PreTrainedModel) else model
    try:
        body(input_ids=token_ids.to(next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        bar.close()
        model.train(was_training)
    return list(paths.values())


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
    ends = routing.offsets.tolist()
    merged = {}
    for projection, layer in adapted_projections(experts, adapter_names).items():
        stack = layer.base_layer
        if not isinstance(stack, QuantizedStack):
            merged[layer] = stack.merged(lambda expert, layer=layer: layer.expert_delta(adapter_names, expert))
            continue
        # a row counts as much as its expert's output does
        rows = inputs[projection][: ends[-1]].float() * weight_of_row[: ends[-1], None]

        def merged_expert(
            expert: int, layer: ExpertsLora = layer, stack: QuantizedStack = stack, rows: torch.Tensor = rows
        ) -> MergedExpert:
            A, B = layer.expert_factors(adapter_names, expert)
            weight = stack.decode_expert(expert, torch.float32)
            own = rows[ends[expert - 1] if expert else 0 : ends[expert]]
            return MergedExpert(
                weight=(weight.T if stack.is_transposed else weight) + B @ A,
                moment=own.T @ own / max(len(own), 1),
                core=torch.linalg.qr(B).R @ A,
            )

        merged[layer] = quantize_second_order(stack, merged_expert, rows.T @ rows / max(len(rows), 1))
    for layer, stack in merged.items():
        layer.base_layer, layer.merged_adapters = stack, list(adapter_names)
