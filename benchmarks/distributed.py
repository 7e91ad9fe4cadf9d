"""Times the training step on several GPUs with DDP and FSDP2, and on one of them in the same run.

    torchrun --nproc-per-node 2 benchmarks/distributed.py --json benchmarks/results/h200-x2.json
    torchrun --nproc-per-node 2 benchmarks/distributed.py --modes fsdp2 --shape qwen3-235b-a22b --steps 3
    torchrun --nproc-per-node 2 benchmarks/distributed.py --modes load-part load-whole --shape small --checkpoint DIR
    torchrun --nproc-per-node 2 benchmarks/distributed.py --device cpu --shape tiny --tokens 16  # to try it out

Weights are random, and each process has different tokens. With FSDP2, the whole model is never in memory: each layer
is quantized and sharded before the next one is created. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from layer import device_name, versions
from models import MODELS, model_config
from peft import PeftModel
from step_models import build, factors
from step_optimizers import OPTIMIZERS, make_optimizer
from step_settings import Plan, parse_arm
from step_times import GIB, Training, time_steps
from tabulate import tabulate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from peft_moe_qlora import MoeQuantizationConfig, read_part_of_experts
from peft_moe_qlora.training import shard_layers, skip_broadcast

MODES = {
    "one": "the first process alone; the others wait",
    "ddp": "DistributedDataParallel",
    "fsdp2": "fully_shard on each decoder layer and the rest",
    "load-part": "load a checkpoint, in each process only its part of the experts",
    "load-whole": "load the whole checkpoint in each process",
}


@dataclass
class Row:
    """Results of one mode; maximum of time and memory over all processes.

    Args:
        mode: name in `MODES`.
        processes: number of active processes.
        milliseconds: median time of a step, or of loading.
        tokens_per_second: tokens per second of all processes.
        resident_gib: weights and factors before the first step; on a CPU, bytes of the parameters.
        peak_gib: peak of allocated memory in the timed steps; in loading modes, increase of the peak resident host
            memory of a process.
        build_seconds: time to build and wrap the model.
        loss: loss of the last step in the first process.
    """

    mode: str
    processes: int
    milliseconds: float
    tokens_per_second: float | None = None
    resident_gib: float | None = None
    peak_gib: float | None = None
    build_seconds: float | None = None
    loss: float | None = None


class Benchmark:
    """Measures one mode after the other in a process of a group.

    Args:
        args: options of the command.
        device: device of this process.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args = args
        self.device = device
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def run(self, mode: str) -> Row:
        """Measures one mode; returns the same in all processes."""
        processes = 1 if mode == "one" else self.world
        row = None
        if self.rank < processes:
            row = self._load(mode) if mode.startswith("load") else self._train(mode)
        forget()
        dist.barrier()
        rows: list[Row | None] = [None] * self.world
        dist.all_gather_object(rows, row)
        return slowest([one for one in rows if one is not None], processes)

    def _train(self, mode: str) -> Row:
        args, start = self.args, time.perf_counter()
        arm = parse_arm(args.arm, args.storage)
        plan = Plan(
            args.shape, arm, args.rank, args.rank, args.layers, args.dtype, str(self.device), args.attention, args.seed
        )
        model = build(plan, share_experts=mode == "fsdp2")
        if mode == "fsdp2":
            shard_layers(model, mesh=init_device_mesh(self.device.type, (self.world,)))
        wrapped = self._wrapped(model) if mode == "ddp" else model
        forget()
        row = Row(mode, 1, 0.0, resident_gib=self._resident(model), build_seconds=time.perf_counter() - start)
        optimizer = make_optimizer(args.optimizer, [one for _, one in factors(model)], args.lr)
        training = Training(model, optimizer, 1, args.tokens, seed=args.seed + self.rank)
        training.model = wrapped
        times = time_steps(training, args.steps, args.warmup)
        row.milliseconds, row.peak_gib, row.loss = times.milliseconds, times.peak_gib, times.loss
        return row

    def _wrapped(self, model: PeftModel) -> DistributedDataParallel:
        skip_broadcast(model)
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)

    def _resident(self, model: PeftModel) -> float:
        if self.device.type == "cuda":
            return torch.cuda.memory_allocated(self.device) / GIB
        own = (one.to_local() if isinstance(one, DTensor) else one for one in model.parameters())
        return sum(one.nbytes for one in own) / GIB

    def _load(self, mode: str) -> Row:
        directory = Path(self.args.checkpoint)
        if self.rank == 0 and not (directory / "config.json").exists():
            write_checkpoint(self.args.shape, directory)
        dist.barrier()
        part = read_part_of_experts(self.rank, self.world, self.device) if mode == "load-part" else nullcontext()
        before, start = reset_peak(), time.perf_counter()
        with part:
            model = AutoModelForCausalLM.from_pretrained(
                directory, dtype=torch.bfloat16, quantization_config=MoeQuantizationConfig(), device_map="cpu"
            )
        milliseconds = 1e3 * (time.perf_counter() - start)
        del model
        return Row(mode, 1, milliseconds, peak_gib=(status("VmHWM") - before) / GIB)


