"""Liger's kernels with this package's: its patch of experts does not apply, its loss is rejected if it would be wrong.

Most tests imitate Liger's patches; the last ones run Liger, if installed.
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import get_peft_model
from tiny_models import logits, randomize_adapter, tiny_config, tiny_model, token_ids
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.models.qwen3_moe import modeling_qwen3_moe

from peft_moe_qlora import (
    MoeQLoraConfig,
    MoeQuantizationConfig,
    experts_report,
    load_experts,
    load_quantized,
    quantize_experts,
)
from peft_moe_qlora.quantization.formats import Fp8Format
from peft_moe_qlora.quantized_linear import QuantizedLinear

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where Triton's kernels run; without a GPU in its interpreter."""


class LigerExperts(nn.Module):
    """As Liger's: the same name and parameters, and no declaration; its forward must not run."""

    def __init__(self, config) -> None:
        super().__init__()
        E, H, I = config.num_experts, config.hidden_size, config.moe_intermediate_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, I))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        raise AssertionError("Liger's forward has run")


class LigerOtherExperts(LigerExperts):
    """A class that a later Liger may have."""


def patch(model: nn.Module) -> None:
    """As a Trainer does with `use_liger_kernel=True`."""
    for layer in model.model.layers:
        experts = layer.mlp.experts
        experts.__dict__["forward"] = LigerExperts.forward.__get__(experts, type(experts))
        experts.__dict__["_get_name"] = (lambda self: "LigerExperts").__get__(experts, type(experts))


