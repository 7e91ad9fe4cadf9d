"""A Trainer's training of a tiny model, as a script for `accelerate launch` and as a function for one process.

accelerate launch --config_file examples/configs/ddp.yaml tests/trained_by_trainer.py CHECKPOINT DIRECTORY
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from distributed_training import (
    BATCH,
    CASES,
    EPSILON,
    MAX_NORM,
    Case,
    Run,
    assert_same_training,
    build,
    factors,
    launch,
    packed,
    saved_keys,
    saved_results,
)
from safetensors.torch import load_file
from tiny_models import assert_same_bytes, token_ids
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, logging

from peft_moe_qlora import read_part_of_experts
from peft_moe_qlora.training import skip_broadcast

STEPS, SAVED_AT = 4, 2


def trainer_of(
    checkpoint: Path,
    directory: Path,
    case: Case,
    world: int,
    part: AbstractContextManager | None = None,
    accumulation: int = 1,
) -> Trainer:
    """A Trainer before its first step; every process has its share of each batch.

    Args:
        checkpoint: of the base.
        directory: output directory.
        case: how the model is stored.
        world: number of processes.
        part: context manager for loading the model.
        accumulation: gradient accumulation steps.
    """
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        adam_epsilon=EPSILON,
        max_grad_norm=MAX_NORM,
        lr_scheduler_type="constant",
        save_steps=SAVED_AT,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=7,
    )
    with part or nullcontext():
        model = build(checkpoint, case)
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids(batch=BATCH * STEPS)]
    return Trainer(model=model, args=args, train_dataset=rows)


def train(trainer: Trainer, resume: Path | None = None) -> Run:
    before = packed(trainer.model)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, norms = [entry["loss"] for entry in logged], [float(entry["grad_norm"]) for entry in logged]
    model = trainer.accelerator.unwrap_model(trainer.model)
    after = packed(model)
    is_same = all(torch.equal(after[name], one) for name, one in before.items())
    return Run(losses, norms, factors(model), bool(before) and is_same)


def run_all(checkpoint: Path, directory: Path, world: int, is_ddp: bool = False) -> dict[str, object]:
    """Trains, saves, and resumes from the intermediate checkpoint."""
    found: dict[str, object] = {}
    trainer = trainer_of(checkpoint, directory / "straight", Case(), world)
    if is_ddp:
        found["skipped"] = skip_broadcast(trainer.model)
    found["straight"] = train(trainer)
    found["packed"] = packed(trainer.accelerator.unwrap_model(trainer.model))
    found["wrapped"] = type(trainer.model_wrapped).__name__
    found["share"] = sum(whole_or_local(one).nbytes for one in trainer.model.parameters())
    found["evaluated"] = float(trainer.evaluate(trainer.train_dataset)["eval_loss"])
    trainer.save_model(str(directory / "saved"))
    trainer.accelerator.wait_for_everyone()
    found["saved"] = load_file(directory / "saved" / "adapter_model.safetensors")
    again = trainer_of(checkpoint, directory / "again", Case(), world)
    try:
        found["resumed"] = train(again, directory / "straight" / f"checkpoint-{SAVED_AT}")
    except RuntimeError as error:
        # older versions of transformers load the optimizer's state to cpu:0, which torch does not support
        if "tagged with cpu:0" not in str(error):
            raise
    found["accumulated"] = train(trainer_of(checkpoint, directory / "accumulated", Case(), world, accumulation=2))
    in_4_bits = trainer_of(checkpoint, directory / "4-bit linear", CASES["4-bit linear"], world)
    found["4-bit linear"] = train(in_4_bits)
    names = (name for name, one in in_4_bits.model.named_parameters() if not isinstance(one, DTensor))
    found["left whole"] = sorted({part for name in names for part in name.split(".") if part.endswith("_proj")})
    return found


def train_alone_and_distributed(config: str, checkpoint: Path, directory: Path) -> list[dict[str, object]]:
    """The results of one process, and of each of several that `accelerate launch` starts with a config."""
    for name in ("one", "several"):
        (directory / name).mkdir()
    launch(config, Path(__file__).name, checkpoint, directory / "several")
    return [run_all(checkpoint, directory / "one", 1), *saved_results(directory / "several")]


def assert_as_one_process(found: dict[str, object], expected: dict[str, object]) -> None:
    for name, of_one in {"straight": "straight", "accumulated": "straight", "4-bit linear": "4-bit linear"}.items():
        assert_same_training(found[name], expected[of_one])
    assert abs(found["evaluated"] - expected["evaluated"]) < 1e-5
    assert_same_bytes(found["saved"], saved_keys(found["straight"].factors))


def assert_resumed(found: dict[str, object]) -> None:
    """The losses before the checkpoint are those logged in it."""
    assert len(found["straight"].losses) == STEPS
    assert found["resumed"].losses == found["straight"].losses
    assert_same_bytes(found["resumed"].factors, found["straight"].factors)


def whole_or_local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def treat_cpus_as_gpus() -> None:
    """Makes accelerate shard over CPU processes, which it does for accelerators only."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: object, **kwargs: object) -> None:
        if PartialState._shared_state and not AcceleratorState._shared_state:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        original(self, *args, **kwargs)

    AcceleratorState.__init__ = init


def main() -> None:
    checkpoint, directory = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    is_fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if is_fsdp:
        treat_cpus_as_gpus()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = run_all(checkpoint, directory, world, not is_fsdp)
    if is_fsdp:
        part = read_part_of_experts(rank, world)
        of_part = trainer_of(checkpoint, directory / "part", Case(), world, part)
        found["part"] = train(of_part)
        # not earlier: until now, the other ranks' experts were missing
        found["part"].is_packed_the_same = True
        found["packed of parts"] = packed(of_part.model)
    torch.save(found, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
