"""Generation between training steps with transformers' static cache and a compiled decoding step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig, CompileConfig, StaticCache
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from peft_moe_qlora import MoeQLoraConfig
from peft_moe_qlora.experts import quantized
from peft_moe_qlora.layer import BASE

CONFIG = {"r": 4, "target_modules": "all-linear"}
NEW = 5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def model() -> PeftModel:
    return adapted()


def adapted() -> PeftModel:
    model = get_peft_model(tiny_model(eos_token_id=None), MoeQLoraConfig(**CONFIG))
    randomize_adapter(model)
    model.add_adapter("other", MoeQLoraConfig(**CONFIG))
    randomize_adapter(model, seed=5)
    return model.to(DEVICE).eval()


class Decoding:
    """Generates with a compiled step, and counts compilations and runs of the compiled code."""

    def __init__(self) -> None:
        self.compilations = self.runs = 0
        # a graph break is an error
        self.config = CompileConfig(backend=self._compile, mode=None, fullgraph=True)
        self.config._compile_all_devices = True

    def _compile(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.compilations += 1
        compiled = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

        def run(*arguments: Any) -> Any:
            self.runs += 1
            return compiled(*arguments)

        return run

    def __deepcopy__(self, memo: dict) -> Decoding:
        return self  # transformers copies the configuration for each call

    def generate(self, model: PeftModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        compiled = {"cache_implementation": "static", "compile_config": self.config}
        runs = self.runs
        found = generate(model, ids, **compiled, **kwargs)
        assert self.runs == runs + NEW - 1  # the first token comes from the prompt, which is not compiled
        return found

    def taken(self) -> int:
        compilations, self.compilations = self.compilations, 0
        return compilations


@pytest.fixture
def decoding() -> Decoding:
    return Decoding()


def generate(model: PeftModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return model.generate(input_ids=ids, **options, **kwargs)


def assert_same_tokens(decoding: Decoding, model: PeftModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    expected = generate(model, ids, **kwargs)
    assert torch.equal(decoding.generate(model, ids, **kwargs), expected)
    return expected


def test_step_is_not_recompiled(model, decoding):
    assert_same_tokens(decoding, model, token_ids(DEVICE))
    assert decoding.taken() == 1
    assert_same_tokens(decoding, model, token_ids(DEVICE).flip(0))
    mask = torch.ones_like(token_ids(DEVICE))
    mask[0, :4] = 0
    assert_same_tokens(decoding, model, token_ids(DEVICE), attention_mask=mask)  # padded on the left
    assert_same_tokens(decoding, model, token_ids(DEVICE, length=9))  # shorter: the cache is as long as before
    assert decoding.taken() == 0


def test_fused_layer_uses_gemv(model, decoding, monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(quantized, "why_no_kernels", lambda *_: None)
    assert_same_tokens(decoding, model, token_ids(DEVICE, length=3))
    assert decoding.taken() == 1


def test_adapter_disabled_switched_and_merged(model, decoding):
    ids = token_ids(DEVICE)
    on = assert_same_tokens(decoding, model, ids)
    with model.disable_adapter():
        off = assert_same_tokens(decoding, model, ids)
    model.set_adapter("other")
    other = assert_same_tokens(decoding, model, ids)
    model.set_adapter("default")
    model.merge_adapter()
    assert_same_tokens(decoding, model, ids)
    model.unmerge_adapter()
    assert torch.equal(assert_same_tokens(decoding, model, ids), on)
    assert len({tuple(tokens.flatten().tolist()) for tokens in (on, off, other)}) == 3


def test_several_adapters_in_a_batch(model, decoding):
    """A compiled step ignores hooks; with the step of another batch, tokens came from the wrong adapter."""
    ids = token_ids(DEVICE, batch=1).repeat(3, 1)
    alone = assert_same_tokens(decoding, model, ids)
    mixed = assert_same_tokens(decoding, model, ids, adapter_names=["default", "other", BASE])
    assert len({tuple(tokens.tolist()) for tokens in mixed}) == 3
    assert_same_tokens(decoding, model, ids, adapter_names=["other", BASE, "other"])
    decoding.taken()
    assert torch.equal(assert_same_tokens(decoding, model, ids), alone)
    assert torch.equal(assert_same_tokens(decoding, model, ids, adapter_names=["default", "other", BASE]), mixed)
    assert decoding.taken() == 0


def test_generation_does_not_affect_training(decoding):
    ids, losses = token_ids(DEVICE), []
    for generates in (False, True):
        model = adapted().train()
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
        losses.append([])
        for _ in range(3):
            if generates:
                model.eval()
                assert_same_tokens(decoding, model, ids)  # with the current factors
                model.train()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]
    assert decoding.taken() == 1


def test_cache_is_released(model, decoding):
    decoding.generate(model, token_ids(DEVICE))
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, StaticCache)]


class _HostCopies(TorchDispatchMode):
    """Counts synchronizations with the device and copies to it, which cannot be captured in a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "lift_fresh", "aten.equal")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


def watch(module: nn.Module) -> list[list[str]]:
    """The operations found in each later forward of a module."""
    modes: list[_HostCopies] = []
    found: list[list[str]] = []

    def enter(*_: Any) -> None:
        modes.append(_HostCopies())
        modes[-1].__enter__()

    def leave(*_: Any) -> None:
        mode = modes.pop()
        mode.__exit__(None, None, None)
        found.append(mode.found)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)
    return found


def test_step_neither_synchronizes_nor_copies(model, monkeypatch):
    pytest.importorskip("triton", reason="the kernels need Triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(quantized, "why_no_kernels", lambda *_: None)
    found = watch(model.get_base_model())
    generate(model, token_ids(DEVICE, length=3), cache_implementation="static", disable_compile=True)
    assert found[1:] == [[]] * (NEW - 1)


def test_adapter_names_are_copied_once(model):
    experts = model.get_submodule("base_model.model.model.layers.1.mlp.experts")
    found = watch(experts)
    generate(model, token_ids(DEVICE), adapter_names=["default", "other"])
    # the loop over experts, which a GPU does not run, needs the number of rows of each
    assert [[name for name in names if "lift_fresh" in name] for names in found[1:]] == [[]] * (NEW - 1)


@pytest.mark.parametrize("has_packed_linear", [False, True])
def test_transformers_may_compile(has_packed_linear):
    """`generate` asks the quantizer, whose default is no."""
    model = tiny_model()
    if has_packed_linear:
        model.hf_quantizer = Bnb4BitHfQuantizer(BitsAndBytesConfig(load_in_4bit=True))
    assert get_peft_model(model, MoeQLoraConfig(r=2)).get_base_model().hf_quantizer.is_compileable
