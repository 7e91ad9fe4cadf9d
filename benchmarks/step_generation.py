"""Generation beside training: time of a token with the adapter on, off and merged, by transformers' own `generate`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel

ADAPTERS = ("on", "off", "merged")
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "captured": {"cache_implementation": "static", "disable_compile": True},
}
"""Name -> options of `generate`: transformers compiles decoding with a static cache; `+graphs` captures it instead."""


@dataclass(frozen=True)
class Generation:
    """Greedy generation of one batch.

    Args:
        shape: of the model.
        arm: what computes it.
        adapter: of `ADAPTERS`.
        cache: of `CACHES`.
        batch: number of sequences.
        prompt: tokens of each at the beginning.
        new_tokens: that were generated for each.
        milliseconds_per_token: time of all divided by `new_tokens`; the prompt's forward is in it.
        prompt_milliseconds: of the prompt's forward and the first token.
        milliseconds_per_later_token: of those after the first.
        tokens_per_second: of all sequences.
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
    """The adapter on, off or merged, and on again afterwards."""
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
    """Generates twice untimed, which compiles and captures, and then once timed; the adapter's state is the caller's.

    Args:
        model: left in the mode in which it was.
        shape, arm, adapter, cache, batch, prompt, new_tokens: see `Generation`.
    """
    config = model.get_base_model().config
    device = model.get_base_model().lm_head.weight.device
    ids = torch.randint(0, config.vocab_size, (batch, prompt), device=device)

    def seconds(number: int) -> float:
        start = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=number,
            max_new_tokens=number,
            do_sample=False,
            pad_token_id=0,
            use_cache=True,
            **CACHES[cache],
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
            if cache != "dynamic":  # its length, and with it what was compiled, is that of the longest
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
