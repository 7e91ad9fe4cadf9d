"""Training of a reward model from a mixture-of-experts model with 4-bit experts, with TRL.

    python examples/reward.py
    python examples/reward.py --model Qwen/Qwen3-30B-A3B --data preferences.jsonl

DATA contains pairs as for `dpo.py`. The score head is new: it is trained in full and saved with the adapter. The
script accepts all arguments of TRL's `RewardConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from tiny import tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer, TrlParser

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training
from peft_moe_qlora.training import cast_trainable_to_fp32

RECIPE = {
    "output_dir": "examples_output/reward",
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2.0,
    "logging_steps": 1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "bf16": torch.cuda.is_available(),
}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Path or hub name of the model; default: a tiny model."})
    data: str = field(
        default=str(Path(__file__).parent / "data" / "preferences.jsonl"),
        metadata={"help": "JSONL file with preference pairs."},
    )


def main() -> None:
    parser = TrlParser((ScriptArguments, RewardConfig))
    parser.set_defaults(**RECIPE, learning_rate=None)
    script, args = parser.parse_args_and_config()
    if args.learning_rate is None:
        args.learning_rate = 1e-4 if script.model else 1e-3
    if script.model is None:
        with args.main_process_first():
            script.model = tiny_checkpoint(Path(args.output_dir).parent / "tiny-moe")

    # the head is initialized randomly, with the same weights in all processes
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        script.model, dtype="auto", num_labels=1, quantization_config=MoeQuantizationConfig()
    )
    prepare_model_for_training(model)

    pairs = load_dataset("json", data_files=script.data, split="train").train_test_split(test_size=0.1, seed=0)
    trainer = RewardTrainer(
        model,
        args,
        train_dataset=pairs["train"],
        eval_dataset=pairs["test"],
        processing_class=AutoTokenizer.from_pretrained(script.model),
        # PEFT adds the head to modules_to_save
        peft_config=MoeQLoraConfig(r=16, expert_r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    # TRL has cast the factors to bf16, in which small updates are lost
    cast_trainable_to_fp32(trainer.model)

    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
