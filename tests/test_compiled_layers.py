"""Compiled decoder layers: results equal those of plain layers, and nothing is recompiled unnecessarily."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from transformers import DynamicCache

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.experts import quantized
from peft_moe_qlora.ops import dispatch
from peft_moe_qlora.training.compiled import compiled_forward

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CPP_COMPILER = inductor.cpp.cxx[-1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Test files of the kernels."""


class Backend:
    """Counts compilations."""

    def __init__(self, name: str) -> None:
        self.compile = torch._dynamo.lookup_backend(name)
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.count += 1
        return self.compile(graph, inputs)

    def taken(self) -> int:
        count, self.count = self.count, 0
        return count


@pytest.fixture(autouse=True)
def no_graph_breaks() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    assert not counters["graph_break"]


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernels in Triton's interpreter."""
    pytest.importorskip("triton", reason="the kernels need Triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(quantized, "why_no_kernels", lambda *_: None)
        monkeypatch.setattr(dispatch, "why_no_kernels", lambda *_: None)


def quantize_attention(model: nn.Module) -> None:
    """Replaces attention layers by bitsandbytes' 4-bit layers."""
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear) and name in ATTENTION:
                packed = Linear4bit(
                    layer.in_features,
                    layer.out_features,
                    layer.bias is not None,
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                )
                packed.load_state_dict(layer.state_dict())
                setattr(parent, name, packed.to("cpu").requires_grad_(False))
    model.is_loaded_in_4bit = True


def adapted(model_type: str = "qwen3_moe", packed: bool = False, dropout: float = 0.0, **sizes) -> PeftModel:
    model = tiny_model(model_type, **sizes)
    if packed:
        quantize_attention(model)
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout))
    randomize_adapter(model)
    return model.train()


def layers_of(model: PeftModel) -> nn.ModuleList:
    return model.get_submodule("base_model.model.model.layers")


def compile_layers(model: PeftModel, backend: Backend) -> None:
    for layer in layers_of(model):
        layer.forward = compiled_forward(layer, backend)


