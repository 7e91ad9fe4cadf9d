"""Times the whole training step of a MoE model with random weights: forward, loss, backward and optimizer.

    python benchmarks/step.py --storages nf4/64 fp8/128x128 --tokens 4096

Experts are in the storage named, the linear layers of attention too, or in NF4 where experts are in 4 bits of
bitsandbytes. LoRA is on experts and attention, with gradient checkpointing by layer and 8-bit AdamW. Resident memory
is that of weights and factors before the first step; the peak is that of all steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import bitsandbytes
import torch
from peft import get_peft_model
from tabulate import tabulate
from torch import nn
from tqdm.auto import tqdm
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training, quantize_experts
from peft_moe_qlora.quantization import Format, FourBitFormat, parse_format
from peft_moe_qlora.quantized_linear import QuantizedLinear

SHAPES = {
    "qwen3-30b-a3b": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "vocab_size": 128,
    },
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Step:
    """What was measured.

    Args:
        storage: of the experts.
        tokens: of a step.
        milliseconds: median of a step, on the wall.
        tokens_per_second: by that.
        resident_gib: on the GPU before the first step; 0 without one.
        peak_gib: of all steps.
        trained_parameters: in the factors.
    """

    storage: str
    tokens: int
    milliseconds: float
    tokens_per_second: float
    resident_gib: float
    peak_gib: float
    trained_parameters: int


def build(shape: str, storage: Format | None, rank: int, device: str) -> nn.Module:
    """The model with its adapter, in training mode."""
    config = Qwen3MoeConfig(decoder_sparse_step=1, norm_topk_prob=True, use_cache=False, **SHAPES[shape])
    torch.manual_seed(0)
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            model = Qwen3MoeForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    if storage is not None:
        quantize_experts(model, storage=str(storage), progressbar=False)
        _store_attention(model, storage)
    prepare_model_for_training(model)
    options = {"storage": str(storage)} if storage is not None else {"quant_type": None}
    targets = ["experts", *ATTENTION]
    return get_peft_model(
        model, MoeQLoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **options)
    ).train()


def _store_attention(model: nn.Module, storage: Format) -> None:
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if name in ATTENTION and type(layer) is nn.Linear:
                is_4_bit = isinstance(storage, FourBitFormat)
                setattr(parent, name, _in_4_bits(layer) if is_4_bit else QuantizedLinear.from_linear(layer, storage))


def _in_4_bits(layer: nn.Linear) -> bitsandbytes.nn.Linear4bit:
    stored = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4", device="meta"
    )
    weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=stored)
    stored.weight = weight.to(layer.weight.device)
    return stored


def measure(args: argparse.Namespace, name: str) -> Step:
    """Times the steps of one storage; "16 bits" leaves all weights in bf16."""
    storage = None if name == "16 bits" else parse_format(name)
    model = build(args.shape, storage, args.rank, args.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = args.device.startswith("cuda")
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    resident = torch.cuda.memory_allocated() if on_gpu else 0
    optimizer = (bitsandbytes.optim.AdamW8bit if on_gpu else torch.optim.AdamW)(trained, lr=1e-5)
    vocabulary = SHAPES[args.shape]["vocab_size"]

    def step() -> None:
        ids = torch.randint(0, vocabulary, (1, args.tokens), device=args.device)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(args.warmup):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    return Step(
        storage=name,
        tokens=args.tokens,
        milliseconds=round(1e3 * median, 1),
        tokens_per_second=round(args.tokens / median, 1),
        resident_gib=round(resident / 2**30, 2),
        peak_gib=round(torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0, 2),
        trained_parameters=sum(parameter.numel() for parameter in trained),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storages", nargs="+", default=["nf4/64", "fp8/128x128", "mxfp4"], help="of the experts")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=4096, help="in the one sequence of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of which the median is taken")
    parser.add_argument("--warmup", type=int, default=3, help="untimed steps before")
    parser.add_argument("--rounds", type=int, default=1, help="times that the storages take turns; the best counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the results")
    args = parser.parse_args()
    best: dict[str, Step] = {}
    for _ in range(args.rounds):
        for name in tqdm(args.storages, unit="storage", file=sys.stderr):
            found = measure(args, name)
            if name not in best or found.milliseconds < best[name].milliseconds:
                best[name] = found
            gc.collect()
    results = {
        "device": torch.cuda.get_device_name() if args.device.startswith("cuda") else "cpu",
        "torch": torch.__version__,
        "shape": args.shape,
        "rank": args.rank,
        "steps": [asdict(one) for one in best.values()],
    }
    if args.json is not None:
        args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"{results['device']}, {args.shape}, rank {args.rank}")
    headers = ("experts in", "tokens", "ms", "tokens/s", "resident GiB", "peak GiB", "trained")
    print(tabulate([tuple(asdict(one).values()) for one in best.values()], headers, intfmt=","))


if __name__ == "__main__":
    main()
