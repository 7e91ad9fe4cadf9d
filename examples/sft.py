"""Supervised fine-tuning of a mixture-of-experts model with 4-bit experts, with TRL.

    pip install peft-moe-qlora trl
    python examples/sft.py                                   # tiny model on a CPU, without a download
    python examples/sft.py --model Qwen/Qwen3-30B-A3B --data chats.jsonl
    python examples/sft.py --resume                          # resumes from the last checkpoint
    accelerate launch --config_file CONFIG examples/sft.py   # several processes

DATA contains one chat per line, `{"messages": [{"role": ..., "content": ...}, ...]}`. The script accepts all arguments
of TRL's `SFTConfig`, such as `--learning_rate 1e-4`, `--report_to trackio` and `--use_liger_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer, TrlParser
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training
from peft_moe_qlora.training import cast_trainable_to_fp32

RECIPE = {
    "output_dir": "examples_output/sft",
    "max_length": 512,
    "packing": True,
    "assistant_only_loss": True,
    "per_device_train_batch_size": 2,
    "num_train_epochs": 10.0,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "load_best_model_at_end": True,
    "logging_steps": 1,
    "bf16": torch.cuda.is_available(),
    # routers are frozen, and CUDA graphs cannot record their logits
    "router_aux_loss_coef": 0.0,
}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Path or hub name of the model; default: a tiny model."})
    data: str = field(
        default=str(Path(__file__).parent / "data" / "chats.jsonl"), metadata={"help": "JSONL file with chats."}
    )
    resume: bool = field(default=False, metadata={"help": "Resume from the last checkpoint in the output directory."})
    fast: bool = field(
        default=torch.cuda.is_available(),
        metadata={"help": "Use compiled layers and CUDA graphs, on one GPU, for models without stateful layers."},
    )


class FixedLengthCollator(DataCollatorForLanguageModeling):
    """Makes all batches the same shape, as CUDA graphs require.

    Document lengths are removed, since they differ between batches; masks are computed from position ids.
    """

    def torch_call(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().torch_call(examples)
        return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig))
    parser.set_defaults(**RECIPE, learning_rate=None)
    # before the model: parsing TrainingArguments sets the GPU of each process
    script, args = parser.parse_args_and_config()
    if args.learning_rate is None:
        args.learning_rate = 2e-4 if script.model else 1e-2
    if script.model is None:
        with args.main_process_first():
            script.model = tiny_checkpoint(Path(args.output_dir).parent / "tiny-moe")

    tokenizer = AutoTokenizer.from_pretrained(script.model)
    model = AutoModelForCausalLM.from_pretrained(
        script.model, dtype="auto", quantization_config=MoeQuantizationConfig()
    )
    # stateful layers, such as linear attention, read the document lengths that are removed for graphs
    is_fast = script.fast and args.world_size == 1 and not model._is_stateful
    prepare_model_for_training(model, compile_layers=is_fast, cuda_graphs=is_fast)

    chats = load_dataset("json", data_files=script.data, split="train").train_test_split(test_size=0.1, seed=0)
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=chats["train"],
        eval_dataset=chats["test"],
        processing_class=tokenizer,
        peft_config=MoeQLoraConfig(
            r=16, expert_r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )
    if is_fast:
        length = args.max_length * args.per_device_train_batch_size
        trainer.data_collator = FixedLengthCollator(tokenizer.pad_token_id, True, pad_to_multiple_of=length)
    # TRL has cast the factors to bf16, in which small updates are lost
    cast_trainable_to_fp32(trainer.model)

    trainer.train(resume_from_checkpoint=script.resume)
    trainer.save_model()


if __name__ == "__main__":
    main()
