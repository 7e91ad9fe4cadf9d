"""A reward model from a mixture-of-experts model with its experts in 4 bits, by TRL.

    python examples/reward.py
    python examples/reward.py --model Qwen/Qwen3-30B-A3B --data preferences.jsonl

DATA has pairs as for `dpo.py`. The head that gives the score is new: it is trained in full and saved with the adapter.
Every argument of TRL's `RewardConfig` is one of this program too.
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
    model: str | None = field(default=None, metadata={"help": "Path or name on the hub; a tiny one by default."})
    data: str = field(
        default=str(Path(__file__).parent / "data" / "preferences.jsonl"), metadata={"help": "JSONL of pairs."}
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

    # the head starts with random weights, alike in all processes
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
        # PEFT adds the head to modules_to_save by itself
        peft_config=MoeQLoraConfig(r=16, expert_r=4, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS"),
    )
    # TRL rounds factors of a model in 4 bits to bf16, in which small updates are lost
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