def step(model: PeftModel, ids: torch.Tensor, **kwargs) -> list[torch.Tensor]:
    """Loss and all gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False, **kwargs).loss
    loss.backward()
    return [loss.detach(), *[parameter.grad for parameter in model.parameters() if parameter.requires_grad]]


@torch.no_grad()
def loss_of(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor], limit: float = 1e-5) -> None:
    assert all(tensor.any() for tensor in expected)
    for tensor, other in zip(found, expected, strict=True):
        assert (tensor - other).norm() <= limit * other.norm()


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_losses_and_gradients_match_plain_layers(model_type):
    model = adapted(model_type, packed=model_type == "qwen3_moe")
    expected = step(model, token_ids())
    compile_layers(model, Backend("aot_eager"))
    assert_same(step(model, token_ids()), expected)


def test_router_logits_after_a_step_without():
    """transformers records them by hooks, which it adds when they are first asked for; also in another model."""
    backend = Backend("aot_eager")
    for first in (False, True):
        model = adapted()
        asked = [first, not first, first]
        expected = [step(model, token_ids(), output_router_logits=asks) for asks in asked]
        model = adapted()
        compile_layers(model, backend)
        for one, asks in zip(expected, asked):
            assert_same(step(model, token_ids(), output_router_logits=asks), one)
    for reason in list(counters["graph_break"]):
        if "ContextVar" in reason:  # in the hooks; torch 2.11 does not trace it
            del counters["graph_break"][reason]


def test_fused_experts_are_one_operator(fused):
    model, ids = adapted().to(DEVICE), token_ids(DEVICE, length=5)
    expected = step(model, ids)
    backend = Backend("aot_eager")
    compile_layers(model, backend)
    assert_same(step(model, ids), expected)
    assert backend.taken() == 2  # the first layer's input needs no gradient


def test_dropout_is_compiled_too(fused, monkeypatch):
    """Adapters with dropout do not use the fused layer, but run projection by projection."""
    monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: x * 0.5)
    model, ids = adapted(dropout=0.5).to(DEVICE), token_ids(DEVICE, length=5)
    expected = step(model, ids)
    compile_layers(model, Backend("aot_eager"))
    assert_same(step(model, ids), expected)


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks_added_after_the_first_step_run(register):
    """Also those of modules that were added later; a layer with hooks runs uncompiled until they are removed."""
    model, backend = adapted(), Backend("aot_eager")
    model.get_base_model().enable_input_require_grads()
    expected = step(model, token_ids())
    compile_layers(model, backend)
    step(model, token_ids())
    assert backend.taken() == 1
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules="all-linear"))
    attention = layers_of(model)[0].self_attn
    calls = []
    handles = [
        getattr(module, register)(lambda *_, number=number: calls.append(number))
        for number, module in enumerate((attention, attention.q_proj.lora_A["default"]))
    ]
    with pytest.warns(UserWarning, match="Qwen3MoeDecoderLayer runs uncompiled: a module in it has a .*ward hook"):
        assert_same(step(model, token_ids()), expected)
    assert sorted(calls) == [0, 1]
    for handle in handles:
        handle.remove()
    assert_same(step(model, token_ids()), expected)
    assert sorted(calls) == [0, 1]


@pytest.mark.skipif(shutil.which(CPP_COMPILER) is None, reason=f"torch.compile needs {CPP_COMPILER} on a CPU")
def test_inductor():
    model = adapted(num_hidden_layers=1)
    expected = step(model, token_ids())
    compile_layers(model, Backend("inductor"))
    assert_same(step(model, token_ids()), expected)


def test_compilations_do_not_grow_with_layers_or_lengths():
    model, backend = adapted(num_hidden_layers=5), Backend("aot_eager")
    model.get_base_model().enable_input_require_grads()
    compile_layers(model, backend)
    step(model, token_ids(length=9))
    assert backend.taken() == 1
    step(model, token_ids(length=9))
    assert backend.taken() == 0
    step(model, token_ids(length=12))  # from here on compiled for dynamic lengths
    assert backend.taken() == 1
    for length in (5, 9, 17):
        step(model, token_ids(length=length))
    assert backend.taken() == 0
    loss_of(model, token_ids(length=12))
    loss_of(model, token_ids(length=17))
    assert backend.taken() == 1
    model.eval()
    loss_of(model, token_ids(length=12))
    assert backend.taken() == 1
    model.train()
    step(model, token_ids(length=9))
    loss_of(model, token_ids(length=9))
    assert backend.taken() == 0
    other = adapted(num_hidden_layers=2)
    other.get_base_model().enable_input_require_grads()
    compile_layers(other, backend)
    step(other, token_ids(length=9))
    assert backend.taken() == 0


def test_adapters_on_and_off():
    model, backend = adapted().eval(), Backend("aot_eager")
    ids = token_ids()
    with model.disable_adapter():
        without = loss_of(model, ids)
    expected = loss_of(model, ids)
    compile_layers(model, backend)
    for _ in range(2):
        torch.testing.assert_close(loss_of(model, ids), expected)
        with model.disable_adapter():
            torch.testing.assert_close(loss_of(model, ids), without)
    assert backend.taken() == 2


def test_masks_are_inputs():
    model, backend = adapted(), Backend("aot_eager")
    ids = token_ids()
    masks = [torch.ones_like(ids) for _ in range(2)]
    masks[0][0, :3] = masks[1][1, :5] = 0
    expected = [step(model, ids, attention_mask=mask) for mask in masks]
    compile_layers(model, backend)
    assert_same(step(model, ids, attention_mask=masks[0]), expected[0])
    backend.taken()
    assert_same(step(model, ids, attention_mask=masks[1]), expected[1])
    assert backend.taken() == 0


@pytest.mark.parametrize("ends", ["merge_and_unload", "unload", "delete_adapter"])
def test_removed_modules_are_freed(ends):
    """The compiled code keeps neither factors nor quantized experts."""
    model = adapted()
    compile_layers(model, "aot_eager")
    step(model, token_ids())
    names = (".lora_", "experts") if ends == "merge_and_unload" else (".lora_",)
    removed = [weakref.ref(one) for name, one in model.named_parameters() if any(part in name for part in names)]
    if ends == "delete_adapter":
        model.add_adapter("other", MoeQLoraConfig(r=2, target_modules="all-linear"))
        model.delete_adapter("default")
    elif ends == "unload":
        model = model.unload()
    else:
        model = model.merge_and_unload(dtype=torch.float32, progressbar=False)
    gc.collect()
    assert removed
    assert not any(one() is not None for one in removed)


def test_call_with_a_cache_is_not_compiled():
    model, backend = adapted().eval(), Backend("aot_eager")
    compile_layers(model, backend)
    with torch.no_grad():
        model(input_ids=token_ids(), past_key_values=DynamicCache(config=model.config))
    assert backend.taken() == 0


def test_recompile_limit_falls_back_to_eager():
    """torch stops compiling code that it recompiled too often; that layer then runs uncompiled."""
    model, backend = adapted(num_hidden_layers=1), Backend("eager")
    compile_layers(model, backend)
    for number in range(10):
        for layer in model.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", 1.0 + number)
        found = step(model, token_ids())
    for layer in layers_of(model):
        del layer.forward
    assert_same(found, step(model, token_ids()))
    torch._dynamo.reset()
    counters.clear()  # the fallback counts as a graph break
