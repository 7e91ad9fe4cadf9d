"""DeepSpeed trainings, started by `accelerate launch` with a config file of the examples.

    accelerate launch --config_file CONFIG tests/deepspeed_training.py DIRECTORY

The directory contains a checkpoint in `base`. Results are written next to it, for the test to read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from calling_backend import CallingBackend
from peft import PeftModel, get_peft_model
from tiny_models import VOCABULARY, randomize_adapter
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, logging
from transformers.integrations import is_deepspeed_zero3_enabled

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training, quantize_experts
from peft_moe_qlora.training import UnsyncedAdamW8bit, layer_runner

STEPS, RESUMED_AT, BATCH, LENGTH = 3, 2, 4, 12
EPSILON = 1e-4
"""AdamW's epsilon. With the default of 1e-8, rounding alone decides the update of a value with a tiny gradient."""


@dataclass(frozen=True)
class Case:
    """How a model is stored and trained.

    Args:
        double_quant: of the experts.
        linear: also quantize linear layers to 4 bits.
        checkpointing: of `prepare_model_for_training`.
        bf16: use DeepSpeed's bf16 engine, which casts all floating-point parameters.
        is_whole: ZeRO-3 does not partition parameters this small, as by default.
        graphs: request CUDA graphs of the layers.
        eight_bit: AdamW with 8-bit states.
        accumulation: gradient accumulation steps.
    """

    double_quant: bool = False
    linear: bool = False
    checkpointing: bool | str = False
    bf16: bool = False
    is_whole: bool = False
    graphs: bool = False
    eight_bit: bool = False
    accumulation: int = 1

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32


CASES = {
    "plain": Case(),
    "bf16": Case(bf16=True, double_quant=True, linear=True),
    "bf16, small ones whole": Case(bf16=True, double_quant=True, is_whole=True),
    "linear": Case(linear=True, checkpointing=True),
    "keep-experts": Case(checkpointing="keep-experts", double_quant=True),
    "graphs": Case(graphs=True),
    "8 bits": Case(eight_bit=True),
    "accumulated": Case(accumulation=2),
}


def build(directory: Path, case: Case) -> PeftModel:
    storage = MoeQuantizationConfig(quantize_linear=case.linear, double_quant=case.double_quant)
    base = AutoModelForCausalLM.from_pretrained(
        directory / "base",
        dtype=case.dtype,
        quantization_config=storage,
        device_map=None if is_deepspeed_zero3_enabled() else "cpu",
    )
    prepare_model_for_training(base, use_gradient_checkpointing=case.checkpointing, cuda_graphs=case.graphs)
    config = MoeQLoraConfig(r=4, target_modules="all-linear", double_quant=case.double_quant, task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    randomize_adapter(model, std=0.05)
    return model


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, VOCABULARY, (STEPS * BATCH, LENGTH), generator=generator)
    return [{"input_ids": one, "labels": one} for one in ids]


def arguments(output: Path, world: int, accumulation: int = 1, **options: Any) -> TrainingArguments:
    """Training arguments of one process, or of one of several; there, create them before the model, as in a script."""
    of_world = {"use_cpu": True} if world == 1 else {"ddp_backend": "gloo"}
    return TrainingArguments(
        output,
        per_device_train_batch_size=BATCH // world // accumulation,
        gradient_accumulation_steps=accumulation,
        max_steps=STEPS,
        learning_rate=1e-2,
        adam_epsilon=EPSILON,
        max_grad_norm=0.5,  # clips every step
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=RESUMED_AT,
        report_to=[],
        disable_tqdm=True,
        **of_world,
        **options,
    )


def trainer(model: PeftModel, args: TrainingArguments, case: Case) -> Trainer:
    optimizer = (UnsyncedAdamW8bit, {"lr": 1e-2, "eps": EPSILON}) if case.eight_bit else None
    return Trainer(model, args, train_dataset=batches(), optimizer_cls_and_kwargs=optimizer)


def logged(trained: Trainer) -> dict[str, list[float]]:
    """Losses, and gradient norms before clipping."""
    lines = [line for line in trained.state.log_history if "loss" in line]
    return {"losses": [line["loss"] for line in lines], "norms": [float(line["grad_norm"]) for line in lines]}