def slowest(rows: list[Row], processes: int) -> Row:
    """Combines the results of all processes."""
    row = rows[0]
    row.processes = processes
    for name in ("milliseconds", "resident_gib", "peak_gib", "build_seconds"):
        found = [getattr(one, name) for one in rows]
        setattr(row, name, None if None in found else max(found))
    return row


def forget() -> None:
    """Collects reference cycles and empties the memory cache of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def status(name: str) -> int:
    """Bytes of a field in /proc/self/status, such as `VmHWM`, the peak of resident memory."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reset_peak() -> int:
    """Resets the peak of resident memory; returns the current value."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return status("VmRSS")


def write_checkpoint(shape: str, directory: Path) -> None:
    """Saves a checkpoint with random bf16 weights."""
    model = AutoModelForCausalLM.from_config(model_config(shape), dtype=torch.bfloat16)
    model.save_pretrained(directory)


def report(rows: list[Row], tokens: int, world: int) -> str:
    """A table, relative to the first row with one process."""
    one = next((row for row in rows if row.mode == "one"), None)

    def ratio(row: Row, name: str) -> float | None:
        found, of_one = getattr(row, name), getattr(one, name, None)
        return found / of_one if found and of_one else None

    headers = ["mode", "processes", "ms", "tokens/s", "/ one", "resident GiB", "/ one", "peak GiB", "build s", "loss"]
    table = [
        [
            *(row.mode, row.processes, row.milliseconds),
            *(row.tokens_per_second, ratio(row, "tokens_per_second")),
            *(row.resident_gib, ratio(row, "resident_gib")),
            *(row.peak_gib, row.build_seconds, row.loss),
        ]
        for row in rows
    ]
    return f"{tokens} tokens in each of {world} processes\n" + tabulate(table, headers, floatfmt=".2f")


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    modes = "modes:\n" + "\n".join(f"  {name}: {text}" for name, text in MODES.items())
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=modes, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )

    def add(name: str, text: str, **options) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)" if "default" in options else text, **options)

    on_gpu = torch.cuda.is_available()
    add("--modes", "modes to measure, see below", nargs="+", choices=MODES, default=["one", "ddp", "fsdp2"])
    add("--arm", "configuration of the step, as in step.py; FSDP2 runs without graphs", default="ours")
    add("--storage", "storage of the experts", default="nf4/64+dq")
    add("--shape", "model shape", choices=MODELS, default="qwen3-30b-a3b")
    add("--layers", "number of layers; default: the model's", type=int)
    add("--tokens", "tokens in each process", type=int, default=4096)
    add("--rank", "LoRA rank on attention and experts", type=int, default=16)
    add("--optimizer", "optimizer of the step", choices=OPTIMIZERS, default="adamw-fused" if on_gpu else "adamw")
    add("--lr", "learning rate", type=float, default=1e-5)
    add("--attention", "attention implementation; default: transformers' choice")
    add("--steps", "timed steps; the median is reported", type=int, default=8)
    add("--warmup", "untimed steps before those", type=int, default=3)
    add("--dtype", "dtype of unquantized weights", choices=("bfloat16", "float32"), default="bfloat16")
    add("--device", "where", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    add("--seed", "seed of weights, factors and tokens", type=int, default=0)
    add("--checkpoint", "directory of the checkpoint; the benchmark writes one if it does not exist")
    add("--json", "output file for all results", type=Path)
    args = parser.parse_args(given)
    if any(mode.startswith("load") for mode in args.modes) and args.checkpoint is None:
        parser.error("Loading modes require --checkpoint.")
    return args


def measure(args: argparse.Namespace, device: torch.device, show: Callable[[str], None] = print) -> list[Row]:
    """Measures all modes in one process of the group; the first process prints and saves the results."""
    benchmark, rows = Benchmark(args, device), []
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "checkpoint")}
    for mode in args.modes:
        row = benchmark.run(mode)
        if row.resident_gib is not None:
            row.tokens_per_second = 1e3 * row.processes * args.tokens / row.milliseconds
        rows.append(row)
        if args.json and benchmark.rank == 0:
            found = {"device": device_name(device), "versions": versions(), "settings": settings}
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({**found, "rows": [asdict(one) for one in rows]}, indent=1) + "\n")
    if benchmark.rank == 0:
        show(report(rows, args.tokens, benchmark.world))
    return rows


def main() -> None:
    args = parse_arguments()
    faulthandler.enable()  # torch's and gloo's own threads may abort a process, which otherwise says nothing
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        backend, group = "nccl", {"device_id": device}
    else:
        device, backend, group = torch.device("cpu"), "gloo", {}
    # the other processes wait while the first one measures alone
    dist.init_process_group(backend, timeout=timedelta(minutes=60), **group)
    try:
        measure(args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
