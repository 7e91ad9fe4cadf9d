"""The adapter on one experts module: factors, forward, merge and unmerge."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn

from .config import MoeQLoraConfig
from .experts import QuantizedExperts, refuse_liger
from .ops import LowRank
from .quantization import DenseStack, Stack

BASE = "__base__"
"""Adapter name of a sample that no adapter applies to, in a mixed batch (PEFT's convention)."""


class MoeQLoraExperts(nn.Module, BaseTunerLayer):
    """LoRA on the stacks of one experts module, applied to the activations.

    For each adapted projection, `lora_<projection>_A[adapter]` is `(E, R, in)` and `lora_<projection>_B[adapter]` is
    `(E, out, R)`, whatever the orientation of the stack; `delta[e] = scaling * B[e] @ A[e]`.

    Args:
        base_layer: the experts.
        adapter_name: the adapter to be active first.
    """

    other_param_names = ("r", "lora_alpha", "scaling", "lora_dropout")

    def __init__(self, base_layer: QuantizedExperts, adapter_name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter = adapter_name
        self.r: dict[str, dict[str, int]] = {}
        self.lora_alpha: dict[str, dict[str, float]] = {}
        self.scaling: dict[str, dict[str, float]] = {}
        self.lora_dropout = nn.ModuleDict()
        names = []
        for projection in base_layer.layout.projections:
            for factor in "AB":
                names.append(f"lora_{projection}_{factor}")
                self.add_module(names[-1], nn.ParameterDict())
        self.adapter_layer_names = tuple(names)
        self.merged_adapters: list[str] = []
        self._unmerged_stacks: dict[str, Stack] = {}
        self.train(base_layer.training)

    def train(self, mode: bool = True) -> MoeQLoraExperts:
        # a Trainer calls this between Liger's patches and the first forward
        refuse_liger(self, self.base_layer.layout.class_name)
        return super().train(mode)

    @property
    def in_features(self) -> int:
        return self.base_layer.layout.hidden_size

    @property
    def out_features(self) -> int:
        return self.base_layer.layout.hidden_size

    def factors(self, projection: str, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter] | None:
        """`A (E, R, in)` and `B (E, out, R)`, None where the adapter leaves the projection alone."""
        A = self.get_submodule(f"lora_{projection}_A")
        if adapter_name not in A:
            return None
        return A[adapter_name], self.get_submodule(f"lora_{projection}_B")[adapter_name]

    def update_layer(
        self, adapter_name: str, ranks: dict[str, int], alphas: dict[str, float], config: MoeQLoraConfig
    ) -> None:
        """Adds an adapter.

        Args:
            adapter_name: a name; factors that it has already are replaced.
            ranks: projection -> rank of its factors; projections left out get none.
            alphas: projection -> alpha.
            config: dropout, initialization and kind of scaling.
        """
        for name in self.adapter_layer_names:
            container = self.get_submodule(name)
            if adapter_name in container:
                del container[adapter_name]
        self.r[adapter_name] = dict(ranks)
        self.lora_alpha[adapter_name] = dict(alphas)
        self.scaling[adapter_name] = {name: config.scaling(ranks[name], alphas[name]) for name in ranks}
        has_dropout = config.lora_dropout > 0
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if has_dropout else nn.Identity()
        for projection, r in ranks.items():
            stack = self.base_layer.stack(projection)
            A, B = self._initial_factors(stack, r, config.init_lora_weights)
            self.get_submodule(f"lora_{projection}_A")[adapter_name] = nn.Parameter(A.to(stack.dtype))
            self.get_submodule(f"lora_{projection}_B")[adapter_name] = nn.Parameter(B.to(stack.dtype))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @staticmethod
    def _initial_factors(stack: Stack, r: int, init: bool | str) -> tuple[torch.Tensor, torch.Tensor]:
        """Each expert's factors as PEFT initializes those of one linear layer, in fp32."""
        E, device = stack.num_experts, stack.device
        A = torch.empty(E, r, stack.in_features, device=device)
        B = torch.zeros(E, stack.out_features, r, device=device)
        if init == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            # nn.Linear's default, kaiming_uniform_(a=sqrt(5)), is this for one matrix of `in` columns
            nn.init.uniform_(A, -(stack.in_features**-0.5), stack.in_features**-0.5)
        if init is False:
            nn.init.uniform_(B, -(r**-0.5), r**-0.5)
        return A, B

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        adapter_names: Sequence[str] | None = None,
    ) -> torch.Tensor:
        """As `QuantizedExperts.forward`; `adapter_names` gives the adapter of each sample of a mixed batch."""
        low_rank: dict[str, list[LowRank]] = {}
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
        elif adapter_names is not None:
            if top_k_index is None:
                raise ValueError(
                    f"adapter_names can't be passed to {self.base_layer.layout.class_name}, which is called with one "
                    "copy of all tokens for each expert; pass one adapter at a time."
                )
            self._check_mixed_batch(hidden_states, adapter_names)
            low_rank = self._mixed_low_rank(hidden_states, adapter_names)
        else:
            low_rank = self.active_terms()
        return self.base_layer(hidden_states, top_k_index, top_k_weights, low_rank=low_rank)

    def active_terms(self) -> dict[str, list[LowRank]]:
        """What a forward adds: projection -> terms of the active adapters, none if they are disabled or merged."""
        return {} if self.disable_adapters or self.merged else self.low_rank_terms(self.active_adapters)

    def low_rank_terms(
        self, adapter_names: Sequence[str], token_masks: dict[str, torch.Tensor] | None = None
    ) -> dict[str, list[LowRank]]:
        """What the given adapters add: projection -> terms, for the tokens of their masks if there are any."""
        terms: dict[str, list[LowRank]] = {}
        for adapter_name in adapter_names:
            for projection in self.r.get(adapter_name, ()):
                A, B = self.factors(projection, adapter_name)
                dropout = self.lora_dropout[adapter_name]
                term = LowRank(
                    A,
                    B,
                    self.scaling[adapter_name][projection],
                    dropout if isinstance(dropout, nn.Dropout) else None,
                    token_masks[adapter_name] if token_masks else None,
                )
                terms.setdefault(projection, []).append(term)
        return terms

    def _check_mixed_batch(self, hidden_states: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if self.merged:
            raise ValueError("adapter_names can't be passed while adapters are merged; call unmerge_adapter() first.")
        num_tokens = hidden_states.shape[0]
        if num_tokens % len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries, but the experts got {num_tokens} tokens, which is "
                "no multiple of it. Pass one name for each sample of the batch."
            )

    def _mixed_low_rank(self, hidden_states: torch.Tensor, adapter_names: Sequence[str]) -> dict[str, list[LowRank]]:
        """The terms of every adapter in the batch, each masked to the tokens of its samples."""
        tokens_per_sample = hidden_states.shape[0] // len(adapter_names)
        masks = {}
        for adapter_name in dict.fromkeys(name for name in adapter_names if name != BASE):
            of_sample = torch.tensor([name == adapter_name for name in adapter_names], device=hidden_states.device)
            masks[adapter_name] = of_sample.repeat_interleave(tokens_per_sample)
        return self.low_rank_terms(list(masks), masks)

    def expert_delta(self, projection: str, adapter_names: Sequence[str], expert: int) -> torch.Tensor:
        """`(out, in)` fp32: what the given adapters add to one expert's matrix."""
        A, B = self.expert_factors(projection, adapter_names, expert)
        return B @ A

    def expert_factors(
        self, projection: str, adapter_names: Sequence[str], expert: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (R, in)` and `B (out, R)` fp32 of one expert: the given adapters' side by side, scaling in B."""
        stack = self.base_layer.stack(projection)
        A = [torch.zeros(0, stack.in_features, device=stack.device)]
        B = [torch.zeros(stack.out_features, 0, device=stack.device)]
        for adapter_name in adapter_names:
            factors = self.factors(projection, adapter_name)
            if factors is not None:
                of_expert = (factor[expert].detach().to(stack.device, torch.float32) for factor in factors)
                A.append(next(of_expert))
                B.append(self.scaling[adapter_name][projection] * next(of_expert))
        return torch.cat(A), torch.cat(B, dim=1)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the adapters to the stacks, in their storage. The stacks of before are kept for `unmerge`.

        All stacks are merged before one is replaced, so that an error leaves the layer as it was.

        Args:
            safe_merge: for PEFT's sake; weights that are not finite are always refused, since no code could show them.
            adapter_names: what to merge. Default: the active adapters that are not merged yet.

        Raises:
            ValueError: a merged weight is not finite.
        """
        adapter_names = check_adapters_to_merge(self, adapter_names)
        adapter_names = [name for name in adapter_names if self.r.get(name)]
        if not adapter_names:
            return
        names = [*self.merged_adapters, *adapter_names]
        # from the first stacks, not from the merged ones: requantizing twice would round twice
        merged = {
            projection: self._base_stack(projection).merged(
                lambda expert, projection=projection: self.expert_delta(projection, names, expert)
            )
            for projection in self.adapted_projections(names)
        }
        for projection in merged:
            self._unmerged_stacks.setdefault(projection, self.base_layer.stack(projection))
        self.replace_stacks(merged, names)

    def replace_stacks(self, merged: Mapping[str, Stack], adapter_names: Sequence[str]) -> None:
        """Puts merged stacks in the place of those that they were made from.

        Args:
            merged: projection -> stack.
            adapter_names: what is merged into them.
        """
        for projection, stack in merged.items():
            self.base_layer.add_module(projection, stack)
        self.merged_adapters = list(adapter_names)

    def _base_stack(self, projection: str) -> Stack:
        current = self.base_layer.stack(projection)
        # the model may have been moved or cast since
        return self._unmerged_stacks.get(projection, current).to(current.device, current.dtype)

    def adapted_projections(self, adapter_names: Sequence[str]) -> list[str]:
        """Names of the projections that one of the adapters has factors for."""
        return [
            projection
            for projection in self.base_layer.layout.projections
            if any(projection in self.r.get(name, ()) for name in adapter_names)
        ]

    def unmerge(self) -> None:
        """Puts the stacks of before the merge back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for projection in self._unmerged_stacks:
            self.base_layer.add_module(projection, self._base_stack(projection))
        self._unmerged_stacks = {}
        self.merged_adapters = []

    @torch.no_grad()
    def merge_into_dense(self, dtype: torch.dtype, adapter_names: list[str] | None = None) -> None:
        """Merges into floating point: dequantized weights plus delta, in fp32, rounded once to `dtype`."""
        names = list(self.merged_adapters)
        if self.merged:
            self.unmerge()
        adapter_names = self.active_adapters if adapter_names is None else adapter_names
        names += [name for name in adapter_names if name not in names]
        merged = {}
        for projection in self.base_layer.layout.projections:
            stack = self.base_layer.stack(projection)
            matrices = stack.merged_matrices(
                lambda expert, projection=projection: self.expert_delta(projection, names, expert)
            )
            merged[projection] = DenseStack.from_matrices(
                matrices, stack.shape, dtype, stack.is_transposed, stack.device
            )
        for projection, stack in merged.items():
            self.base_layer.add_module(projection, stack)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Moves the factors; their dtype stays, so that fp32 factors loaded beside bf16 experts are not rounded."""
        device = device or self.base_layer.stack("down_proj").device
        for name in self.adapter_layer_names:
            container = self.get_submodule(name)
            if adapter_name in container and not container[adapter_name].is_meta:
                factor = container[adapter_name]
                container[adapter_name] = nn.Parameter(factor.data.to(device), requires_grad=factor.requires_grad)

    def __getattr__(self, name: str) -> Any:
        # models may ask their experts for sizes or for the config
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "moe_qlora." + super().__repr__()
