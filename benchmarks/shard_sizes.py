"""Memory of one of several GPUs in training, computed from shapes without loading a model.

    python benchmarks/shard_sizes.py --ranks 8 --tokens 4096 8192 16384

Letters: N ranks, L layers with experts, D layers in total, E experts, H hidden size, I intermediate size, T tokens of
a rank, K experts per token, r rank of the experts' factors, V size of the vocabulary.

With FSDP2 or ZeRO-3 and an adapter on experts, the memory of one rank in bytes is:

    codes    = L * E * 3 * H * I / 2 / N
    scales   = L * E * 3 * H * I / 64 / N            and a little, with double_quant; four times as much without
    others   = 2 * (all weights outside the experts) / N
    factors  = L * E * r * (2 * H + 3 * I) * 4 / N   in fp32: gate_up r (H + 2I), down r (I + H)
    gradients                                        as much as factors; the states of Adam, twice as much
    gathered = 2 * (codes + scales + others + factors + gradients) of one unsharded layer: the current layer, and the
               next, which is prefetched
    kept     = D * T * H * 2                         checkpointing: the input of each decoder layer
    computed = T * K * (2 * I * 2 + I * 2 + 2 * H * 2) + T * H * 2 * 8
               recomputation of one layer in the backward: products of routed rows, and tensors of attention
    logits   = T * V * 10                            in 16 bits, in fp32, and their gradient; none with fused losses

The activations of a layer besides the experts are an estimate; the rest is computed from shapes. Memory of the CUDA
context, NCCL and fragmentation is not included.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from math import prod

from tabulate import tabulate

from peft_moe_qlora.quantization import FourBitFormat

GIB = 2**30


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model from its config.

    Args:
        layers: number of decoder layers.
        moe_layers: number of layers with experts.
        num_experts: routed experts per layer.
        hidden: H.
        intermediate: intermediate size of one expert.
        top_k: K.
        vocabulary: V.
        other_weights: weights besides the routed experts: embeddings, attention, shared experts, dense layers, head.
    """

    layers: int
    moe_layers: int
    num_experts: int
    hidden: int
    intermediate: int
    top_k: int
    vocabulary: int
    other_weights: int


MODELS = {
    "deepseek-v3": ModelSizes(61, 58, 256, 7168, 2048, 8, 129280, 17_117_633_536),
    "qwen3-235b-a22b": ModelSizes(94, 94, 128, 4096, 1536, 8, 151936, 7_997_238_784),
    "qwen3-30b-a3b": ModelSizes(48, 48, 128, 2048, 768, 8, 151936, 1_541_093_376),
}
"""Name -> sizes. Other weights are those of the model in transformers, without layers for speculative decoding."""


@dataclass(frozen=True)
class Shard:
    """Bytes on one rank."""

    codes: float
    scales: float
    others: float
    factors: float
    gradients: float
    optimizer: float
    gathered: float
    kept: float
    computed: float
    logits: float

    @property
    def resident(self) -> float:
        """Bytes between steps."""
        return self.codes + self.scales + self.others + self.factors + self.optimizer

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


def shard(
    sizes: ModelSizes,
    ranks: int,
    tokens: int,
    expert_r: int = 8,
    double_quant: bool = True,
    factor_bytes: int = 4,
    state_bytes: int = 8,
    other_bytes: int = 2,
) -> Shard:
    """Memory of one rank, by the formulas in the docstring of the module.

    Args:
        sizes: sizes of the model.
        ranks: number of ranks, N.
        tokens: tokens of one rank, T.
        expert_r: rank on experts, r.
        double_quant: whether the scales of experts are in 8 bits.
        factor_bytes: bytes of one value of the factors, and of its gradient.
        state_bytes: bytes of optimizer state per value of the factors; 8 for Adam in fp32.
        other_bytes: bytes of one weight besides the experts.
    """
    codes, scales = _stored(sizes, double_quant)
    factors = sizes.num_experts * expert_r * (2 * sizes.hidden + 3 * sizes.intermediate) * factor_bytes
    others = other_bytes * sizes.other_weights
    of_layer = codes + scales + 2 * factors + others / sizes.layers
    L = sizes.moe_layers
    rows = tokens * sizes.top_k
    return Shard(
        codes=L * codes / ranks,
        scales=L * scales / ranks,
        others=others / ranks,
        factors=L * factors / ranks,
        gradients=L * factors / ranks,
        optimizer=L * factors / factor_bytes * state_bytes / ranks,
        gathered=2 * of_layer,
        kept=sizes.layers * tokens * sizes.hidden * 2,
        computed=rows * 2 * (3 * sizes.intermediate + 2 * sizes.hidden) + tokens * sizes.hidden * 2 * 8,
        logits=tokens * sizes.vocabulary * 10,
    )


def _stored(sizes: ModelSizes, double_quant: bool) -> tuple[int, int]:
    """Bytes of the codes and scales of the experts of one layer."""
    storage = FourBitFormat("nf4", 64, double_quant)
    matrices = ((2 * sizes.intermediate, sizes.hidden), (sizes.hidden, sizes.intermediate))
    nbytes = {
        (number, name): sizes.num_experts * prod(spec.shape) * spec.dtype.itemsize
        for number, matrix in enumerate(matrices)
        for name, spec in storage.tensors(*matrix).items()
    }
    codes = sum(found for (_, name), found in nbytes.items() if name == "codes")
    return codes, sum(nbytes.values()) - codes


def table(found: dict[str, Shard]) -> str:
    columns = [*next(iter(found.values())).__dataclass_fields__, "total"]
    rows = [[name, *(f"{getattr(one, column) / GIB:.2f}" for column in columns)] for name, one in found.items()]
    return tabulate(rows, ["GiB on each rank", *columns], tablefmt="github", disable_numparse=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["deepseek-v3"])
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="tokens of one rank")
    parser.add_argument("--expert-r", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--json", help="output file for the bytes")
    return parser.parse_args()


def main() -> None:
    args = parse()
    found = {
        f"{name}, r {expert_r}, {tokens:,} tokens": shard(MODELS[name], args.ranks, tokens, expert_r)
        for name in args.models
        for expert_r in args.expert_r
        for tokens in args.tokens
    }
    print(table(found))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump({name: asdict(one) for name, one in found.items()}, file, indent=1)


if __name__ == "__main__":
    main()
