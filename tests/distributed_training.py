"""A short training of a tiny model, in one process or in several that share its batches, and functions to start it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bitsandbytes.nn import Linear4bit
from calling_backend import CallingBackend
from peft import PeftModel, get_peft_model
from quantized_linears import FP8, store_attention
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers import AutoModelForCausalLM, logging

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training
from peft_moe_qlora.quantization import Format
from peft_moe_qlora.training import UnsyncedAdamW8bit, layer_runner

WORLD = 2
BATCH = 4
STEPS = 3
MAX_NORM = 0.4
"""Smaller than the norms of all gradients, so each is clipped."""
EPSILON = 1e-4
"""AdamW's epsilon. With the default of 1e-8, rounding alone decides the update of a value with a tiny gradient."""

Bytes = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """How a model is stored and trained.

    Args:
        prepare: arguments of `prepare_model_for_training`.
        double_quant: of the experts.
        quantize_linear: attention in 4 bits by bitsandbytes.
        linear_storage: of attention, by this package.
        dtype: of the model.
        optimizer: of the factors.
        by_graphs: capture layers; plain calls replace CUDA graphs.
        expert_r: rank of experts.
    """

    prepare: dict[str, Any] = field(default_factory=lambda: {"use_gradient_checkpointing": False})
    double_quant: bool = False
    quantize_linear: bool = False
    linear_storage: Format | None = None
    dtype: torch.dtype = torch.float32
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    by_graphs: bool = False
    expert_r: int = 4


@dataclass
class Run:
    """The results of a training.

    Args:
        losses: over all processes.
        norms: of the gradients before clipping.
        factors: name -> whole factor.
        is_packed_the_same: whether codes and scales are bit-identical to those before the training.
    """

    losses: list[float]
    norms: list[float]
    factors: Bytes
    is_packed_the_same: bool


CASES = {
    "plain": Case(),
    "double_quant, checkpointing": Case({"use_gradient_checkpointing": True}, double_quant=True),
    "keep-experts": Case({"use_gradient_checkpointing": "keep-experts"}),
    "reentrant": Case({"use_gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    "graphs": Case({"use_gradient_checkpointing": True, "cuda_graphs": True}, by_graphs=True),
    "4-bit linear": Case(quantize_linear=True),
    "fp8 linear": Case(linear_storage=FP8),
    # bitsandbytes keeps states of fewer than 4096 values in 32 bits
    "8-bit AdamW": Case(optimizer=UnsyncedAdamW8bit, expert_r=16),
}


def write_checkpoint(directory: Path, **sizes: int) -> None:
    tiny_model(std=0.08, **sizes).save_pretrained(directory)


def build(directory: Path, case: Case) -> PeftModel:
    """The same model and adapter on every process."""
    storage = MoeQuantizationConfig(quantize_linear=case.quantize_linear, double_quant=case.double_quant)
    base = AutoModelForCausalLM.from_pretrained(
        directory, dtype=case.dtype, quantization_config=storage, device_map="cpu"
    )
    if case.linear_storage is not None:
        store_attention(base, case.linear_storage)
    prepare_model_for_training(base, **case.prepare)
    return adapted(base, case)


def adapted(base: nn.Module, case: Case) -> PeftModel:
    config = MoeQLoraConfig(
        r=4,
        expert_r=case.expert_r,
        target_modules=["experts", "q_proj", "v_proj"],
        double_quant=case.double_quant,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    randomize_adapter(model, std=0.05)
    return model.train()


def batch(step: int, rank: int, world: int) -> torch.Tensor:
    """A process's share of a batch, in the order of the sampler."""
    ids = token_ids(batch=BATCH * STEPS)[step * BATCH :][:BATCH]
    return ids[rank * BATCH // world : (rank + 1) * BATCH // world]


def trained(model: PeftModel) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().clone()


def packed(model: nn.Module) -> Bytes:
    """Codes and scales of experts and linear layers."""
    found = {name: whole(one) for name, one in model.named_parameters() if not one.is_floating_point()}
    of_4_bits = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    return found | {f"{name}.absmax": module.quant_state.absmax.clone() for name, module in of_4_bits.items()}


def factors(model: nn.Module) -> Bytes:
    return {name: whole(one) for name, one in model.named_parameters() if ".lora_" in name}


def saved_keys(found: Bytes) -> Bytes:
    """Factors by their names in an adapter file."""
    return {name.replace(".default.", "."): one for name, one in found.items()}


def train(model: PeftModel, case: Case, called: nn.Module | None = None, rank: int = 0, world: int = 1) -> Run:
    """Runs a few training steps.

    Args:
        model: with its adapter.
        case: how to train.
        called: the module to call, by default the model.
        rank: of this process.
        world: number of processes.
    """
    before = packed(model)
    optimizer = case.optimizer(trained(model), lr=1e-2, eps=EPSILON)
    losses, norms = [], []
    for step in range(STEPS):
        ids = batch(step, rank, world)
        loss = (called or model)(input_ids=ids, labels=ids).loss
        loss.backward()
        norms.append(float(whole(nn.utils.clip_grad_norm_(trained(model), MAX_NORM))))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().clone())
        if world > 1:
            dist.all_reduce(losses[-1])
    after = packed(model)
    is_same = before.keys() == after.keys() and all(torch.equal(after[name], one) for name, one in before.items())
    return Run([float(loss) / world for loss in losses], norms, factors(model), bool(before) and is_same)


def assert_same_training(found: Run, expected: Run, of_factors: float = 1e-5) -> None:
    for name in ("losses", "norms"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-5)
    assert min(expected.norms) > MAX_NORM
    torch.testing.assert_close(found.factors, expected.factors, rtol=0, atol=of_factors)
    assert found.is_packed_the_same
    assert expected.is_packed_the_same


@contextmanager
def graphs_by_calling(case: Case) -> Iterator[None]:
    """Replaces CUDA graph captures by plain calls while a model is prepared."""
    before = layer_runner.GRAPHS_BACKEND
    if case.by_graphs:
        layer_runner.GRAPHS_BACKEND = CallingBackend
    try:
        yield
    finally:
        layer_runner.GRAPHS_BACKEND = before


def train_alone(directory: Path, case: Case) -> Run:
    with graphs_by_calling(case):
        return train(build(directory, case), case)


def start(work: Callable[[int, Path], object], directory: Path) -> list[Any]:
    """Calls a function of a module on each process of a group with its rank and the directory; returns the results."""
    with patch.dict(os.environ, CUDA_VISIBLE_DEVICES=""):
        mp.spawn(_in_group, (work, directory), nprocs=WORLD)
    return saved_results(directory)


def launch(config: str, script: str, *arguments: object, options: Sequence[object] = (), **environment: str) -> None:
    """Runs a script of this folder by `accelerate launch` with one of the example configs.

    Args:
        config: name of the config file.
        script: name of the script.
        arguments: of the script.
        options: of `accelerate launch`.
        environment: additional environment of the processes.
    """
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", _free_port()]
    command += ["--config_file", tests.parent / "examples" / "configs" / config, *options, tests / script, *arguments]
    env = cpu_environment() | environment
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


def cpu_environment() -> dict[str, str]:
    """Environment of processes that import this checkout and train on the CPU."""
    paths = [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def saved_results(directory: Path) -> list[Any]:
    """The results that each process saved."""
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(WORLD)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def _in_group(rank: int, work: Callable[[int, Path], object], directory: Path) -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store = directory / f"{work.__name__}.store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    try:
        torch.save(work(rank, directory), directory / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
