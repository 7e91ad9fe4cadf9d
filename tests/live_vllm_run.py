"""vLLM and models in training in one process: after each weight update, the engine is compared with the model.

`python tests/live_vllm_run.py OUT DIRECTORY KIND...` writes the largest differences of log probabilities to OUT as
JSON. It runs in a separate process, since vLLM changes thread affinity and other process-wide settings.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from peft import get_peft_model
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn
from vllm_log_probabilities import log_probabilities, start

from peft_moe_qlora import MoeQLoraConfig, MoeQuantizationConfig, load_quantized
from peft_moe_qlora.merge import LiveWeights
from peft_moe_qlora.training.live_vllm import load_into_vllm

# attention on a CPU requires heads of 32
SIZES = {"hidden_size": 128, "head_dim": 32}


@torch.no_grad()
def of_model(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], 2e-2)
    model.train()
    for step in range(steps):
        ids = token_ids(batch=4, length=16).roll(step, 1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def differences(directory: Path, kind: str) -> dict[str, float]:
    """The differences after each weight update, and the change that each update made."""
    tiny_model(kind, std=0.1, **SIZES).save_pretrained(directory)
    quantization = MoeQuantizationConfig(quantize_linear=True)
    model = load_quantized(str(directory), quantization, dtype=torch.float32, device_map="cpu")
    model = get_peft_model(model, MoeQLoraConfig(r=4, lora_alpha=6, target_modules="all-linear", bias="none"))
    randomize_adapter(model, std=0.05)
    ids, llm = token_ids(), start(str(directory))
    found = {"before": (log_probabilities(llm, ids) - of_model(model, ids)).abs().max().item()}
    for name, only_adapted in (("all", False), ("adapted", True), ("adapted again", True)):
        if only_adapted:
            train(model)
        before = log_probabilities(llm, ids)
        load_into_vllm(llm, LiveWeights(model, only_adapted=only_adapted))
        after = log_probabilities(llm, ids)
        found[name] = (after - of_model(model, ids)).abs().max().item()
        found[f"moved by {name}"] = (after - before).abs().max().item()
    llm.llm_engine.engine_core.shutdown()
    return found


def main() -> None:
    out, directory, *kinds = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    Path(out).write_text(json.dumps({kind: differences(Path(directory, kind), kind) for kind in kinds}))


if __name__ == "__main__":
    main()