def adapted(model: nn.Module | None = None, **options) -> nn.Module:
    model = get_peft_model(model or tiny_model(), MoeQLoraConfig(r=2, **options))
    randomize_adapter(model)
    return model.eval()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    ids = token_ids(model.device)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(gradient.any() for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layers", [None, [1]], ids=["all layers adapted", "one layer left alone"])
@pytest.mark.parametrize("trains", [True, False], ids=["before train()", "after train()"])
def test_experts_keep_their_forward(layers, trains):
    """A Trainer calls train() after Liger; a user who calls Liger directly may not."""
    expected = gradients(adapted(layers_to_transform=layers).train())
    model = adapted(layers_to_transform=layers).train()
    patch(model.get_base_model())
    if trains:
        model.train()
        assert "LigerExperts" not in repr(model)
    assert_equal(gradients(model), expected)
    assert "LigerExperts" not in repr(model)


def test_unconverted_experts_get_ligers_forward():
    """They are not ours."""
    model = tiny_model()
    patch(model)
    with pytest.raises(AssertionError, match="Liger's forward has run"):
        logits(model, token_ids())


def test_patched_model_gets_its_own_forward_back():
    """And keeps it when an adapter is added."""
    model = tiny_model()
    patch(model)
    assert torch.equal(logits(adapted(model), token_ids()), logits(adapted(), token_ids()))


def test_compiled_layer_keeps_its_forward():
    torch._dynamo.reset()
    model = adapted()
    expected = logits(model, token_ids())
    patch(model.get_base_model())
    model.eval()
    for layer in model.get_base_model().model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(logits(model, token_ids()), expected, rtol=1e-5, atol=1e-5)


class CountingHook(ModelHook):
    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("liger_first", [False, True])
def test_accelerate_hook_is_kept(liger_first):
    """As set by `device_map` over several devices, before or after Liger."""
    model = adapted()
    expected = logits(model, token_ids())
    experts, hook = model.get_base_model().model.layers[0].mlp.experts, CountingHook()
    if liger_first:
        patch(model.get_base_model())
    add_hook_to_module(experts, hook)
    if not liger_first:
        patch(model.get_base_model())
    assert torch.equal(logits(model, token_ids()), expected)
    assert torch.equal(logits(model, token_ids()), expected)
    assert hook.calls == 2
    remove_hook_from_module(experts)
    assert torch.equal(logits(model, token_ids()), expected)
    assert hook.calls == 2


def test_merging_restores_the_original_class(tmp_path):
    """The merged 16-bit module was never patched: Liger patched ours."""
    model = adapted(quant_type=None)
    patch(model.get_base_model())
    expected = logits(model, token_ids())
    merged = model.merge_and_unload(dtype=torch.float32)
    torch.testing.assert_close(logits(merged, token_ids()), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path)


def test_liger_class_is_read(monkeypatch, tmp_path):
    """It replaces the model's own class for the lifetime of the process."""
    tiny_model().save_pretrained(tmp_path)
    config = MoeQuantizationConfig(quantize_linear=False)
    expected = logits(load_quantized(str(tmp_path), config, device_map="cpu", dtype=torch.float32), token_ids())
    expected_adapted = logits(adapted(), token_ids())
    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", LigerExperts)

    loaded = load_quantized(str(tmp_path), config, device_map="cpu", dtype=torch.float32)
    assert {stack.architecture for stack in experts_report(loaded).stacks} == {"LigerExperts"}
    assert torch.equal(logits(loaded, token_ids()), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    assert torch.equal(logits(loaded, token_ids()), expected)
    in_memory = AutoModelForCausalLM.from_pretrained(tmp_path)
    quantize_experts(in_memory, progressbar=False)
    assert torch.equal(logits(in_memory, token_ids()), expected)
    model = adapted(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(model, token_ids()), expected_adapted)
    merged = model.merge_and_unload(dtype=torch.float32)
    assert all(type(layer.mlp.experts) is LigerExperts for layer in merged.model.layers)


def test_liger_class_uses_the_kernels(monkeypatch):
    """Its gate is known."""
    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", LigerExperts)
    model = tiny_model()
    quantize_experts(model, progressbar=False)
    assert model.model.layers[0].mlp.experts._gate.kind == "silu"


def test_unknown_liger_class_is_rejected(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(modeling_qwen3_moe, "Qwen3MoeExperts", LigerOtherExperts)
    message = r"model\.layers\.0\.mlp\.experts is of class LigerOtherExperts.*liger_kernel_config={'swiglu': False}"
    with pytest.raises(ValueError, match=message):
        load_quantized(str(tmp_path), MoeQuantizationConfig(), device_map="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for call in (quantize_experts, lambda model: get_peft_model(model, MoeQLoraConfig())):
        with pytest.raises(ValueError, match=message):
            call(model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ValueError, match=message):
        load_experts(model, tmp_path)


def lce_forward(self, *args, **kwargs):
    """As Liger's, which multiplies by `lm_head.weight`."""


lce_forward.__module__ = "liger_kernel.transformers.model.qwen3_moe"
NO_FUSED_LOSS = r"liger_kernel_config={'fused_linear_cross_entropy': False}"


def fuse_loss(model: nn.Module) -> nn.Module:
    base = model.get_base_model()
    base.forward = MethodType(lce_forward, base)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"lm_head": [3, 4]}},
    ],
    ids=["frozen", "trained", "tokens"],
)
def test_liger_loss_is_accepted_where_it_is_correct(options):
    fuse_loss(adapted(**options)).train()


def test_liger_loss_is_rejected_with_an_adapter_on_the_head():
    model = fuse_loss(adapted(target_modules=["experts", "lm_head"]))
    with pytest.raises(ValueError, match=rf"Qwen3MoeForCausalLM, which has an adapter on lm_head.*{NO_FUSED_LOSS}"):
        model.train()
    model.eval()  # evaluates with the adapter


def test_liger_loss_on_a_class_is_rejected(monkeypatch):
    """As `apply_liger_kernel_to_qwen3_moe()` sets it before a model is created."""
    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeForCausalLM, "forward", lce_forward)
    with pytest.raises(ValueError, match="which has an adapter on lm_head"):
        get_peft_model(tiny_model(), MoeQLoraConfig(r=2, target_modules=["experts", "lm_head"])).train()


def test_liger_loss_is_rejected_without_a_head():
    """Liger replaces the forward of any model by that of a language model."""
    base = AutoModelForSequenceClassification.from_config(tiny_config("qwen3_moe", num_labels=1))
    model = fuse_loss(get_peft_model(base, MoeQLoraConfig(r=2, task_type="SEQ_CLS")))
    with pytest.raises(ValueError, match=rf"Qwen3MoeForSequenceClassification, which has no lm_head.*{NO_FUSED_LOSS}"):
        model.train()


