"""Models with another head than a language model's, which PEFT trains in full automatically."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny_models import randomize_adapter, tiny_config, tiny_model, token_ids
from torch import nn
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.merge import merge_checkpoint, merge_quantized

CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
}
HEADS = {"SEQ_CLS": "score", "TOKEN_CLS": "score", "QUESTION_ANS": "qa_outputs"}
LABELS = {
    "SEQ_CLS": {"labels": torch.tensor([1, 0])},
    "TOKEN_CLS": {"labels": torch.arange(24).view(2, 12) % 2},
    "QUESTION_ANS": {"start_positions": torch.tensor([1, 4]), "end_positions": torch.tensor([3, 9])},
}
CASES = [(model_type, task) for model_type in ("qwen3_moe", "mixtral") for task in CLASSES]


def task_model(model_type: str, task: str) -> nn.Module:
    """With the same weights at every call, except for the head, which is new each time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = CLASSES[task].from_config(tiny_config(model_type))
    nn.init.normal_(model.get_submodule(HEADS[task]).weight)
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    output = model(input_ids=token_ids())
    return torch.stack((output.start_logits, output.end_logits)) if "start_logits" in output else output.logits


@pytest.mark.parametrize("target_modules", [["experts"], "all-linear"], ids=str)
@pytest.mark.parametrize(("model_type", "task"), CASES)
def test_trained_saved_and_loaded(model_type, task, target_modules, tmp_path):
    """Including the head, in full."""
    config = MoeQLoraConfig(r=4, task_type=task, target_modules=target_modules)
    model = get_peft_model(task_model(model_type, task), config)
    randomize_adapter(model)
    before = {name: parameter.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    model(input_ids=token_ids(), **LABELS[task]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    still = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert set(still) == set(before)
    assert not [name for name in before if torch.equal(before[name], model.get_parameter(name))]
    model.save_pretrained(tmp_path)
    head = f"base_model.model.{HEADS[task]}"
    saved = load_file(tmp_path / "adapter_model.safetensors")[f"{head}.weight"]
    assert torch.equal(saved, model.get_submodule(head).weight)
    loaded = PeftModel.from_pretrained(task_model(model_type, task), tmp_path).eval()
    expected = outputs(model.eval())
    assert torch.equal(outputs(loaded), expected)
    merged = loaded.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("task", CLASSES)
def test_merged_on_disk(task, tmp_path):
    """Into a base with that head, in 16 or 4 bits; the base of a language model does not match."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    task_model("qwen3_moe", task).save_pretrained(base)
    model = get_peft_model(CLASSES[task].from_pretrained(base), MoeQLoraConfig(r=4, task_type=task)).eval()
    randomize_adapter(model)
    nn.init.normal_(model.get_submodule(f"base_model.model.{HEADS[task]}").weight)
    model.save_pretrained(adapter)
    merge_checkpoint(base, adapter, tmp_path / "merged", progressbar=False)
    merged = CLASSES[task].from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(merged.eval()), outputs(model), rtol=1e-3, atol=1e-4)
    report = merge_quantized(base, adapter, tmp_path / "quantized", progressbar=False)
    assert report.check.error < 0.3 * report.check.effect
    tiny_model().save_pretrained(tmp_path / "language model")
    with pytest.raises(ValueError, match=r"The adapter belongs to another base|has no experts module transformer"):
        merge_checkpoint(tmp_path / "language model", adapter, tmp_path / "other")


def test_heads_of_several_adapters():
    model = get_peft_model(task_model("qwen3_moe", "SEQ_CLS"), MoeQLoraConfig(r=4, task_type="SEQ_CLS"))
    model.add_adapter("other", MoeQLoraConfig(r=2, task_type="SEQ_CLS"))
    model.set_adapter("other")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert "base_model.model.score.modules_to_save.other.weight" in trained


@pytest.mark.parametrize(
    ("task", "names"),
    [("SEQ_CLS", ["scores"]), (None, ["classifier", "score"]), ("QUESTION_ANS", ["score"])],
    ids=str,
)
def test_unknown_name_in_modules_to_save_is_rejected(task, names):
    """Only PEFT's own names for a task may be absent."""
    config = MoeQLoraConfig(r=4, task_type=task, modules_to_save=names)
    with pytest.raises(ValueError, match=f"modules_to_save contains {names[0]!r}, which is not a module"):
        get_peft_model(task_model("qwen3_moe", task or "SEQ_CLS"), config)


def test_model_without_the_head_of_the_task_is_rejected():
    with pytest.raises(ValueError, match="modules_to_save contains 'classifier', which is not a module"):
        get_peft_model(tiny_model(), MoeQLoraConfig(r=4, task_type="SEQ_CLS"))
