"""Merging into 4 bits while the model runs, so that each layer of experts is rounded for the inputs that it gets.

One forward is enough: every layer sees what it sees in the live model, is merged when its own forward is done, and
takes itself off the model then. At no time are there second moments of more than a few experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from .layer import MoeQLoraExperts
from .quantization import MergedExpert, QuantizedStack, quantize_second_order

NUM_SEQUENCES, LENGTH = 16, 512
"""Of the tokens drawn where no text is given."""


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


@torch.no_grad()
def merge_for_inputs(
    model: nn.Module,
    layers: Mapping[str, MoeQLoraExperts],
    adapter_names: Sequence[str],
    token_ids: torch.Tensor,
    on_merged: Callable[[str], None],
    progressbar: bool = False,
) -> list[str]:
    """Runs a model, and merges adapters into its quantized experts on the way.

    Args:
        model: that the layers are in, with the adapters active; one that isn't of transformers is called with the ids
            alone.
        layers: path -> layer; merged in place, without a way back.
        adapter_names: what to merge.
        token_ids: `(N, L)`.
        on_merged: called with the path of each layer that is merged.
        progressbar: show one.

    Returns:
        Paths of layers that the forward didn't reach; they are not merged.
    """
    bar = tqdm(total=len(layers), desc="Merging experts", unit="layer", disable=not progressbar)
    paths = {layer: path for path, layer in layers.items()}

    def merge(layer: MoeQLoraExperts, args: tuple, kwargs: dict[str, Any], _: torch.Tensor) -> None:
        if layer in paths:
            merge_layer(layer, adapter_names, *_inputs(layer, args, kwargs))
            on_merged(paths.pop(layer))
            bar.update()

    was_training = model.training
    model.eval()
    handles = [layer.register_forward_hook(merge, with_kwargs=True) for layer in layers.values()]
    token_ids = token_ids.to(next(model.parameters()).device)
    try:
        if isinstance(model, PreTrainedModel):
            # without its head: nobody looks at logits, which for a large vocabulary are larger than all else
            model.base_model(input_ids=token_ids, use_cache=False)
        else:
            model(token_ids)
    finally:
        for handle in handles:
            handle.remove()
        bar.close()
        model.train(was_training)
    return list(paths.values())


def _inputs(
    layer: MoeQLoraExperts, args: tuple, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, chosen experts and routing weights of a call."""
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    return layer.base_layer.routed(given["hidden_states"], given.get("top_k_index"), given.get("top_k_weights"))


@torch.no_grad()
def merge_layer(
    layer: MoeQLoraExperts,
    adapter_names: Sequence[str],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> None:
    """Merges adapters into one layer's quantized stacks, rounded for the given inputs; others are rounded plainly.

    Args:
        layer: not merged so far.
        adapter_names: what to merge.
        hidden_states: `(T, H)`.
        top_k_index: `(T, K)` ids of the chosen experts.
        top_k_weights: `(T, K)`, the router's weights.

    Raises:
        ValueError: a merged weight is not finite.
    """
    experts = layer.base_layer
    routing, inputs = experts.projection_inputs(hidden_states, top_k_index, layer.low_rank_terms(adapter_names))
    weight_of_row = torch.empty(routing.num_rows, dtype=torch.float32, device=hidden_states.device)
    weight_of_row[routing.row_of_pair.flatten()] = top_k_weights.flatten().float()
    ends = routing.offsets.tolist()
    merged = {}
    for projection in layer.adapted_projections(adapter_names):
        stack = experts.stack(projection)
        if not isinstance(stack, QuantizedStack):
            merged[projection] = stack.merged(
                lambda expert, projection=projection: layer.expert_delta(projection, adapter_names, expert)
            )
            continue
        # a row counts as much as its expert's output does
        rows = inputs[projection][: ends[-1]].float() * weight_of_row[: ends[-1], None]

        def merged_expert(
            expert: int, projection: str = projection, stack: QuantizedStack = stack, rows: torch.Tensor = rows
        ) -> MergedExpert:
            A, B = layer.expert_factors(projection, adapter_names, expert)
            weight = stack.decode_expert(expert, torch.float32)
            own = rows[ends[expert - 1] if expert else 0 : ends[expert]]
            return MergedExpert(
                weight=(weight.T if stack.is_transposed else weight) + B @ A,
                moment=own.T @ own / max(len(own), 1),
                core=torch.linalg.qr(B).R @ A,
            )

        merged[projection] = quantize_second_order(stack, merged_expert, rows.T @ rows / max(len(rows), 1))
    layer.replace_stacks(merged, adapter_names)
