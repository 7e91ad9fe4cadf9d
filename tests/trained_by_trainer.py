"""A Trainer's training of a tiny model, as a script for `accelerate launch` and as a function for one process.

accelerate launch --config_file examples/configs/ddp.yaml tests/trained_by_trainer.py CHECKPOINT DIRECTORY
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from distributed_training import BATCH, CASES, Case, Run, build, factors, packed
from safetensors.torch import load_file
from tiny_models import token_ids
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments, logging

from peft_moe_qlora import read_part_of_experts
from peft_moe_qlora.training import skip_broadcast

STEPS, SAVED_AT = 4, 2


class Losses(Trainer):
    """Keeps the loss of every batch."""

    def compute_loss(self, *args: object, **kwargs: object) -> torch.Tensor:
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training:
            self.losses = [*getattr(self, "losses", []), loss.detach().clone()]
        return loss


def trainer_of(
    checkpoint: Path, directory: Path, case: Case, world: int, part: AbstractContextManager | None = None
) -> Losses:
    """A Trainer before its first step; every process has its share of each batch.

    Args:
        checkpoint: of the base.
        directory: of what it saves.
        case: how the model is stored.
        world: number of processes.
        part: what the model is loaded under.
    """
    args = TrainingArguments(
        output_dir=str(directory),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // world,
        learning_rate=1e-2,
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
    return Losses(model=model, args=args, train_dataset=rows)


def train(trainer: Losses, resume: Path | None = None) -> Run:
    before = packed(trainer.model)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    losses = [float(trainer.accelerator.gather(loss.reshape(1)).mean()) for loss in trainer.losses]
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    model = trainer.accelerator.unwrap_model(trainer.model)
    after = packed(model)
    is_same = all(torch.equal(after[name], one) for name, one in before.items())
    return Run(losses, norms, factors(model), bool(before) and is_same)


def run_all(checkpoint: Path, directory: Path, world: int, is_ddp: bool = False) -> dict[str, object]:
    """Trains, saves, and trains once more from the checkpoint in the middle."""
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
        # older versions of transformers read the optimizer's state to cpu:0, which torch doesn't know
        if "tagged with cpu:0" not in str(error):
            raise
    in_4_bits = trainer_of(checkpoint, directory / "4-bit linear", CASES["4-bit linear"], world)
    found["4-bit linear"] = train(in_4_bits)
    names = (name for name, one in in_4_bits.model.named_parameters() if not isinstance(one, DTensor))
    found["left whole"] = sorted({part for name in names for part in name.split(".") if part.endswith("_proj")})
    return found


def whole_or_local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def pass_off_as_gpus() -> None:
    """Lets accelerate shard over processes on a CPU, which it does for accelerators only."""
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
        pass_off_as_gpus()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    found = run_all(checkpoint, directory, world, not is_fsdp)
    if is_fsdp:
        part = read_part_of_experts(rank, world)
        of_part = trainer_of(checkpoint, directory / "part", Case(), world, part)
        found["part"] = train(of_part)
        # before, the others' experts were not there
        found["part"].is_packed_the_same = True
        found["packed of parts"] = packed(of_part.model)
    torch.save(found, directory / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
