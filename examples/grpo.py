"""Reinforcement learning with a reward that a program checks (GRPO), experts in 4 bits, by TRL.

    python examples/grpo.py
    python examples/grpo.py --adapter examples_output/sft    # goes on from an adapter
    python examples/grpo.py --model Qwen/Qwen3-30B-A3B
    python examples/grpo.py --model Qwen/Qwen3-30B-A3B --vllm    # vLLM generates, in this process

The model is asked sums and gets 1 for the right number, and a little for saying a number at all. Answers are generated
by the model that is trained, or by a vLLM that is given its merged weights after each step. Every argument of TRL's
`GRPOConfig` is one of this program too. `RLOOTrainer` goes the same way.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, TrlParser

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training

RECIPE = {
    "output_dir": "examples_output/grpo",
    "per_device_train_batch_size": 16,
    "num_generations": 8,
    "max_completion_length": 16,
    "max_steps": 40,
    "beta": 0.01,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": torch.cuda.is_available(),
    # routers are frozen, and CUDA graphs can't record what they say
    "router_aux_loss_coef": 0.0,
    # graphs want few lengths, and a cache that stays where it is
    "pad_to_multiple_of": 64,
    "cache_implementation": "static" if torch.cuda.is_available() else None,
}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Path or name on the hub; a tiny one by default."})
    adapter: str | None = field(default=None, metadata={"help": "Adapter that is trained on, as sft.py has saved it."})
    vllm: bool = field(default=False, metadata={"help": "vLLM generates; it has to be installed."})
    fast: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "CUDA graphs of layers and of decoding, on one GPU."}
    )


def sums(count: int, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    pairs = [(draw.randint(0, 9), draw.randint(0, 9)) for _ in range(count)]
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"What is {a} + {b}?"}], "answer": a + b} for a, b in pairs]
    )


def is_right(completions: list, answer: list[int], **_) -> list[float]:
    """1 where the last number is the answer."""
    found = [re.findall(r"\d+", completion[-1]["content"]) for completion in completions]
    return [float(bool(numbers) and int(numbers[-1]) == right) for numbers, right in zip(found, answer)]


def is_number(completions: list, **_) -> list[float]:
    """Up to 0.2, for the share of characters that are digits."""
    texts = [completion[-1]["content"] for completion in completions]
    return [0.2 * sum(character.isdigit() for character in text) / max(len(text), 1) for text in texts]


class EvalModeTrainer(GRPOTrainer):
    """Generates in evaluation mode, in which steps of decoding are captured in CUDA graphs."""

    def _generate_single_turn(self, *args, **kwargs):
        self.model.eval()
        try:
            return super()._generate_single_turn(*args, **kwargs)
        finally:
            self.model.train()


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig))
    parser.set_defaults(**RECIPE, learning_rate=None)
    script, args = parser.parse_args_and_config()
    args.use_vllm |= script.vllm
    if args.learning_rate is None:
        args.learning_rate = 1e-5 if script.model else 1e-2
    if script.model is None:
        with args.main_process_first():
            script.model = tiny_checkpoint(Path(args.output_dir).parent / "tiny-moe")

    model = AutoModelForCausalLM.from_pretrained(
        script.model, dtype="auto", quantization_config=MoeQuantizationConfig()
    )
    prepare_model_for_training(model, cuda_graphs=script.fast and args.world_size == 1)
    new_adapter = None
    if script.adapter is None:
        new_adapter = MoeQLoraConfig(
            r=16, expert_r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    else:
        # frozen until there is a trainer: TRL rounds what is trained of a model in 4 bits to bf16
        model = PeftModel.from_pretrained(model, script.adapter)

    trainer_class = EvalModeTrainer
    if args.use_vllm:
        from peft_moe_qlora.training.live_vllm import LiveVllmGRPOTrainer as trainer_class

    trainer = trainer_class(
        model,
        [is_right, is_number],
        args=args,
        train_dataset=sums(256),
        processing_class=AutoTokenizer.from_pretrained(script.model, padding_side="left"),
        peft_config=new_adapter,
    )
    if script.adapter is not None:
        trainer.model.set_adapter("default")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()

    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
