"""Measures time and memory of merging an adapter into a checkpoint with random weights, on disk and into 4 bits.

    python benchmarks/merging.py --shape qwen3-30b-a3b --layers 4 --directory /data
    python benchmarks/merging.py --shape small --directory merging --device cpu

Base and adapter are created first, unless the directory contains them. Every merge is in a separate process. Random
weights say nothing about the fidelity of a merge; use `peft-moe-qlora merge --verify` for that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from loading import GB, AnonymousMemory, write_checkpoint
from models import MODELS, model_config
from peft import get_peft_model
from tabulate import tabulate

from peft_moe_qlora import MoeQLoraConfig, load_quantized
from peft_moe_qlora.merge import merge_checkpoint, merge_quantized

KINDS = ("bf16", "nf4 nearest", "nf4 second-order")


def write_adapter(directory: Path, device: str) -> None:
    """Saves an adapter on experts and attention with nonzero factors."""
    model = load_quantized(str(directory / "base"), device_map={"": device})
    model = get_peft_model(model, MoeQLoraConfig(r=16, expert_r=4, lora_alpha=32, target_modules="all-linear"))
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory / "adapter")


def measure(kind: str, directory: Path, device: str) -> dict[str, float]:
    """Merges in this process; returns seconds and bytes."""
    base, adapter, out = (directory / name for name in ("base", "adapter", "merged"))
    on_gpu = device.startswith("cuda") and kind != "bf16"
    if on_gpu:
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats(device)
    with AnonymousMemory() as memory:
        started = time.perf_counter()
        if kind == "bf16":
            merge_checkpoint(base, adapter, out, progressbar=False)
        else:
            merge_quantized(base, adapter, out, rounding=kind.split()[1], device=device, progressbar=False)
        seconds = time.perf_counter() - started
    found = {"seconds": seconds, "cpu_peak": memory.peak - memory.start}
    if on_gpu:
        found["gpu_peak"] = torch.cuda.max_memory_allocated(device)
    found["written"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="small")
    parser.add_argument("--layers", type=int, help="number of layers; default: the model's")
    parser.add_argument("--directory", type=Path, required=True, help="directory of base, adapter and results")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="merges to measure")
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.directory, args.device)))
        return
    if not (args.directory / "base").is_dir():
        write_checkpoint(model_config(args.shape, args.layers), args.directory / "base")
    if not (args.directory / "adapter").is_dir():
        write_adapter(args.directory, args.device)
    size = sum(file.stat().st_size for file in (args.directory / "base").glob("*.safetensors"))
    rows = []
    for kind in args.kinds:
        shutil.rmtree(args.directory / "merged", ignore_errors=True)
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", kind]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"kind": kind, **json.loads(output.splitlines()[-1])})
    header = ("merged into", "seconds", "written GB", "GPU peak GB", "CPU peak GB")
    table = [
        (
            row["kind"],
            f"{row['seconds']:.1f}",
            f"{row['written'] / GB:.2f}",
            f"{row['gpu_peak'] / GB:.2f}" if "gpu_peak" in row else "",
            f"{row['cpu_peak'] / GB:.2f}",
        )
        for row in rows
    ]
    print(f"{args.shape}: a base of {size / GB:.2f} GB")
    print(tabulate(table, header, disable_numparse=True))
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name not in ("directory", "json")}
        args.json.write_text(json.dumps({"settings": settings, "base_bytes": size, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
