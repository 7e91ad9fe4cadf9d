"""For every model type with routed experts: layers adapted by "all-linear" get gradients, train and merge exactly."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers.models
from packaging.version import Version
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from shrunken_models import MODEL_TYPES, shrunken_model, shrunken_model_or_skip
from tiny_models import randomize_adapter, token_ids
from torch import nn

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.unadaptable import BYPASSED, UNADAPTABLE

# configuration types of classes that belong to other types
OTHERS = ("sarvam_mla", "sarvam_moe")

# merging is rejected: its encoder and decoder share weights
TIED = ("diffusion_gemma",)


def outputs(model: nn.Module, model_type: str) -> torch.Tensor:
    """Logits, or hidden states if the type has no head."""
    inputs = {"input_ids": token_ids()}
    if model_type == "ernie4_5_vl_moe":
        # it has separate experts for image tokens
        inputs["moe_mm_token_type_ids"] = (inputs["input_ids"] % 2).int()
    if model_type == "diffusion_gemma":
        vocab_size = model.get_output_embeddings().out_features
        inputs["self_conditioning_logits"] = torch.randn(*inputs["input_ids"].shape, vocab_size)
        inputs["decoder_input_ids"] = inputs["input_ids"]
    if model_type == "llama4":
        # with towers its output construction fails (transformers 5.24)
        model = model.get_decoder()
    return model(**inputs, use_cache=False, return_dict=False)[0]


def factors(model: PeftModel) -> Iterator[tuple[str, nn.Parameter]]:
    """`(path in the base model, factor)` of the language model; towers get no gradient from a text.

    Nor do the layers of DiffusionGemma's encoder after its last keys and values.
    """
    base = model.base_model.model
    reached = set(base.get_decoder().modules())
    for path, layer in base.named_modules():
        if isinstance(layer, BaseTunerLayer) and layer in reached:
            for name, parameter in layer.named_parameters():
                if "lora_" in name:
                    yield f"{path}.{name}", parameter


@torch.no_grad()
def without_zeros(model: nn.Module) -> nn.Module:
    """Scales that a class initializes to 0 would hide the layers before them."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, *OTHERS])
def test_adapted_layers_train_and_merge(model_type):
    model = without_zeros(shrunken_model_or_skip(model_type, dtype=torch.float32))
    model = get_peft_model(model, MoeQLoraConfig(r=2, target_modules="all-linear", quant_type=None))
    randomize_adapter(model)
    outputs(model.train(), model_type).square().mean().backward()
    assert [name for name, factor in factors(model) if factor.grad is None] == []
    before = {name: factor.detach().clone() for name, factor in factors(model)}
    assert any(".experts." in name for name in before)
    assert any(name.endswith(".lora_A.default.weight") for name in before)
    torch.optim.AdamW([factor for _, factor in factors(model)], lr=1e-2, weight_decay=0).step()
    assert [name for name, factor in factors(model) if torch.equal(factor, before[name])] == []
    if model_type in TIED:
        return
    with torch.no_grad():
        live = outputs(model.eval(), model_type)
        with model.disable_adapter():
            delta = live - outputs(model, model_type)
        merged = outputs(model.merge_and_unload(dtype=torch.float32), model_type)
    assert (merged - live).norm() <= 1e-3 * delta.norm()


def experts_sources() -> list[ast.Module]:
    """The modeling files that have routed experts."""
    sources = [file.read_text() for file in Path(transformers.models.__file__).parent.glob("*/modeling_*.py")]
    marks = ("@use_experts_implementation", "class Llama4TextExperts")
    return [ast.parse(source) for source in sources if any(mark in source for mark in marks)]


def test_layers_whose_weights_are_read_directly():
    """Gradients on a CPU do not reveal weights that only GPU kernels read."""
    found, classes = {}, set()
    for tree in experts_sources():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                classes.add(node.name)
                read = read_directly(node) & assigned_layers(node)
                if read:
                    found[node.name] = read
    known = {name: set(layers) for name, layers in UNADAPTABLE[BYPASSED].items() if name in classes}
    assert found == known


def assigned_layers(node: ast.ClassDef) -> set[str]:
    """Names of the linear and convolutional layers of a class."""
    return {
        target.attr
        for assignment in ast.walk(node)
        if isinstance(assignment, ast.Assign) and re.match(r"nn\.(Linear|Conv\dd)\(", ast.unparse(assignment.value))
        for target in assignment.targets
        if isinstance(target, ast.Attribute)
    }


def read_directly(node: ast.ClassDef) -> set[str]:
    """Names whose `weight` is read for more than its dtype."""
    of_weights = {
        id(attribute.value)
        for attribute in ast.walk(node)
        if isinstance(attribute, ast.Attribute) and attribute.attr in ("dtype", "device", "shape")
    }
    return {
        attribute.value.attr
        for attribute in ast.walk(node)
        if isinstance(attribute, ast.Attribute) and attribute.attr == "weight" and id(attribute) not in of_weights
        if isinstance(attribute.value, ast.Attribute)
    }


# towers, speech decoders (no forward trains them), and classes that transformers itself does not use
NOT_BUILT = re.compile(
    r"\w*(Vision|Audio)\w*|Qwen3OmniMoe(Talker|ConvNeXt|Code2Wav|MLP)\w*|Gemma4MultimodalEmbedder|FlexOlmoMLP|OlmoeMLP|"
    r"DiffusionGemmaClippableLinear"
)


def test_all_classes_with_linear_layers_are_tested():
    """A new class needs a review: LoRA may not be able to train some of its layers."""
    if Version(transformers.__version__) < Version("5.24"):
        pytest.skip("earlier versions of transformers lack some types")
    built = {
        cls.__name__
        for model_type in MODEL_TYPES
        for module in shrunken_model(model_type, "meta").modules()
        for cls in type(module).__mro__
    }
    missing = [
        node.name
        for tree in experts_sources()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and "nn.Linear(" in ast.unparse(node)
        and not any("PreTrainedModel" in ast.unparse(base) for base in node.bases)
        and node.name not in built
        and not NOT_BUILT.fullmatch(node.name)
    ]
    assert missing == []
