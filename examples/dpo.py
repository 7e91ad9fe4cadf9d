"""Direct preference optimization of a mixture-of-experts model with 4-bit experts, with TRL.

    python examples/sft.py
    python examples/dpo.py --adapter examples_output/sft   # continues with this adapter; the reference is a copy of it
    python examples/dpo.py                                 # trains a new adapter; the reference is the base model
    python examples/dpo.py --model Qwen/Qwen3-30B-A3B --data preferences.jsonl

DATA contains one pair per line, `{"prompt": [...], "chosen": [...], "rejected": [...]}`, each a list of chat messages.
The script accepts all arguments of TRL's `DPOConfig`. `KTOTrainer` works in the same way.
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
from peft_moe_qlora.training import cast_trainable_to_fp32

RECIPE = {
    "output_dir": "examples_output/dpo",
    "max_length": 512,
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2.0,
    "logging_steps": 1,
    "save_strategy": "epoch",
    "bf16": torch.cuda.is_available(),
    # routers are frozen; with this loss, the first loss would not be ln 2
    "router_aux_loss_coef": 0.0,
}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Path or hub name of the model; default: a tiny model."})
    data: str = field(
        default=str(Path(__file__).parent / "data" / "preferences.jsonl"),
        metadata={"help": "JSONL file with preference pairs."},
    )
    adapter: str | None = field(
        default=None, metadata={"help": "Adapter to continue training, such as the output of sft.py."}
    )


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
        # frozen until the trainer exists: TRL rounds trainable parameters of a 4-bit model to bf16, and the policy
        # would differ from its reference at the start
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
    # TRL has cast the factors to bf16, in which small updates are lost
    cast_trainable_to_fp32(trainer.model)

    trainer.train()
    # TRL also saves the copy of the adapter, in the folder `ref`
    trainer.save_model()


if __name__ == "__main__":
    main()
