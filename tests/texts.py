"""Texts of token ids, and a tokenizer that returns these ids."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_tokenizer(directory: Path) -> None:
    """The words `w3`, `w4`, ... are the tokens 3, 4, ..."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(directory)


def write_text(file: Path, ids: torch.Tensor) -> None:
    file.write_text(" ".join(f"w{number}" for number in ids.flatten().tolist()))
