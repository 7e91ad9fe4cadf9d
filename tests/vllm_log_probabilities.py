"""Log probabilities of tokens in vLLM on a CPU. Does not require this package.

`python tests/vllm_log_probabilities.py IDS OUT DIRECTORY...` writes directory -> log probabilities `(N, L - 1, V)` of
the models to OUT, by torch; for a model that vLLM cannot run on a CPU, its error.
"""

from __future__ import annotations

import gc
import os
import sys

# set before vLLM is imported: a small cache, and the engine in this process, where weights can be passed to it
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import torch
from vllm import LLM, SamplingParams


def start(directory: str) -> LLM:
    return LLM(
        directory,
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_num_batched_tokens=64,
        max_num_seqs=4,
        max_logprobs=-1,
        skip_tokenizer_init=True,
    )


def log_probabilities(llm: LLM, ids: torch.Tensor) -> torch.Tensor:
    """`(N, L - 1, V)`, for all tokens after the first."""
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": row.tolist()} for row in ids], sampling, use_tqdm=False)
    size = len(outputs[0].prompt_logprobs[1])
    rows = [[[at[token].logprob for token in range(size)] for at in one.prompt_logprobs[1:]] for one in outputs]
    return torch.tensor(rows)


def main() -> None:
    ids, out, *directories = sys.argv[1:]
    found: dict[str, torch.Tensor | str] = {}
    for directory in directories:
        try:
            llm = start(directory)
            found[directory] = log_probabilities(llm, torch.load(ids))
            llm.llm_engine.engine_core.shutdown()
            del llm
        except Exception as error:  # whatever the engine raises, the next model is tried
            found[directory] = f"{type(error).__name__}: {error}"
        gc.collect()
    torch.save(found, out)


if __name__ == "__main__":
    main()
