"""An experts module with quantized stacks, each with or without an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..ops import (
    LARGEST_RANK,
    ComputePath,
    Factors,
    LowRank,
    Routing,
    choose_library_path,
    choose_path,
    combine_rows,
    gather_rows,
    grouped_linear,
    log_once,
    packed_weight,
    route,
    tiles_origin,
    why_no_kernels,
    why_not_read,
)
from ..quantization import Stack
from ..sharded import whole_shape
from .architectures import architecture_of
from .gates import known_gate
from .layout import ExpertsLayout
from .liger import keep_own_forward

Terms = Mapping[str, Sequence[LowRank]]
"""Projection -> low-rank terms of the adapters."""


class QuantizedExperts(nn.Module):
    """Replaces an experts module of transformers and computes it from quantized `Stack`s.

    It replaces the original module in the model and keeps it as `original`, without its parameters. Gate and
    activation of the class are called on `original`, and `restore` returns it with dequantized parameters. Stacks are
    children with the names of the replaced parameters; biases and the norm after the experts keep their names. An
    adapter replaces a stack and has it as `base_layer`. The forward uses its `low_rank_terms`, the report its
    `active_terms`.

    Args:
        original: the experts module, whose stacks have been moved into `stacks`.
        layout: layout of the module.
        stacks: projection name -> stack.
    """

    def __init__(self, original: nn.Module, layout: ExpertsLayout, stacks: Mapping[str, Stack]) -> None:
        super().__init__()
        self.layout = layout
        self.num_experts = layout.num_experts
        for projection in layout.projections:
            self.add_module(projection, stacks[projection])
        if layout.has_bias:
            for projection in layout.projections:
                name = bias_name(projection)
                self.register_parameter(name, original._parameters.pop(name))
        self.post_expert_norm = original._modules.pop("post_expert_norm") if layout.has_post_expert_norm else None
        self.original = original
        self._gate = known_gate(original, layout)
        self._architecture = architecture_of(original)
        self.adapter_names: tuple[str, ...] | None = None
        """In a mixed batch, the adapter of each sample; the argument of `forward` has precedence."""
        self.train(original.training)

    def train(self, mode: bool = True) -> QuantizedExperts:
        # Trainer calls this after Liger's patches and before the first forward, which may be compiled
        keep_own_forward(self, self.layout.class_name)
        return super().train(mode)

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Liger may have been applied without a call of train()
        if "forward" in self.__dict__ and not torch.compiler.is_compiling():
            keep_own_forward(self, self.layout.class_name)
        return super().__call__(*args, **kwargs)

    def stack(self, projection: str) -> Stack:
        """The stack of a projection, adapted or not."""
        module = self._modules[projection]
        return module if isinstance(module, Stack) else module.base_layer

    def low_rank_terms(self, num_tokens: int, adapter_names: Sequence[str] | None = None) -> Terms:
        """Low-rank terms of the adapters in a forward.

        Args:
            num_tokens: number of tokens of all samples, T.
            adapter_names: in a mixed batch, the adapter of each sample. Default: the active adapters for all samples.
        """
        return {
            projection: module.low_rank_terms(num_tokens, adapter_names)
            for projection, module in self._adapted.items()
        }

    def check_complete(self) -> None:
        """Rejects experts of which this process has loaded only a part, unless FSDP2 gathers them.

        Raises:
            ValueError: experts are missing.
        """
        for projection in self.layout.projections:
            stack = self.stack(projection)
            if stack.experts_read is not None and not getattr(stack, "_is_fsdp_managed_module", False):
                raise ValueError(
                    f"{projection} of {self.layout.class_name} contains only experts {stack.experts_read.start} to "
                    f"{stack.experts_read.stop - 1} of {stack.num_experts}, because it was loaded under "
                    "read_part_of_experts. Shard the model with fully_shard or accelerate before you call, merge or "
                    "save it."
                )

    def _active_terms(self) -> Terms:
        """Active terms with A on the meta device in its whole shape, since factors may be sharded."""
        return {
            projection: [
                replace(term, A=term.A.new_empty(whole_shape(term.A), device="meta")) for term in module.active_terms()
            ]
            for projection, module in self._adapted.items()
        }

    @property
    def _adapted(self) -> dict[str, nn.Module]:
        modules = {projection: self._modules[projection] for projection in self.layout.projections}
        return {name: module for name, module in modules.items() if not isinstance(module, Stack)}

    def projection_bias(self, projection: str) -> nn.Parameter | None:
        """`(E, out)`; None if the class has no biases."""
        return self.get_parameter(bias_name(projection)) if self.layout.has_bias else None

    @property
    def is_dense(self) -> bool:
        """Whether all stacks are in floating point."""
        return all(self.stack(projection).storage is None for projection in self.layout.projections)

    def compute_path(self, projection: str) -> ComputePath:
        """The implementation of a projection for activations in the stack's dtype, without mixed batches.

        It depends on the active adapters and the current mode.
        """
        stack, low_rank = self.stack(projection), self._active_terms()
        reason = self._why_not_fused(stack.device, stack.dtype, low_rank)
        if reason is None:
            has_dropout = any(term.dropout is not None for terms in low_rank.values() for term in terms)
            later = "; not fused in training: LoRA dropout" if has_dropout else ""
            return ComputePath("fused", f"{self._gate.kind} gate, {tiles_origin(stack.device, stack.dtype)}{later}")
        choose = choose_path if why_not_read(stack) is None else choose_library_path
        path = choose(stack.device, stack.dtype, stack.in_features, stack.out_features)
        # without a GPU, both reasons are the same
        return path if path.reason == reason else ComputePath(path.name, f"{path.reason}; not fused: {reason}")

    def _why_not_fused(self, device: torch.device, dtype: torch.dtype, low_rank: Terms) -> str | None:
        """The reason why the fused kernels do not support the layer; None if they do."""
        reason = why_no_kernels(device, dtype)
        if reason is not None:
            return reason
        if isinstance(self._gate, str):
            return self._gate
        for projection in self.layout.projections:
            reason = why_not_read(self.stack(projection))
            if reason is not None:
                return reason
        if self.post_expert_norm is not None:
            return "a norm follows the down projection"
        if self.layout.has_bias and any(self.projection_bias(name).requires_grad for name in self.layout.projections):
            return "the biases are trained"
        for terms in low_rank.values():
            rank = sum(term.A.shape[1] for term in terms)
            if rank > LARGEST_RANK:
                return f"the adapters' ranks add up to {rank}; the kernels support at most {LARGEST_RANK}"
        for term in (term for terms in low_rank.values() for term in terms):
            if term.token_mask is not None:
                return "adapters differ by sample"
            if term.dropout is not None and term.dropout.training:
                return "LoRA dropout"
        return None

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """Output of the experts: `(T, H)` -> `(T, H)` in the dtype of `hidden_states`.

        Args:
            hidden_states: `(T, H)`.
            top_k_index: `(T, K)` ids of the chosen experts; ids outside `[0, E)` are skipped. None, like the weights,
                for classes with another signature (`architectures`).
            top_k_weights: `(T, K)` routing weights in any floating-point dtype.
            adapter_names: in a mixed batch, the adapter of each sample. Default: `self.adapter_names`, or else the
                active adapters for all samples.

        Raises:
            ValueError: a mixed batch in a class that is called with several copies of each token; the module is a
                replica of DataParallel; or this process has loaded only a part of the experts.
        """
        if getattr(self, "_is_replica", False):
            raise ValueError(
                f"{self.layout.class_name} is a replica of nn.DataParallel, which has no parameters for packed "
                "experts. Start one process per GPU with torchrun or accelerate launch, or make only one GPU visible."
            )
        self.check_complete()
        adapter_names = self.adapter_names if adapter_names is None else adapter_names
        if adapter_names is not None and top_k_index is None:
            raise ValueError(
                f"adapter_names is not supported for {self.layout.class_name}, which is called with one copy of all "
                "tokens for each expert. Use one adapter at a time."
            )
        low_rank = self.low_rank_terms(hidden_states.shape[0], adapter_names)
        hidden_states, top_k_index, top_k_weights = self.routed(hidden_states, top_k_index, top_k_weights)
        dtype = self._compute_dtype(hidden_states)
        if top_k_index.numel():
            reason = self._why_not_fused(hidden_states.device, dtype, low_rank)
            if reason is None:
                return self._fused(hidden_states.to(dtype), top_k_index, top_k_weights, low_rank).to(
                    hidden_states.dtype
                )
            if hidden_states.device.type == "cuda" and not torch.compiler.is_compiling():
                log_once(f"{self.layout.class_name} does not use the fused kernels: {reason}.")
        routing = route(top_k_index, self.num_experts)
        rows = self._activated(gather_rows(hidden_states.to(dtype), routing), routing, low_rank)
        rows = self._project(self.layout.projections[1], rows, routing, low_rank)
        if self.post_expert_norm is not None:
            rows = self.post_expert_norm(rows)
        return combine_rows(rows, top_k_weights, routing).to(hidden_states.dtype)

    def _fused(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low_rank: Terms,
    ) -> torch.Tensor:
        from ..ops.fused_experts import fused_experts  # needs Triton

        up, down = self.layout.projections
        return fused_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            packed_weight(self.stack(up)),
            packed_weight(self.stack(down)),
            self._gate,
            _joined(low_rank.get(up, ())),
            _joined(low_rank.get(down, ())),
            self.projection_bias(up),
            self.projection_bias(down),
        )

    def routed(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of `forward`, with ids and weights for classes with another signature."""
        if top_k_index is None:
            top_k_index, top_k_weights = self._architecture.route(hidden_states, self.num_experts)
        return hidden_states, top_k_index, top_k_weights

    def projection_inputs(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, low_rank: Terms
    ) -> tuple[Routing, dict[str, torch.Tensor]]:
        """The routing, and the inputs of each projection: projection -> `(S, in)` routed rows, sorted by expert.

        Args:
            hidden_states: `(T, H)`.
            top_k_index: `(T, K)` ids of the chosen experts.
            low_rank: projection name -> low-rank terms.
        """
        up, down = self.layout.projections
        routing = route(top_k_index, self.num_experts)
        rows = gather_rows(hidden_states.to(self._compute_dtype(hidden_states)), routing)
        return routing, {up: rows, down: self._activated(rows, routing, low_rank)}

    def _activated(self, rows: torch.Tensor, routing: Routing, low_rank: Terms) -> torch.Tensor:
        up = self._project(self.layout.up_name, rows, routing, low_rank)
        return self._activate(up).to(rows.dtype)

    def _project(self, projection: str, rows: torch.Tensor, routing: Routing, low_rank: Terms) -> torch.Tensor:
        bias, terms = self.projection_bias(projection), low_rank.get(projection, ())
        return grouped_linear(rows, self.stack(projection), routing, bias, terms)

    def _activate(self, rows: torch.Tensor) -> torch.Tensor:
        if self._architecture is not None:
            return self._architecture.apply_gate(self.original, rows)
        if self.layout.has_gate:
            return self.original._apply_gate(rows)
        return self.original.act_fn(rows)

    def _compute_dtype(self, hidden_states: torch.Tensor) -> torch.dtype:
        device_type = hidden_states.device.type
        if torch.is_autocast_enabled(device_type):
            return torch.get_autocast_dtype(device_type)
        return self.stack(self.layout.up_name).compute_dtype(hidden_states.dtype)

    def restore(self, dtype: torch.dtype | None) -> nn.Module:
        """Returns the original module with dequantized stacks; this module is empty afterwards."""
        self.check_complete()
        for projection in self.layout.projections:
            # one stack at a time is in memory in both storages
            stack = self._modules.pop(projection)
            weight = stack.decode(dtype or stack.dtype)
            if stack.is_transposed != self.layout.is_transposed:
                weight = weight.transpose(1, 2).contiguous()
            self.original.register_parameter(projection, nn.Parameter(weight, requires_grad=False))
            if self.layout.has_bias:
                name = bias_name(projection)
                self.original.register_parameter(name, self._parameters.pop(name))
        if self.post_expert_norm is not None:
            self.original.post_expert_norm = self.post_expert_norm
            self.post_expert_norm = None
        return self.original.train(self.training)

    def __getattr__(self, name: str) -> Any:
        # models may read attributes of the original class, such as sizes or the config
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "original":
                raise
            return getattr(self.original, name)

    def extra_repr(self) -> str:
        return f"{self.layout.class_name}, num_experts={self.num_experts}"


def bias_name(projection: str) -> str:
    return f"{projection}_bias"


def _joined(terms: Sequence[LowRank]) -> Factors | None:
    """Several low-rank terms as one, concatenated along the rank."""
    if not terms:
        return None
    if len(terms) == 1:
        return Factors(terms[0].A, terms[0].B, terms[0].scaling)
    A = torch.cat([term.A for term in terms], dim=1)
    B = torch.cat([term.scaling * term.B for term in terms], dim=2)
    return Factors(A, B, 1.0)