def test_liger_loss_is_rejected_with_a_packed_head():
    from bitsandbytes.nn import Linear4bit

    base = tiny_model()
    base.lm_head = Linear4bit(64, 64, bias=False, quant_type="nf4").to("cpu")
    with pytest.raises(ValueError, match=r"a packed lm_head \(Linear4bit.*torch\.uint8"):
        fuse_loss(get_peft_model(base, MoeQLoraConfig(r=2))).train()


def test_liger_loss_accepts_a_head_in_a_format():
    """Its `weight` can be read, decoded."""
    base = tiny_model()
    base.lm_head = QuantizedLinear.from_linear(base.lm_head, Fp8Format())
    fuse_loss(get_peft_model(base, MoeQLoraConfig(r=2))).train()


# Triton's interpreter can't run Liger's norms: it has no `.to` of a number
IN_INTERPRETER = {} if torch.cuda.is_available() else {"rms_norm": False}


def train(model: nn.Module, directory: Path, **options) -> dict[str, torch.Tensor]:
    """The trained parameters after two steps, and the losses."""
    ids = token_ids(batch=8).cpu().tolist()
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        **options,
    )
    has_head = hasattr(model.get_base_model(), "lm_head")
    data = [{"input_ids": row, "labels": row if has_head else number % 2} for number, row in enumerate(ids)]
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses) == 2
    named = model.named_parameters()
    return {"losses": losses, **{name: p.detach().cpu() for name, p in named if p.requires_grad}}


@pytest.mark.parametrize("config", [{}, {"swiglu": False}], ids=str)
def test_trainer_with_ligers_kernels(config, liger, tmp_path):
    """All kernels except the experts' are Liger's, and the results are the same."""
    options = {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}
    expected = train(adapted(**options), tmp_path)
    model = adapted(**options)
    found = train(model, tmp_path, use_liger_kernel=True, liger_kernel_config={**IN_INTERPRETER, **config})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    base = model.get_base_model()
    assert base.forward.__module__.startswith("liger_kernel.")
    assert modeling_qwen3_moe.apply_rotary_pos_emb is liger.liger_rotary_pos_emb
    assert (modeling_qwen3_moe.Qwen3MoeExperts.__name__ == "LigerExperts") == config.get("swiglu", True)
    # models created in this process from now on
    torch.testing.assert_close(train(adapted(**options), tmp_path), expected, rtol=1e-4, atol=1e-4)


def test_model_created_after_liger_trains(liger, tmp_path):
    """All patches are on the classes then."""
    expected = gradients(adapted().to(DEVICE).train())
    tiny_model().save_pretrained(tmp_path)
    liger.apply_liger_kernel_to_qwen3_moe(**IN_INTERPRETER)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).to(DEVICE)
    assert type(model.model.layers[0].mlp.experts).__name__ == "LigerExperts"
    assert type(model).forward.__module__.startswith("liger_kernel.")
    torch.testing.assert_close(gradients(adapted(model).train()), expected, rtol=1e-4, atol=1e-5)


def test_trainer_with_an_adapter_on_the_head_is_rejected(liger, tmp_path):
    """The setting that the error names works."""
    options = {"target_modules": ["experts", "lm_head"]}
    with pytest.raises(ValueError, match=NO_FUSED_LOSS):
        train(adapted(**options), tmp_path, use_liger_kernel=True, liger_kernel_config=IN_INTERPRETER)
    expected = train(adapted(**options), tmp_path)
    config = {**IN_INTERPRETER, "fused_linear_cross_entropy": False}
    found = train(adapted(**options), tmp_path, use_liger_kernel=True, liger_kernel_config=config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_trainer_of_a_classifier_is_rejected(liger, tmp_path):
    """The setting that the error names works."""

    def classifier() -> nn.Module:
        torch.manual_seed(0)
        config = tiny_config("qwen3_moe", num_labels=2)
        return adapted(AutoModelForSequenceClassification.from_config(config), task_type="SEQ_CLS")

    with pytest.raises(ValueError, match=NO_FUSED_LOSS):
        train(classifier(), tmp_path, use_liger_kernel=True, liger_kernel_config=IN_INTERPRETER)
    expected = train(classifier(), tmp_path)
    config = {**IN_INTERPRETER, "fused_linear_cross_entropy": False}
    found = train(classifier(), tmp_path, use_liger_kernel=True, liger_kernel_config=config)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
