"""Fine-tuning of a vision-language mixture-of-experts model with adapted 4-bit text experts, with TRL.

    pip install peft-moe-qlora trl pillow
    python examples/vision.py
    python examples/vision.py --model Qwen/Qwen3-VL-30B-A3B-Instruct

The data are generated: images of one colour, and questions for the colour. Vision tower and attention are not trained.
The script accepts all arguments of TRL's `SFTConfig`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from PIL import Image
from tiny import TinyProcessor, tiny_vision_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer, TrlParser

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, prepare_model_for_training
from peft_moe_qlora.training import cast_trainable_to_fp32

COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 220), "white": (250, 250, 250)}
RECIPE = {
    "output_dir": "examples_output/vision",
    # truncation could remove image tokens
    "max_length": None,
    "per_device_train_batch_size": 4,
    "max_steps": 40,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": torch.cuda.is_available(),
    # routers are frozen
    "router_aux_loss_coef": 0.0,
}


@dataclass
class ScriptArguments:
    model: str | None = field(default=None, metadata={"help": "Path or hub name of the model; default: a tiny model."})


def coloured_squares(sizes: tuple[int, ...] = (64, 96)) -> Dataset:
    """Two squares of each colour, in two sizes, which have different numbers of tokens."""
    return Dataset.from_list(
        [
            {
                "images": [Image.new("RGB", (size, size), rgb)],
                "prompt": [{"role": "user", "content": "Which colour is this?"}],
                "completion": [{"role": "assistant", "content": f"It is {colour}."}],
            }
            for colour, rgb in COLOURS.items()
            for size in sizes
        ]
    )


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig))
    parser.set_defaults(**RECIPE, learning_rate=None)
    script, args = parser.parse_args_and_config()
    if args.learning_rate is None:
        args.learning_rate = 2e-4 if script.model else 1e-2
    if script.model is None:
        with args.main_process_first():
            script.model = tiny_vision_checkpoint(Path(args.output_dir).parent / "tiny-vision-moe")
        processor = TinyProcessor.of(script.model)
    else:
        processor = AutoProcessor.from_pretrained(script.model)

    model = AutoModelForImageTextToText.from_pretrained(
        script.model, dtype="auto", quantization_config=MoeQuantizationConfig()
    )
    prepare_model_for_training(model)
    trainer = SFTTrainer(
        model,
        args,
        train_dataset=coloured_squares(),
        processing_class=processor,
        # the default target_modules are the routed experts, all of which are in the language model
        peft_config=MoeQLoraConfig(r=8, lora_alpha=16),
    )
    # TRL has cast the factors to bf16, in which small updates are lost
    cast_trainable_to_fp32(trainer.model)

    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
