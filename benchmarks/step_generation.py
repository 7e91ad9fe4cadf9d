"""Times generation with transformers' `generate`, with the adapter on, off and merged."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from transformers import StaticCache

ADAPTERS = ("on", "off", "merged")
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "captured": {"cache_implementation": "static", "disable_compile": True},
    "reused": {"disable_compile": True},
}
"""Name -> options of `generate`. transformers compiles decoding with a static cache; `+graphs` captures it instead.

With `reused`, all generations share one static cache, so that a step is captured only once.
"""


@dataclass(frozen=True)
class Generation:
    """Greedy generation of one batch.

    Args:
        shape: shape of the model.
        arm: configuration.
        adapter: state of the adapter, in `ADAPTERS`.
        cache: KV cache, in `CACHES`.
        batch: number of sequences.
        prompt: tokens of the prompt per sequence.
        new_tokens: generated tokens per sequence.
        milliseconds_per_token: total time, including the prompt's forward, divided by `new_tokens`.
        prompt_milliseconds: time of the prompt's forward and the first token.
        milliseconds_per_later_token: time per token after the first.
        tokens_per_second: generated tokens per second of all sequences.
    """

    shape: str
    arm: str
    adapter: str
    cache: str
    batch: int
    prompt: int
    new_tokens: int
    milliseconds_per_token: float
    prompt_milliseconds: float
    milliseconds_per_later_token: float
    tokens_per_second: float


@contextlib.contextmanager
def adapter_state(model: PeftModel, name: str) -> Iterator[None]:
    """Context with the adapter on, off or merged; on again afterwards."""
    if name == "off":
        with model.disable_adapter():
            yield
    elif name == "merged":
        model.merge_adapter()
        try:
            yield
        finally:
            model.unmerge_adapter()
    else:
        yield


def time_generation(
    model: PeftModel, shape: str, arm: str, adapter: str, cache: str, batch: int, prompt: int, new_tokens: int
) -> Generation:
    """Generates twice untimed, for compilation and captures, and then once timed, in the current adapter state.

    Args:
        model: the model, whose mode is restored.
        shape, arm, adapter, cache, batch, prompt, new_tokens: see `Generation`.
    """
    config = model.get_base_model().config
    device = model.get_base_model().lm_head.weight.device
    ids = torch.randint(0, config.vocab_size, (batch, prompt), device=device)
    shared = StaticCache(config=config, max_cache_len=prompt + new_tokens) if cache == "reused" else None
    options = CACHES[cache] if shared is None else {**CACHES[cache], "past_key_values": shared}

    def seconds(number: int) -> float:
        start = time.perf_counter()
        if shared is not None:
            shared.reset()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=number,
            max_new_tokens=number,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
            **options,
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for number in (min(4, new_tokens), 1):
                seconds(number)
            first, total = seconds(1), seconds(new_tokens)
            if cache != "dynamic":  # length and compiled code depend on the longest generation
                total = seconds(new_tokens)
    finally:
        model.train(was_training)
    return Generation(
        shape=shape,
        arm=arm,
        adapter=adapter,
        cache=cache,
        batch=batch,
        prompt=prompt,
        new_tokens=new_tokens,
        milliseconds_per_token=1e3 * total / new_tokens,
        prompt_milliseconds=1e3 * first,
        milliseconds_per_later_token=1e3 * max(total - first, 0.0) / max(new_tokens - 1, 1),
        tokens_per_second=batch * new_tokens / total,
    )