def stored(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of the factors and of all packed tensors, by name."""
    named = {name: one.detach().clone() for name, one in model.named_parameters()}
    factors = {name: one.float() for name, one in named.items() if ".lora_" in name}
    packed = {name: one for name, one in named.items() if not one.is_floating_point()}
    of_4_bits = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    packed |= {f"{name}.absmax": module.weight.quant_state.absmax.clone() for name, module in of_4_bits.items()}
    return {"factors": factors, "packed": packed}


# from here on only under DeepSpeed


def main(directory: Path) -> None:
    import deepspeed

    # DeepSpeed would compile a C++ extension for minutes, to send small tensors faster within one machine
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    layer_runner.GRAPHS_BACKEND = CallingBackend
    found = {}
    for name, case in CASES.items():
        args = shared_arguments(directory, name)
        is_zero3 = args.deepspeed_plugin.zero_stage == 3
        if is_zero3 and name == "plain":
            found["made whole"] = error_of(lambda: quantize_whole(directory))
        one = trainer(build(directory, case), args, case)
        one.train()
        found[name] = {**logged(one), "sharded": sharded(one), **whole(one.model)}
        if case.graphs:
            found["graphs report"] = layer_runner.graphs_report(one.model)
        if name == "plain":
            one.save_model(directory / "saved")
            found["refused"] = refused(one, directory) if is_zero3 else {}
            found["gathered"] = results_while_gathered(one, directory, args.process_index)
            found["resumed"] = resumed(directory, name)
    torch.save(found, directory / f"{args.process_index}.pt")


def shared_arguments(directory: Path, name: str) -> TrainingArguments:
    case, save_strategy = CASES[name], "steps" if name == "plain" else "no"
    args = arguments(directory / name, world=2, accumulation=case.accumulation, save_strategy=save_strategy)
    config = args.deepspeed_plugin.deepspeed_config
    if config["zero_optimization"]["stage"] == 3 and not case.is_whole:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if case.bf16:
        args.bf16 = True  # enabled later, since it is rejected without a GPU
        config["bf16"] = {"enabled": True}
    return args


def gathered(model: torch.nn.Module) -> Any:
    import deepspeed

    is_sharded = any(hasattr(one, "ds_id") for one in model.parameters())
    return (
        deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0) if is_sharded else nullcontext()
    )


def whole(model: torch.nn.Module) -> dict[str, dict[str, torch.Tensor]]:
    with gathered(model):
        return stored(model)


def sharded(trained: Trainer) -> int:
    """The number of packed tensors that are partitioned on this process."""
    packed = [one for one in trained.model.parameters() if not one.is_floating_point()]
    return sum(one.numel() < getattr(one, "ds_numel", 0) for one in packed)


def quantize_whole(directory: Path) -> None:
    """Quantizes a model that zero.Init partitioned while transformers loaded it."""
    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.float32)
    quantize_experts(model, progressbar=False)


def resumed(directory: Path, name: str) -> dict[str, dict[str, torch.Tensor]]:
    args = shared_arguments(directory, name)
    again = trainer(build(directory, CASES[name]), args, CASES[name])
    again.train(resume_from_checkpoint=str(directory / name / f"checkpoint-{RESUMED_AT}"))
    return whole(again.model)


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "not refused"


def refused(trained: Trainer, directory: Path) -> dict[str, str]:
    """The errors of operations that require whole parameters."""
    model, rank = trained.model, trained.args.process_index
    layer = next(iter(model.base_model.expert_layers()))
    config = MoeQLoraConfig(r=2)
    saved = directory / "saved"
    with gathered(model):
        while_gathered = {
            "add, gathered": error_of(lambda: model.add_adapter("other", config)),
            "merge and unload, gathered": error_of(model.merge_and_unload),
            "unload, gathered": error_of(model.unload),
        }
    return while_gathered | {
        "merge": error_of(model.merge_adapter),
        "unmerge": error_of(model.unmerge_adapter),
        "merge and unload": error_of(model.merge_and_unload),
        "unload": error_of(model.unload),
        "add": error_of(lambda: model.add_adapter("other", config)),
        "combine": error_of(lambda: model.add_weighted_adapter(["default"], [1.0], "other", "linear")),
        "load": error_of(lambda: model.load_adapter(saved, "default")),
        "decode": error_of(layer.get_base_weight),
        "delta": error_of(lambda: layer.get_delta_weight("default")),
        "save": error_of(lambda: model.save_pretrained(directory / f"refused-{rank}")),
        "save nothing": error_of(lambda: model.save_pretrained(directory / f"nothing-{rank}", state_dict={})),
        "adapters": str(sorted(model.peft_config)),
        "report": str(model.base_model.experts_report()),
    }


def results_while_gathered(trained: Trainer, directory: Path, rank: int) -> dict[str, Any]:
    """Operations that work while everything is gathered, and the model afterwards."""
    model = trained.model
    found = {}
    with gathered(model):
        before = stored(model)["packed"]
        model.merge_adapter()
        found["merged"] = stored(model)["packed"]
        model.unmerge_adapter()
        after = stored(model)["packed"]
        found["is unmerged"] = all(torch.equal(one, after[name]) for name, one in before.items())
        model.save_pretrained(directory / "saved gathered", is_main_process=rank == 0)
    model.eval()
    ids = torch.stack([one["input_ids"] for one in batches()])
    with torch.no_grad():
        found["logits"] = model(input_ids=ids).logits
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
