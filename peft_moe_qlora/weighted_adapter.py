"""Weighted combination of adapters with PEFT's methods, on experts separately for each expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import check_target_module_exists

from .config import MoeQLoraConfig
from .layer import ExpertsLora

Pair = tuple[torch.Tensor, torch.Tensor]


def combined_rank(kind: str, ranks: Sequence[int], svd_rank: int | None) -> int:
    """Rank on experts of a combination of adapters with the given ranks.

    Raises:
        ValueError: the ranks differ, and `kind` requires equal ranks.
    """
    if kind == "cat":
        return sum(ranks)
    if kind.endswith("svd"):
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        raise ValueError(
            f"combination_type={kind!r} requires adapters of the same rank on experts, found ranks {list(ranks)}."
        )
    return ranks[0]


@dataclass(frozen=True)
class Combination:
    """How adapters are combined; see `MoeQLoraModel.add_weighted_adapter`."""

    adapters: Sequence[str]
    weights: Sequence[float]
    kind: str
    density: float | None = None
    majority_sign_method: str = "total"
    clamp: float | None = None
    full_matrices: bool = True
    driver: str | None = None

    def config(
        self, model: LoraModel, rank: int, target_modules: set[str] | str, svd_rank: int | None
    ) -> MoeQLoraConfig:
        """Config of the combination, with a scaling of 1.

        Args:
            model: model with the adapters.
            rank: rank on linear layers.
            target_modules: target modules of all adapters.
            svd_rank: rank on experts of the `svd` types. Default: the largest rank of the adapters.

        Raises:
            ValueError: the ranks differ for a type that requires equal ranks, or a layer of one of the adapters would
                be missing.
        """
        configs = [model.peft_config[name] for name in self.adapters]
        expert_rank = combined_rank(self.kind, [config.largest_expert_r for config in configs], svd_rank)
        unit = configs[0].scaling
        config = replace(
            configs[0],
            r=rank,
            lora_alpha=1 / unit(rank, 1.0),
            expert_r=expert_rank,
            expert_alpha=1 / unit(expert_rank, 1.0),
            target_modules=target_modules,
            rank_pattern={},
            alpha_pattern={},
        )
        for path, layer in model.model.named_modules():
            is_adapted = isinstance(layer, LoraLayer) and any(name in layer.r for name in self.adapters)
            if is_adapted and not check_target_module_exists(config, path):
                raise ValueError(
                    f"The adapters {list(self.adapters)} have different layers, by layers_to_transform or "
                    f"exclude_modules: {path} would be missing from the combination. Combine adapters that share "
                    "these options."
                )
        return config

    @torch.no_grad()
    def fill(self, model: LoraModel, layer: LoraLayer, adapter_name: str) -> None:
        """Fills the factors of `adapter_name`, which has a scaling of 1, on one layer.

        Args:
            model: the tuner, which has PEFT's methods.
            layer: LoRA layer on a linear layer, an embedding or a stack of experts.
            adapter_name: an adapter with at least the rank of the combination.
        """
        new_A, new_B = _factors(layer, adapter_name)
        if self.kind == "cat":
            pairs = self._scaled_pairs(layer)
            A, B = torch.cat([A for A, _ in pairs], dim=-2), torch.cat([B for _, B in pairs], dim=-1)
        elif isinstance(layer, ExpertsLora):
            A, B = self._of_experts(model, layer, adapter_name)
        else:
            A, B = self._of_layer(model, layer, new_A, new_B)
        new_A.zero_()
        new_B.zero_()
        # if a layer has fewer features than the rank, the SVD returns smaller factors
        new_A[..., : A.shape[-2], :] = A
        new_B[..., : B.shape[-1]] = B

    def _of_experts(self, model: LoraModel, layer: ExpertsLora, adapter_name: str) -> Pair:
        if self.kind == "svd":
            return self._truncated_sum(layer, layer.r[adapter_name])
        new_A, new_B = layer.factors(adapter_name)
        experts = [_of_expert(layer, expert) for expert in range(layer.get_base_layer().num_experts)]
        pairs = [self._of_layer(model, one, new_A[e], new_B[e]) for e, one in enumerate(experts)]
        return torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])

    def _truncated_sum(self, layer: ExpertsLora, rank: int) -> Pair:
        """Best rank-`rank` approximation of the weighted sum, by QR of the factors and an SVD of the small core.

        Equal to PEFT's SVD of the sum, but for all experts at once and without dense matrices.
        """
        pairs = self._scaled_pairs(layer)
        Q_out, R_out = torch.linalg.qr(torch.cat([B.float() for _, B in pairs], dim=2))
        Q_in, R_in = torch.linalg.qr(torch.cat([A.float() for A, _ in pairs], dim=1).transpose(1, 2))
        U, S, Vh = torch.linalg.svd(R_out @ R_in.transpose(1, 2), full_matrices=False, driver=self.driver)
        B = Q_out @ (U * S[:, None, :])[:, :, :rank]
        A = Vh[:, :rank] @ Q_in.transpose(1, 2)
        if self.clamp is not None:
            values = torch.cat([B.flatten(1), A.flatten(1)], dim=1)
            limit = torch.quantile(values, self.clamp, dim=1)[:, None, None]
            A, B = A.clamp(-limit, limit), B.clamp(-limit, limit)
        return A, B

    def _scaled_pairs(self, layer: LoraLayer) -> list[Pair]:
        """Factors of the adapters on a layer, with weight and scaling in A."""
        found = [(name, weight) for name, weight in zip(self.adapters, self.weights) if name in layer.r]
        pairs = [(weight * layer.scaling[name], *_factors(layer, name)) for name, weight in found]
        return [(scale * A, B) for scale, A, B in pairs]

    def _of_layer(self, model: LoraModel, layer: LoraLayer, new_A: torch.Tensor, new_B: torch.Tensor) -> Pair:
        if not self.kind.endswith("svd"):
            return model._generalized_task_arithmetic_weighted_adapter(
                self.kind, self.adapters, self.weights, layer, self.density, self.majority_sign_method
            )
        return model._svd_generalized_task_arithmetic_weighted_adapter(
            self.kind,
            self.adapters,
            self.weights,
            new_A.shape[-2],
            layer,
            new_A,
            new_B,
            self.density,
            self.majority_sign_method,
            self.clamp,
            full_matrices=self.full_matrices,
            driver=self.driver,
        )


def _factors(layer: LoraLayer, adapter_name: str) -> Pair:
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name].data, layer.lora_embedding_B[adapter_name].data
    return layer.lora_A[adapter_name].weight.data, layer.lora_B[adapter_name].weight.data


def _of_expert(layer: ExpertsLora, expert: int) -> SimpleNamespace:
    """One expert with the interface of a linear LoRA layer, for PEFT's methods."""
    factors = {name: layer.factors(name) for name in layer.lora_A}
    return SimpleNamespace(
        lora_A={name: SimpleNamespace(weight=A[expert]) for name, (A, _) in factors.items()},
        lora_B={name: SimpleNamespace(weight=B[expert]) for name, (_, B) in factors.items()},
        lora_embedding_A={},
        scaling=layer.scaling,
        get_delta_weight=lambda name: layer.scaling[name] * (factors[name][1][expert] @ factors[name][0][expert]),
    )
