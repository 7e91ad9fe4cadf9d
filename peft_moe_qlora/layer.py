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
"""Adapter name of samples without an adapter in a mixed batch (PEFT's convention)."""

NO_WEIGHT = (
    "A stack of experts has no attribute `weight`. Functions that read `layer.weight`, such as "
    "prepare_model_for_compiled_hotswap, do not support it. Use model.load_adapter(path, adapter_name) to replace the "
    "factors of an adapter by those of another with the same rank, and layer.get_base_weight() to read the weights of "
    "all experts."
)


class Factor(nn.Module):
    """One LoRA factor of all experts; the counterpart of the `nn.Linear` in LoRA on a linear layer.

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
    the stack. The layer itself is never called: `QuantizedExperts` reads the `low_rank_terms` of its projections and
    computes the whole module at once.

    Args:
        base_layer: the stack.
        adapter_name: name of the first adapter.
        config: configuration of the adapter; see `update_layer`.
        r: rank.
        lora_alpha: numerator of the scaling.
        kwargs: other arguments that PEFT passes to all layers; unused.
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
            adapter_name: name of the adapter.
            r: rank.
            lora_alpha: numerator of the scaling.
            config: configuration with dropout, initialization and type of scaling.
            kwargs: other arguments that PEFT passes to all layers; unused.
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
        """Initializes the factors of each expert as PEFT initializes those of a linear layer.

        Args:
            adapter_name: name of the adapter.
            init_lora_weights: True, False (B is not zero), or `"gaussian"`.
        """
        A, B = self.factors(adapter_name)
        r, in_features = A.shape[1:]
        if init_lora_weights == "gaussian":
            nn.init.normal_(A, std=1 / r)
        else:
            # equals nn.Linear's default, kaiming_uniform_(a=sqrt(5)), for a matrix with `in` columns
            nn.init.uniform_(A, -(in_features**-0.5), in_features**-0.5)
        if init_lora_weights is False:
            nn.init.uniform_(B, -(r**-0.5), r**-0.5)
        else:
            nn.init.zeros_(B)

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """`A (E, r, in)` and `B (E, out, r)`."""
        return self.lora_A[adapter_name].weight, self.lora_B[adapter_name].weight

    def active_terms(self) -> list[LowRank]:
        """Low-rank terms of the active adapters, for all tokens; none while adapters are disabled or merged."""
        if self.disable_adapters or self.merged:
            return []
        return [self._term(name) for name in self.active_adapters if name in self.lora_A]

    def low_rank_terms(self, num_tokens: int, adapter_names: Sequence[str] | None = None) -> list[LowRank]:
        """Low-rank terms of the adapters in a forward.

        Args:
            num_tokens: number of tokens of all samples, T.
            adapter_names: in a mixed batch, the adapter of each sample. Default: the active adapters for all samples.

        Raises:
            ValueError: adapters are merged in a mixed batch, or T is not a multiple of the number of samples.
        """
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return []
        if adapter_names is None:
            return self.active_terms()
        if self.merged:
            raise ValueError("adapter_names is not supported while adapters are merged. Call unmerge_adapter() first.")
        if num_tokens % len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries, but the experts got {num_tokens} tokens, which is "
                "not a multiple of it. Pass one name for each sample of the batch."
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
        """`(T,)` bool mask of the tokens to which an adapter applies."""
        device = self.get_base_layer().device
        if torch.compiler.is_compiling():
            of_sample = torch.tensor([name == adapter_name for name in adapter_names], device=device)
        else:
            of_sample = _is_of_sample(adapter_name, tuple(adapter_names), device)
        return of_sample.repeat_interleave(num_tokens // len(adapter_names))

    def expert_factors(self, adapter_names: Iterable[str], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`A (R, in)` and `B (out, R)` of one expert in fp32: all given adapters concatenated, scaling in B."""
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
        """Delta of one expert by the given adapters, `(out, in)` in fp32."""
        A, B = self.expert_factors(adapter_names, expert)
        return B @ A

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Delta of all experts by an adapter, `(E, out, in)` in the dtype of the factors."""
        refuse_sharded(self, "computing the delta of all experts")
        A, B = self.factors(adapter)
        return self.scaling[adapter] * (B @ A)

    def get_base_weight(self) -> torch.Tensor:
        """Dequantized weights in the stack's dtype, `(E, rows, columns)` in the orientation of the experts class."""
        refuse_sharded(self, "decoding a stack")
        stack = self.get_base_layer()
        return stack.decode(stack.dtype)

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Stores `(E, rows, columns)` weights in the storage of the stack.

        Raises:
            ValueError: a weight is not finite.
        """
        for expert, matrix in enumerate(weight_data):
            self.get_base_layer().set_expert(expert, matrix)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the stack, in its storage. The unmerged stack is kept for `unmerge`.

        Args:
            safe_merge: ignored; weights that are not finite are always rejected, since codes cannot represent them.
            adapter_names: adapters to merge. Default: the active adapters that are not merged yet.

        Raises:
            ValueError: a merged weight is not finite; the layer is then unchanged.
        """
        adapter_names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        if not adapter_names:
            return
        names = [*self.merged_adapters, *adapter_names]
        # start from the unmerged stack: requantizing a merged one would round twice
        unmerged = self.unmerged_stack()
        self.base_layer = unmerged.merged(lambda expert: self.expert_delta(names, expert))
        self._unmerged = [unmerged]
        self.merged_adapters = names

    @torch.no_grad()
    def merged_dense(self, dtype: torch.dtype, adapter_names: Iterable[str]) -> DenseStack:
        """Returns a new stack: dequantized weights plus delta in fp32, rounded once to `dtype`."""
        stack, names = self.unmerged_stack(), list(dict.fromkeys([*self.merged_adapters, *adapter_names]))
        matrices = stack.merged_matrices(lambda expert: self.expert_delta(names, expert))
        return DenseStack.from_matrices(matrices, stack.shape, dtype, stack.is_transposed, stack.device)

    def unmerge(self) -> None:
        """Restores the unmerged stack bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self.unmerged_stack()
        self._unmerged, self.merged_adapters = [], []

    def unmerged_stack(self) -> Stack:
        """The stack without any adapter."""
        current = self.get_base_layer()
        # the model may have been moved or cast after the merge
        return self._unmerged[0].to(current.device, current.dtype) if self._unmerged else current

    @property
    def weight(self) -> torch.Tensor:
        """Not available; PEFT reads `weight` where it expects a linear layer."""
        raise AttributeError(NO_WEIGHT)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":  # Python calls this after the property has raised
            raise AttributeError(NO_WEIGHT)
        return super().__getattr__(name)

    def _get_in_out_features(self, module: Stack) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Stack) -> tuple[torch.device, None]:
        # no dtype: PEFT would cast fp32 factors to it when it loads them
        return base_layer.device, None

    def __repr__(self) -> str:
        return "moe_qlora." + super().__repr__()


@lru_cache(maxsize=64)
def _is_of_sample(adapter_name: str, adapter_names: tuple[str, ...], device: torch.device) -> torch.Tensor:
    """`(number of samples,)` bool mask; cached, so that it is copied to the device only once."""
    with torch.inference_mode(False):  # inference tensors cannot be used outside of inference mode
        return torch.tensor([name == adapter_name for name in adapter_names], device=device)
