"""Measures time and memory of loading a checkpoint with random weights directly into 4 bits.

    python benchmarks/loading.py --shape qwen3-30b-a3b --layers 4 --directory /data/checkpoint
    python benchmarks/loading.py --shape gemma-4-26b-a4b --directory /data/checkpoint --double-quant --json load.json

The checkpoint is created first, in the layout of the hub, unless the directory contains one. Reading and loading are
measured sequentially; before each, the files are dropped from the page cache. Every load is in a separate process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from models import MODELS, model_config
from safetensors.torch import save_file
from tabulate import tabulate
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion

from peft_moe_qlora import MoeQuantizationConfig, load_quantized
from peft_moe_qlora.loading import Checkpoint

GB = 10**9
SHARD_BYTES = 4 * GB
CHUNK_BYTES = 16 * 2**20


def write_checkpoint(config: PreTrainedConfig, directory: Path) -> None:
    """Saves random bf16 weights with the names of checkpoints on the hub."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = revert_weight_conversion(model, dict(model.state_dict()))
    for name in model.all_tied_weights_keys:
        tensors.pop(name, None)
    config.architectures = [type(model).__name__]
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = [[]]
    size = 0
    for key in sorted(tensors):
        if size > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensors[key].nbytes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for number, keys in enumerate(tqdm(shards, desc="writing", unit="shard"), start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        values = {}
        for key in keys:
            shape = tensors[key].shape
            value = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16).mul_(0.02)
            values[key] = value.cpu()
            weight_map[key] = name
        save_file(values, directory / name, {"format": "pt"})
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(directory)


def drop_from_cache(directory: Path) -> None:
    for file in directory.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def time_reading(directory: Path) -> float:
    """Seconds to read all shards once, sequentially."""
    buffer = bytearray(CHUNK_BYTES)
    started = time.perf_counter()
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass
    return time.perf_counter() - started


class AnonymousMemory:
    """Samples the anonymous memory of the process, which does not include memory-mapped files."""

    def __init__(self) -> None:
        self.start = self.peak = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise RuntimeError("/proc/self/status does not contain RssAnon. This benchmark requires Linux.")

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, self.now())

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def measure_loading(directory: Path, device: str, config: MoeQuantizationConfig) -> dict[str, float]:
    """Loads in this process; returns bytes and seconds."""
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.zeros(1, device=device)
        torch.cuda.reset_peak_memory_stats(device)
    with AnonymousMemory() as memory:
        started = time.perf_counter()
        model = load_quantized(str(directory), config, device_map={"": device})
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - started
        resident_cpu = memory.now() - memory.start
    found = {
        "seconds": seconds,
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "cpu_peak": memory.peak - memory.start,
        "cpu_resident": resident_cpu,
    }
    if on_gpu:
        found["gpu_peak"] = torch.cuda.max_memory_allocated(device)
        found["gpu_resident"] = torch.cuda.memory_allocated(device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=MODELS, default="small")
    parser.add_argument("--layers", type=int, help="number of layers; default: the model's")
    parser.add_argument("--directory", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument("--device", nargs="+", default=["cuda" if torch.cuda.is_available() else "cpu"])
    parser.add_argument("--double-quant", action="store_true")
    parser.add_argument("--experts-only", action="store_true", help="keep linear layers in 16 bits")
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--remove", action="store_true", help="remove the checkpoint at the end")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    config = MoeQuantizationConfig(double_quant=args.double_quant, quantize_linear=not args.experts_only)
    if args.measure:
        print(json.dumps(measure_loading(args.directory, args.device[0], config)))
        return
    if not list(args.directory.glob("*.safetensors")):
        write_checkpoint(model_config(args.shape, args.layers), args.directory)
    checkpoint = Checkpoint.open(args.directory)
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    drop_from_cache(args.directory)
    read = time_reading(args.directory)
    rows = []
    for device in args.device:
        drop_from_cache(args.directory)
        command = [sys.executable, __file__, *sys.argv[1:], "--measure", "--device", device]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows.append({"device": device, **json.loads(output.splitlines()[-1])})
    names = ("weights", "gpu_resident", "gpu_peak", "cpu_resident", "cpu_peak")
    header = ("device", "seconds", "/ reading", *[f"{name.replace('_', ' ')} GB" for name in names])
    table = [
        (
            row["device"],
            f"{row['seconds']:.1f}",
            f"{row['seconds'] / read:.2f}",
            *(f"{row[name] / GB:.3f}" if name in row else "" for name in names),
        )
        for row in rows
    ]
    print(f"{args.shape}: {total / GB:.2f} GB in {len(checkpoint.files)} files, read in {read:.1f} s")
    print(tabulate(table, header, disable_numparse=True))
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items() if name not in ("directory", "json")}
        found = {"settings": settings, "checkpoint_bytes": total, "reading_seconds": read, "rows": rows}
        args.json.write_text(json.dumps(found, indent=1))
    if args.remove:
        shutil.rmtree(args.directory)


if __name__ == "__main__":
    main()
