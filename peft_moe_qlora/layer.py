"""LoRA on one projection of an experts module."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from .config import MoeQLoraConfig
from .ops import LowRank
from .quantization import DenseStack, Stack
from .sharded import refuse_sharded

BASE = "__base__"
"""Adapter name of a sample that no adapter applies to, in a mixed batch (PEFT's convention)."""

NO_WEIGHT = (
    "A stack of experts has no weight matrix, so prepare_model_for_compiled_hotswap and others that read "
    "`layer.weight` can't treat it as a linear layer. model.load_adapter(path, adapter_name) replaces the factors of "
    "an adapter by those of another of the same rank; layer.get_base_weight() gives the weights of all experts."
)


class Factor(nn.Module):
    """One factor of all experts, in the place that an `nn.Linear` has in LoRA on a linear layer.

    Args:
        weight: `(E, r, in)` for A, `(E, out, r)` for B.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def extra_repr(self) -> str:
        return str(tuple(self.weight.shape))


class ExpertsLora(nn.Module, LoraLayer):
    """LoRA on the stack of one projection: `delta[e] = scaling * B[e] @ A[e]`, applied to the activations.

    `lora_A.<adapter>.weight` is `(E, r, in)` and `lora_B.<adapter>.weight` `(E, out, r)`, for either orientation of
    the stack. The layer itself is never called: `QuantizedExperts` gets the `low_rank_terms` of its projections and
    computes the whole module at once.

    Args:
        base_layer: the stack.
        adapter_name: the first adapter.
        config: of the adapter; see `update_layer`.
        r: rank.
        lora_alpha: numerator of the scaling.
        kwargs: what PEFT passes to all layers, unused.
    """

    def __init__(
        self, base_layer: Stack, adapter_name: str, config: MoeQLoraConfig, r: int, lora_alpha: float, **kwargs: Any
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self._unmerged: list[Stack] = []  # at most one; a list, since a module would be registered
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: MoeQLoraConfig, **kwargs: Any
    ) -> None:
        """Adds an adapter, or replaces one.

        Args:
            adapter_name: its name.
            r: rank.
            lora_alpha: numerator of the scaling.
            config: dropout, initialization and kind of scaling.
            kwargs: what PEFT passes to all layers, unused.
        """
        stack = self.get_base_layer()
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = config.scaling(r, lora_alpha)
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = self.lora_bias[adapter_name] = False
        self.lora_dropout[adapter_name] = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        E, device = stack.num_experts, stack.device
        self.lora_A[adapter_name] = Factor(torch.empty(E, r, stack.in_features, device=device))
        self.lora_B[adapter_name] = Factor(torch.empty(E, stack.out_features, r, device=device))
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        for factor in (self.lora_A, self.lora_B):
            factor[adapter_name].to(stack.dtype)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        """Initializes each expert's factors as PEFT does those of one linear layer.

        Args:
            adapter_name: whose.
            init_lora_weights: True, False (B is not zero), or `"gaussian"`.
        """
        A, B = self.factors(adapter_name)
        r, in_features = A.shape[1:]
        if init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            # nn.Linear's default, kaiming_uniform_(a=sqrt(5)), is this for one matrix of `in` columns
            nn.init.uniform_(A, -(in_features**-0.5), in_features**-0.5)
        if init_lora_weights is False:
            nn.init.uniform_(B, -(r**-0.5), r**-0.5)
        else:
            nn.init.zeros_(B)

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """`A (E, r, in)` and `B (E, out, r)`."""
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def active_terms(self) -> list[LowRank]:
        """What active adapters add to all tokens: nothing while they are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [self._term(name) for name in self.active_adapters if name in self.lora_A]

    def low_rank_terms(self, num_tokens: int, adapter_names: Sequence[str] | None = None) -> list[LowRank]:
        """What adapters add in a forward.

        Args:
            num_tokens: T, of all samples together.
            adapter_names: in a mixed batch, the adapter of each sample. Default: the active ones for all.

        Raises:
            ValueError: a mixed batch while adapters are merged, or one whose samples can't be of one length.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if adapter_names is None:
            return self.active_terms()
        if self.merged:
            raise ValueError("adapter_names can't be passed while adapters are merged; call unmerge_adapter() first.")
        if num_tokens % len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries, but the experts got {num_tokens} tokens, which is "
                "no multiple of it. Pass one name for each sample of the batch."
            )
        names = [name for name in dict.fromkeys(adapter_names) if name in self.lora_A]
        return [self._term(name, self._tokens_of(name, adapter_names, num_tokens)) for name in names]

    def _term(self, adapter_name: str, token_mask: torch.Tensor | None = None) -> LowRank:
        dropout = self.lora_dropout[adapter_name]
        return LowRank(
            *self.factors(adapter_name),
            self.scaling[adapter_name],
            dropout if isinstance(dropout, nn.Dropout) else None,
            token_mask,
        )

    def _tokens_of(self, adapter_name: str, adapter_names: Sequence[str], num_tokens: int) -> torch.Tensor:
        """`(T,)` bool: the tokens of samples that an adapter applies to."""
        device = self.get_base_layer().device
        if torch.compiler.is_compiling():
            of_sample = torch.tensor([name == adapter_name for name in adapter_names], device=device)
        else:
            of_sample = _is_of_sample(adapter_name, tuple(adapter_names), device)
        return of_sample.repeat_interleave(num_tokens // len(adapter_names))

    def expert_factors(self, adapter_names: Iterable[str], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (R, in)` and `B (out, R)` fp32 of one expert: the given adapters' side by side, scaling in B."""
        stack = self.get_base_layer()
        A = [torch.zeros(0, stack.in_features, device=stack.device)]
        B = [torch.zeros(stack.out_features, 0, device=stack.device)]
        for name in adapter_names:
            if name in self.lora_A:
                of_expert = [factor[expert].detach().to(stack.device, torch.float32) for factor in self.factors(name)]
                A.append(of_expert[0])
                B.append(self.scaling[name] * of_expert[1])
        return torch.cat(A), torch.cat(B, dim=1)

    def expert_delta(self, adapter_names: Iterable[str], expert: int) -> torch.Tensor:
        """`(out, in)` fp32: what the given adapters add to one expert's matrix."""
        A, B = self.expert_factors(adapter_names, expert)
        return B @ A

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`(E, out, in)` in the dtype of the factors: what an adapter adds to all experts' matrices."""
        refuse_sharded(self, "a delta of all experts")
        A, B = self.factors(adapter)
        return self.scaling[adapter] * (B @ A)

    def get_base_weight(self) -> torch.Tensor:
        """`(E, rows, columns)` as the class stores it, dequantized to the stack's dtype."""
        refuse_sharded(self, "decoding a stack")
        stack = self.get_base_layer()
        return stack.decode(stack.dtype)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Stores `(E, rows, columns)` weights, in the storage of the stack.

        Raises:
            ValueError: a weight is not finite.
        """
        for expert, matrix in enumerate(weight_data):
            self.get_base_layer().set_expert(expert, matrix)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the stack, in its storage. The stack of before is kept for `unmerge`.

        Args:
            safe_merge: for PEFT's sake; weights that are not finite are always refused, since no code could show them.
            adapter_names: what to merge. Default: the active adapters that are not merged yet.

        Raises:
            ValueError: a merged weight is not finite; the layer is then as it was.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapter_names:
            return
        names = [*self.merged_adapters, *adapter_names]
        # from the stack of before: requantizing a merged one would round twice
        unmerged = self.unmerged_stack()
        self.base_layer = unmerged.merged(lambda expert: self.expert_delta(names, expert))
        self._unmerged = [unmerged]
        self.merged_adapters = names

    @torch.no_grad()
    def merged_dense(self, dtype: torch.dtype, adapter_names: Iterable[str]) -> DenseStack:
        """A new stack: dequantized weights plus delta in fp32, rounded once to `dtype`."""
        stack, names = self.unmerged_stack(), list(dict.fromkeys([*self.merged_adapters, *adapter_names]))
        matrices = stack.merged_matrices(lambda expert: self.expert_delta(names, expert))
        return DenseStack.from_matrices(matrices, stack.shape, dtype, stack.is_transposed, stack.device)

    def unmerge(self) -> None:
        """Puts the stack of before the merge back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self.unmerged_stack()
        self._unmerged, self.merged_adapters = [], []

    def unmerged_stack(self) -> Stack:
        """The stack without any adapter."""
        current = self.get_base_layer()
        # the model may have been moved or cast since
        return self._unmerged[0].to(current.device, current.dtype) if self._unmerged else current

    @property
    def weight(self) -> torch.Tensor:
        """There is none: PEFT reads a `weight` where it takes a layer for a linear one."""
        raise AttributeError(NO_WEIGHT)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # Python asks here after the property
            raise AttributeError(NO_WEIGHT)
        return super().__getattr__(name)

    def _get_in_out_features(self, module: Stack) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Stack) -> tuple[torch.device, None]:
        # no dtype: PEFT would round fp32 factors to it when it loads them
        return base_layer.device, None

    def __repr__(self) -> str:
        return "moe_qlora." + super().__repr__()


@lru_cache(maxsize=64)
def _is_of_sample(adapter_name: str, adapter_names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """`(number of samples,)` bool; copied to the device once, not in every layer of every step."""
    with torch.inference_mode(False):  # a tensor made in it could not be used outside of it
        return torch.tensor([name == adapter_name for name in adapter_names], device=device)
