"""Several adapters combined into one, by PEFT's formulas, on experts for each of them."""

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
    """The rank that a combination of adapters of the given ranks has on experts.

    Raises:
        ValueError: the ranks differ, and `kind` adds factors.
    """
    if kind == "cat":
        return sum(ranks)
    if kind.endswith("svd"):
        return svd_rank or max(ranks)
    if len(set(ranks)) > 1:
        raise ValueError(f"combination_type={kind!r} needs adapters of one rank for experts, got {list(ranks)}.")
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
        """The config of the combination, whose scaling is 1.

        Args:
            model: that the adapters are in.
            rank: of linear layers.
            target_modules: of all adapters.
            svd_rank: rank on experts of the `svd` forms. Default: the largest.

        Raises:
            ValueError: the adapters' ranks differ where one is needed, or a layer that one of them has would be left
                out.
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
                    f"The adapters {list(self.adapters)} reach different layers by layers_to_transform or "
                    f"exclude_modules: {path} would be left out. Combine adapters that share these options."
                )
        return config

    @torch.no_grad()
    def fill(self, model: LoraModel, layer: LoraLayer, adapter_name: str) -> None:
        """Fills the factors of `adapter_name`, of scaling 1, on one layer.

        Args:
            model: whose methods are PEFT's formulas.
            layer: linear, embedding, or on a stack of experts.
            adapter_name: an adapter of at least the rank of the combination.
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
        # where a layer has fewer features than the rank, an SVD gives one of the two less than the other
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
        """The best rank-`rank` approximation of the weighted sum, by QR of the factors and an SVD of the small core.

        As PEFT's SVD of the sum itself, for all experts at once and without their dense matrices.
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
        """The factors of the adapters that a layer has, weight and scaling in A."""
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
    """One expert as PEFT's formulas see a linear layer."""
    factors = {name: layer.factors(name) for name in layer.lora_A}
    return SimpleNamespace(
        lora_A={name: SimpleNamespace(weight=A[expert]) for name, (A, _) in factors.items()},
        lora_B={name: SimpleNamespace(weight=B[expert]) for name, (_, B) in factors.items()},
        lora_embedding_A={},
        scaling=layer.scaling,
        get_delta_weight=lambda name: layer.scaling[name] * (factors[name][1][expert] @ factors[name][0][expert]),
    )
