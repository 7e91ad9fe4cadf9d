"""Sequence-parallel trainings in two processes, started by `accelerate launch`.

    accelerate launch --config_file CONFIG tests/sequence_parallel_training.py DIRECTORY

The directory contains a checkpoint in `base`. Results are written next to it, for the test to read.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calling_backend import CallingBackend
from peft import PeftModel, get_peft_model
from tiny_models import VOCABULARY, randomize_adapter
from torch import distributed
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, logging
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training
from peft_moe_qlora.training import layer_runner

STEPS, ACCUMULATED, LENGTH, PROMPT = 3, 2, 32, 5


@dataclass(frozen=True)
class Case:
    """How a model is stored and computed.

    Args:
        linear: also quantize linear layers to 4 bits.
        checkpointing: of `prepare_model_for_training`.
        router_loss: with the router's auxiliary loss.
        graphs: request CUDA graphs of the layers.
    """

    linear: bool = False
    checkpointing: bool | str = False
    router_loss: bool = False
    graphs: bool = False


CASES = {
    "plain": Case(),
    "checkpointing": Case(checkpointing=True, linear=True),
    "keep-experts": Case(checkpointing="keep-experts"),
    "router loss": Case(router_loss=True),
    "graphs": Case(graphs=True),
}


def build(directory: Path, case: Case) -> PeftModel:
    storage = MoeQuantizationConfig(quantize_linear=case.linear)
    base = AutoModelForCausalLM.from_pretrained(
        directory / "base",
        dtype=torch.float32,
        quantization_config=storage,
        attn_implementation="sdpa",
        device_map=None if is_deepspeed_zero3_enabled() else "cpu",
    )
    prepare_model_for_training(base, use_gradient_checkpointing=case.checkpointing, cuda_graphs=case.graphs)
    model = get_peft_model(base, MoeQLoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    randomize_adapter(model, std=0.05)
    return model.train()


def rows() -> list[dict[str, torch.Tensor]]:
    """The first tokens of each row are a prompt, so the processes have different numbers of labels."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (STEPS * ACCUMULATED, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    positions = torch.arange(LENGTH)
    return [
        {"input_ids": one, "labels": of_one, "position_ids": positions}
        for one, of_one in zip(ids, labels, strict=True)
    ]


def arguments(output: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output,
        per_device_train_batch_size=1,  # with more rows, DeepSpeed's parts are views on a CPU, which the loss rejects
        gradient_accumulation_steps=ACCUMULATED,
        max_steps=STEPS,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        max_grad_norm=0.7,  # smaller than some of the norms
        adam_epsilon=1e-5,  # larger than rounding errors
        per_device_eval_batch_size=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def losses(trained: Trainer) -> list[float]:
    return [line["loss"] for line in trained.state.log_history if "loss" in line]


def norms(trained: Trainer) -> list[float]:
    return [line["grad_norm"] for line in trained.state.log_history if "grad_norm" in line]


def factors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().float().clone() for name, one in model.named_parameters() if ".lora_" in name}


def packed(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in model.named_parameters() if not one.is_floating_point()}


def whole_batch() -> dict[str, torch.Tensor]:
    """The first row, with the labels of the next tokens."""
    batch = {name: one[None] for name, one in rows()[0].items()}
    batch["labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return batch


def backward(model: torch.nn.Module, case: Case, world: int, rank: int) -> dict[str, Any]:
    """Loss and gradients of the first batch, split over the processes along the sequence."""
    whole = whole_batch()
    of_all = (whole["labels"] != -100).sum()
    part = {name: one.chunk(world, dim=1)[rank] for name, one in whole.items()}
    share = (part["labels"] != -100).sum() / of_all
    options = {"output_router_logits": True} if case.router_loss else {}
    loss = model(**part, shift_labels=part["labels"], use_cache=False, **options).loss * share
    model.zero_grad()
    loss.backward()
    loss = loss.detach()
    gradients = {name: one.grad for name, one in model.named_parameters() if one.grad is not None}
    if world > 1:
        for one in (loss, *gradients.values()):
            distributed.all_reduce(one)
    return {"loss": loss, "gradients": gradients}


def backward_in_parts(model: torch.nn.Module, world: int) -> dict[str, Any]:
    """As `backward` in one process with the whole sequence, but with a separate router loss for each part."""
    whole = whole_batch()
    out = model(**whole, shift_labels=whole["labels"], use_cache=False, output_router_logits=True)
    config, valid = model.config, whole["labels"] != -100
    plain = out.loss - config.router_aux_loss_coef * out.aux_loss
    of_parts = []
    for part in range(world):
        logits = tuple(one.chunk(world)[part] for one in out.router_logits)
        balance = load_balancing_loss_func(logits, config.num_experts, config.num_experts_per_tok)
        of_parts.append(balance * valid.chunk(world, dim=1)[part].sum() / valid.sum())
    loss = plain + config.router_aux_loss_coef * sum(of_parts)
    loss.backward()
    return {
        "loss": loss.detach(),
        "whole": out.loss.detach(),
        "gradients": {name: one.grad for name, one in model.named_parameters() if one.grad is not None},
    }


# from here on only under DeepSpeed


def main(directory: Path) -> None:
    import deepspeed

    # DeepSpeed would compile a C++ extension for minutes, to send small tensors faster within one machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    args = arguments(directory / "trained", ddp_backend="gloo", save_strategy="no")
    config, rank = args.deepspeed_plugin.deepspeed_config["zero_optimization"], args.process_index
    if config["stage"] == 3:
        config["stage3_param_persistence_threshold"] = 0
    else:  # gradients are summed over the processes of a sequence, not averaged
        args.max_grad_norm, args.adam_epsilon = 2 * args.max_grad_norm, 2 * args.adam_epsilon
    trained = Trainer(build(directory, CASES["plain"]), args, train_dataset=rows())
    trained.train()
    place = directory / f"zero{config['stage']}"
    trained.save_model(place)
    found: dict[str, Any] = {"losses": losses(trained), "norms": norms(trained)}
    found["evaluated"] = trained.evaluate(rows())["eval_loss"]
    parameters = list(trained.model.parameters())
    with deepspeed.zero.GatheredParameters(parameters) if config["stage"] == 3 else nullcontext():
        found |= {"factors": factors(trained.model), "packed": packed(trained.model)}
    if config["stage"] == 3:
        found |= run_without_engine(directory, rank)
    torch.save(found, place / f"{rank}.pt")


def run_without_engine(directory: Path, rank: int) -> dict[str, Any]:
    """Without an engine; the process group and the attention function are those that accelerate set up."""
    layer_runner.GRAPHS_BACKEND = CallingBackend
    found = {}
    for name, case in CASES.items():
        model = build(directory, case)
        found[name] = backward(model, case, 2, rank)
        if case.graphs:
            backward(model, case, 2, rank)  # a shape is captured at its second occurrence
            found["graphs report"] = layer_runner.graphs_report(model)
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
