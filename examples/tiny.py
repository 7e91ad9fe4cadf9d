"""Tiny models with random weights, so that the examples run on a CPU without a download.

They are saved like checkpoints on the hub, with a byte-level tokenizer and a chat template.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    BatchFeature,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
VOCABULARY = [*MARKS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
IDS = {token: number for number, token in enumerate(VOCABULARY)}
# ChatML; assistant_only_loss trains on the text inside of `generation`
CHAT_TEMPLATE = (
    "{%- for message in messages -%}<|im_start|>{{ message.role }}\n"
    "{%- if message.role == 'assistant' -%}{% generation %}{{ text(message.content) }}<|im_end|>{% endgeneration %}"
    "{%- else -%}{{ text(message.content) }}<|im_end|>{%- endif -%}{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
)
CONTENT = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)
SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # minimum of vLLM on a CPU
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": IDS["<|im_end|>"],
    "pad_token_id": IDS["<|endoftext|>"],
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte."""
    tokenizer = Tokenizer(models.BPE(vocab=IDS, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=MARKS,
        chat_template=CONTENT + CHAT_TEMPLATE,
    )


def tiny_checkpoint(directory: str | Path) -> str:
    """Saves a Qwen3-MoE with 0.2 million parameters, unless it exists; returns its path."""
    return _write(directory, Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES))


def tiny_vision_checkpoint(directory: str | Path) -> str:
    """Saves a Qwen3-VL-MoE, unless it exists; returns its path."""
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "out_hidden_size": SIZES["hidden_size"],
        "patch_size": 16,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    config = Qwen3VLMoeConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IDS["<|image_pad|>"],
        vision_start_token_id=IDS["<|vision_start|>"],
        vision_end_token_id=IDS["<|vision_end|>"],
        tie_word_embeddings=False,
    )
    return _write(directory, Qwen3VLMoeForConditionalGeneration, config)


def _write(directory: str | Path, model_class: type, config) -> str:
    directory = Path(directory).resolve()
    if not directory.exists():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_class(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.1)
        # rename at the end, so that an existing directory is complete
        partial = directory.with_name(f"{directory.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tiny_tokenizer().save_pretrained(partial)
        partial.rename(directory)
    return str(directory)


class TinyProcessor(ProcessorMixin):
    """Qwen3-VL's processor without videos, which require torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def of(cls, checkpoint: str) -> TinyProcessor:
        """The processor of a tiny checkpoint."""
        # needs Pillow, which scripts without images do not
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        return cls(Qwen2VLImageProcessorPil(patch_size=16), tokenizer, chat_template=tokenizer.chat_template)

    def __call__(self, images=None, text=None, return_tensors=None, **kwargs) -> BatchFeature:
        text = [text] if isinstance(text, str) else list(text)
        features = {}
        if images is not None:
            features = dict(self.image_processor(images=images, return_tensors=return_tensors))
            # repeat each image token for the number of image embeddings
            counts = iter((features["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
            parts = [one.split("<|image_pad|>") for one in text]
            text = ["".join(p + "<|image_pad|>" * next(counts) for p in some[:-1]) + some[-1] for some in parts]
        features |= self.tokenizer(text, return_tensors=return_tensors, **kwargs)
        if images is not None:
            features["mm_token_type_ids"] = (features["input_ids"] == IDS["<|image_pad|>"]).long()
        return BatchFeature(features)
