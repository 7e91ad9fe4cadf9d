"""Adapted layers without gradient in the first backward are reported once, and no hooks remain."""

from __future__ import annotations

import copy
import io
import re
import warnings

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from shrunken_models import shrunken_model
from tiny_models import tiny_model, token_ids
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.training.gradient_watch import GradientWatch


class Ignored(nn.Module):
    """Computes the same as its layer, without calling it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden_states, self.layer.weight)


def with_ignored_layers(layers=(0, 1), **options) -> nn.Module:
    """A model in training whose q_proj has an adapter without effect in some layers."""
    model = tiny_model()
    for index in layers:
        attention = model.model.layers[index].self_attn
        attention.q_proj = Ignored(attention.q_proj)
    config = MoeQLoraConfig(r=2, target_modules="all-linear", quant_type=None, **options)
    return get_peft_model(model, config).train()


def steps(model: nn.Module, number: int = 3) -> list[str]:
    """The warnings of a number of forwards and backwards."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(number):
            model(input_ids=token_ids(), labels=token_ids()).loss.backward()
            model.zero_grad()
    return [str(warning.message) for warning in caught if "no gradient" in str(warning.message)]


def hooks(model: nn.Module) -> int:
    of_modules = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    of_parameters = [len(parameter._post_accumulate_grad_hooks or ()) for parameter in model.parameters()]
    return sum(isinstance(hook, GradientWatch) for hook in of_modules) + sum(of_parameters)


@pytest.mark.parametrize(
    ("layers", "named", "pattern"),
    [
        ((0, 1), "model.layers.*.self_attn.q_proj", r"(model\.layers\.\d+\.self_attn\.q_proj)(\..*)?"),
        ((1,), "model.layers.1.self_attn.q_proj", r"(model\.layers\.1\.self_attn\.q_proj)(\..*)?"),
    ],
)
def test_layers_without_gradient_are_reported_once(layers, named, pattern):
    model = with_ignored_layers(layers)
    (message,) = steps(model)
    assert f"first backward: {named}." in message
    assert f'exclude_modules=r"{pattern}"' in message
    assert hooks(model) == 0
    excluding = with_ignored_layers(layers, exclude_modules=re.search(r'exclude_modules=r"(.*)"', message)[1])
    adapted = [path for path, module in excluding.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) == 12 - len(layers)
    assert steps(excluding) == []


def test_unreached_submodules_are_reported_as_a_whole():
    config = MoeQLoraConfig(r=2, target_modules="all-linear", quant_type=None)
    model = get_peft_model(shrunken_model("qwen3_vl_moe", dtype=torch.float32), config).train()
    (message,) = steps(model)
    assert "first backward: model.visual." in message


def test_watch_lasts_until_the_first_gradients():
    model = with_ignored_layers()
    with torch.no_grad():
        model(input_ids=token_ids())
    assert hooks(model) == 1
    for _ in range(3):
        model(input_ids=token_ids())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=token_ids()).logits.sum().backward()
    model.eval()
    model(input_ids=token_ids())
    model.train()
    assert len(steps(model, 1)) == 1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_no_warning_if_all_layers_get_gradients(use_reentrant):
    """With checkpointing, accumulated gradients, experts without tokens, and a frozen adapter."""
    config = MoeQLoraConfig(r=2, target_modules="all-linear", quant_type=None)
    model = get_peft_model(tiny_model(num_experts=64), config)
    model.add_adapter("frozen", MoeQLoraConfig(r=2, target_modules=["experts"], quant_type=None))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert steps(model.train()) == []
    assert hooks(model) == 0


@pytest.mark.parametrize("inference_mode", [True, False])
def test_untrained_adapter_is_not_watched(inference_mode):
    model = get_peft_model(tiny_model(), MoeQLoraConfig(r=2, quant_type=None, inference_mode=inference_mode))
    assert hooks(model) == (0 if inference_mode else 1)
    model.requires_grad_(False)
    model.train()(input_ids=token_ids())
    assert hooks(model) == 0


@pytest.mark.parametrize("when", ["before the first forward", "before the first backward", "after it"])
@pytest.mark.parametrize("through", ["deepcopy", "pickle"])
def test_copies_are_watched_separately(when, through):
    model = with_ignored_layers()
    if when != "before the first forward":
        loss = model(input_ids=token_ids()).logits.sum()
    if when == "after it":
        loss.backward()
    if through == "deepcopy":
        # an output that is not a leaf can't be copied
        loss = None
        again = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert len(steps(again)) == 1
    assert hooks(again) == 0
    assert len(steps(model)) == 1
    assert hooks(model) == 0


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2 of experts alone"])
@pytest.mark.parametrize("layers", [(), (1,)], ids=["all is well", "one is ignored"])
def test_sharded_and_replicated_models(kind, layers, process_group):
    model = trained = with_ignored_layers(layers)
    mesh = init_device_mesh("cpu", (1,))
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    else:
        for layer in model.base_model.model.model.layers:
            fully_shard(layer.mlp.experts if "alone" in kind else layer, mesh=mesh)
        if "alone" not in kind:
            fully_shard(model.base_model.model, mesh=mesh)
    assert len(steps(trained)) == len(layers)
    assert hooks(model) == 0
