"""Direct preference optimization of a mixture-of-experts model with its experts in 4 bits, by TRL.

    python examples/sft.py
    python examples/dpo.py --adapter examples_output/sft   # trains the same adapter on; the reference is a copy of it
    python examples/dpo.py                                 # a new adapter; the reference is the model without it
    python examples/dpo.py --model Qwen/Qwen3-30B-A3B --data preferences.jsonl

DATA has a pair in each line, `{"prompt": [...], "chosen": [...], "rejected": [...]}`, each a list of messages as in a
chat. Every argument of TRL's `DPOConfig` is one of this program too. `KTOTrainer` goes the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel
from tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, TrlParser

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training

RECIPE = {
    "output_dir": "examples_output/dpo",
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2.0,
    "logging_steps": 1,
    "save_strategy": "epoch",
    "bf16": torch.cuda.is_available(),
    # routers are frozen; with it the first loss is not ln 2
    "router_aux_loss_coef": 0.0,
}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Path or name on the hub; a tiny one by default."})
    data: str = field(
        default=str(Path(__file__).parent / "data" / "preferences.jsonl"), metadata={"help": "JSONL of pairs."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Adapter that is trained on, as sft.py has saved it."})


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig))
    parser.set_defaults(**RECIPE, learning_rate=None)
    script, args = parser.parse_args_and_config()
    if args.learning_rate is None:
        args.learning_rate = 1e-5 if script.model else 1e-3
    if script.model is None:
        with args.main_process_first():
            script.model = tiny_checkpoint(Path(args.output_dir).parent / "tiny-moe")

    model = AutoModelForCausalLM.from_pretrained(
        script.model, dtype="auto", quantization_config=MoeQuantizationConfig()
    )
    prepare_model_for_training(model)
    new_adapter = None
    if script.adapter is None:
        new_adapter = MoeQLoraConfig(
            r=16, expert_r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    else:
        # frozen until there is a trainer: TRL rounds what is trained of a model in 4 bits to bf16, so that the policy
        # would not start as its reference
        model = PeftModel.from_pretrained(model, script.adapter)

    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=load_dataset("json", data_files=script.data, split="train"),
        processing_class=AutoTokenizer.from_pretrained(script.model),
        peft_config=new_adapter,
    )
    if script.adapter is not None:
        trainer.model.set_adapter("default")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    trainer.train()
    # beside the adapter, TRL saves the copy of it in the folder `ref`
    trainer.save_model()


if __name__ == "__main__":
    main()
