"""Generation from a captured step: the same tokens as plain generation in every adapter state, and no leftovers.

Plain calls replace captures on machines without a GPU.
"""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from calling_backend import LateBackend
from peft import get_peft_model
from shrunken_models import shrunken_model_or_skip
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import nn
from transformers import DynamicCache, StaticCache

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training
from peft_moe_qlora.training import decode_graphs, graphs_report, layer_runner, release_graphs
from peft_moe_qlora.training.decode_graphs import DecodeRunner

NEW = 8


@pytest.fixture(autouse=True)
def steps_by_calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "device" in request.fixturenames and request.getfixturevalue("device") == "cpu":
        monkeypatch.setattr(layer_runner, "GRAPHS_BACKEND", LateBackend)


def model_with_adapters(device: str, model_type: str = "qwen3_moe", **sizes) -> nn.Module:
    model = tiny_model(model_type, device, **sizes)
    prepare_model_for_training(model, cuda_graphs=True)
    targets = ["experts", "q_proj", "v_proj"]
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules=targets))
    model.add_adapter("other", MoeQLoraConfig(r=2, target_modules=targets))
    randomize_adapter(model, std=0.3)
    return model.eval()


def tokens(model: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    return model.generate(
        input_ids=ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    )


def captured(model: nn.Module, ids: torch.Tensor, **options) -> torch.Tensor:
    return tokens(model, ids, cache_implementation="static", disable_compile=True, **options)


def replays(model: nn.Module) -> int:
    (line,) = [line for line in graphs_report(model).splitlines() if "step of decoding" in line]
    return int(line.split()[-2])


def decode_runner(model: nn.Module) -> layer_runner.DecodeRunner:
    return next(graphs for graphs in layer_runner.graphs_of(model) if isinstance(graphs, layer_runner.DecodeRunner))


@pytest.mark.parametrize("batch", [1, 3])
def test_tokens_match_plain_generation(device, batch, monkeypatch):
    """With one adapter after the other, without, and merged; padded on the left."""
    model = model_with_adapters(device)
    ids = token_ids(device, batch)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    seen, replayed = [], []
    call = decode_graphs.CapturedStep.__call__
    monkeypatch.setattr(decode_graphs.CapturedStep, "__call__", lambda *args: replayed.append(1) or call(*args))

    def check() -> None:
        expected = tokens(model, ids, attention_mask=mask)
        assert torch.equal(captured(model, ids, attention_mask=mask), expected)
        seen.append(expected.tolist())

    for adapter in ("default", "other", "default"):
        model.set_adapter(adapter)
        check()
    with model.disable_adapter():
        check()
    model.merge_adapter()
    check()
    model.unmerge_adapter()
    check()
    assert seen[0] == seen[2] == seen[5]
    assert len({str(one) for one in seen}) >= 3
    # the first token comes from the prompt; the second from a step without a graph, once for each adapter
    # state: the third generation and the last one repeat the first
    assert len(replayed) == 4 * (NEW - 2) + 2 * (NEW - 1)


@pytest.mark.parametrize("inference_mode", [False, True])
def test_reused_cache_is_captured_once(device, inference_mode, monkeypatch):
    """Its graph is dropped when adapters change between its steps, or when parameters move."""
    model = model_with_adapters(device)
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = token_ids(device, 2)
    captures = []
    init = decode_graphs.CapturedStep.__init__
    monkeypatch.setattr(decode_graphs.CapturedStep, "__init__", lambda *a: captures.append(1) or init(*a))

    def check() -> None:
        expected = tokens(model, ids)
        with torch.inference_mode(inference_mode):
            cache.reset()
            assert torch.equal(tokens(model, ids, past_key_values=cache, disable_compile=True), expected)

    for _ in range(3):
        check()
    assert len(captures) == 1
    model.set_adapter("other")
    check()
    assert len(captures) == 2
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data * 3
    check()
    assert len(captures) == 3


@pytest.mark.parametrize("reused", [False, True])
def test_beam_search_runs_without_a_graph(device, reused):
    """It replaces the tensors of the cache after each step, of which a graph has the addresses."""
    model = model_with_adapters(device)
    ids = token_ids(device, 2)
    expected = tokens(model, ids, num_beams=3)
    cache = StaticCache(config=model.config, max_cache_len=32)
    for _ in range(3):
        cache.reset()
        options = {"past_key_values": cache} if reused else {"cache_implementation": "static"}
        assert torch.equal(tokens(model, ids, num_beams=3, disable_compile=True, **options), expected)
    assert decode_graphs.REPLACED in graphs_report(model)
    # of the seven steps of a prompt, one is captured, after the very first as a warm-up
    assert f"{3 * (NEW - 2) - 1} steps" in graphs_report(model)
    assert torch.equal(captured(model, ids), tokens(model, ids))


def test_disabling_graphs_during_generation(device):
    """A manual decoding loop with one cache."""
    model = model_with_adapters(device)
    ids = token_ids(device, 2)

    @torch.no_grad()
    def logits(make_cache) -> torch.Tensor:
        cache, found = make_cache(), []
        for number, start in enumerate(range(ids.shape[1])):
            options = {"position_ids": torch.full((2, 1), start, device=device), "past_key_values": cache}
            with model.disable_adapter() if number % 4 == 3 else nullcontext():
                found.append(model(input_ids=ids[:, start : start + 1], use_cache=True, **options).logits)
        return torch.cat(found, 1)

    expected = logits(lambda: DynamicCache(config=model.config))
    found = logits(lambda: StaticCache(config=model.config, max_cache_len=32))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert replays(model) > 0


def test_generation_leaves_nothing_behind(device):
    """The cache is freed after generation, training gives the same losses, and releasing frees the graph."""
    model, plain = model_with_adapters(device), model_with_adapters(device)
    ids = token_ids(device)
    caches = []
    for one in (model, plain):
        one.train()
        for _ in range(2):
            one(input_ids=ids, labels=ids).loss.backward()
        one.eval()
    init = StaticCache.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            StaticCache, "__init__", lambda self, *a, **k: init(self, *a, **k) or caches.append(weakref.ref(self))
        )
        captured(model, ids)
    gc.collect()
    assert len(caches) == 1
    assert caches[0]() is None
    assert replays(model) == NEW - 2
    losses = []
    for one in (model, plain):
        one.train()
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append((loss.detach(), [parameter.grad for parameter in one.parameters() if parameter.requires_grad]))
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    release_graphs(model)
    assert "decoding" not in graphs_report(model)


def test_steps_that_are_not_captured(device):
    """Sliding windows count on the host, hooks would not run, and recorded outputs would not be returned."""
    model = model_with_adapters(
        device, "gpt_oss", layer_types=["full_attention", "sliding_attention"], sliding_window=8
    )
    ids = token_ids(device)
    assert torch.equal(captured(model, ids), tokens(model, ids))
    assert f"decoding without a graph, {NEW - 2} steps: StaticSlidingWindowLayer counts" in graphs_report(model)
    model = model_with_adapters(device)
    expected = tokens(model, ids)
    assert torch.equal(captured(model, ids, adapter_names=["default", "default"]), expected)
    assert "has a forward hook, which a graph does not call" in graphs_report(model)
    options = {"output_hidden_states": True, "return_dict_in_generate": True}
    hidden = [run(model, ids, **options).hidden_states for run in (tokens, captured)]
    torch.testing.assert_close(hidden[1], hidden[0], rtol=1e-4, atol=1e-4)
    assert "step of decoding, replayed" not in graphs_report(model)


def test_caches_without_keys_and_values_have_a_reason(device):
    """Those of inkling are not initialized as a whole, even after the prompt."""
    model = shrunken_model_or_skip("inkling_text", dtype=torch.float32).to(device)
    prepare_model_for_training(model, cuda_graphs=True)
    ids = token_ids(device)
    assert torch.equal(captured(model.eval(), ids), tokens(model, ids))
    assert f"decoding without a graph, {NEW - 2} steps: " in graphs_report(model)
    assert "counts tokens on the host" in graphs_report(model)


def test_caches_in_turns_are_not_captured_in_each_step(device):
    """Only one step is kept. As soon as one cache is used on its own, its steps are captured again."""
    model = model_with_adapters(device)
    ids = token_ids(device)
    caches = [StaticCache(config=model.config, max_cache_len=32) for _ in range(3)]
    made = []
    runner = decode_runner(model)

    class Counted(runner._make_backend):
        def capture(self, work):
            made.append(1)
            return super().capture(work)

    runner._make_backend = Counted

    def run(cache: StaticCache, tokens: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, past_key_values=cache, use_cache=True).logits[:, -1]

    with torch.no_grad():
        found = [[run(cache, ids)] for cache in caches]
        for number in range(10):
            for cache, logits in zip(caches[:2], found):
                logits.append(run(cache, ids[:, number : number + 1]))
        assert len(made) == decode_graphs.MOST_UNUSED
        torch.testing.assert_close(found[0], found[1])
        for number in range(10):
            found[2].append(run(caches[2], ids[:, number : number + 1]))
    torch.testing.assert_close(found[0], found[2])
    assert "decoding without a graph, 16 steps: 4 captured steps were not used again" in graphs_report(model)
    assert replays(model) == 9


def test_compiled_by_transformers(device):
    """Traced as without graphs, in one piece."""
    ids = token_ids(device)
    model = tiny_model(device=device)
    prepare_model_for_training(model, use_gradient_checkpointing=False, cuda_graphs=True)
    model.eval()
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    found = []
    for forward in (model.forward, compiled):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            position = torch.tensor([[ids.shape[1]]], device=device).expand(len(ids), 1)
            options = {"past_key_values": cache, "use_cache": True, "position_ids": position}
            found.append(forward(input_ids=ids[:, :1], **options).logits)
    torch.testing.assert_close(*found)


def test_failed_capture_falls_back_to_plain_generation(device, monkeypatch):
    """It is tried once for each prompt, and the tokens are those of plain generation."""
    model = model_with_adapters(device)
    ids = token_ids(device)
    tried = []

    def fail(*_) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted")

    runner = decode_runner(model)
    monkeypatch.setattr(runner, "_make_backend", type("Failing", (runner._make_backend,), {"capture": fail}))
    expected = tokens(model, ids)
    for _ in range(2):
        assert torch.equal(captured(model, ids), expected)
    assert len(tried) == 2
    assert f"{2 * NEW - 3} steps: the capture failed: operation not permitted" in graphs_report(model)


def model_in_bf16(device: str) -> tuple[nn.Module, list[nn.Parameter]]:
    """A captured model whose fp32 factors of linear layers are cast to bf16 in each product, and its factors."""
    model = tiny_model(device=device, dtype=torch.bfloat16)
    prepare_model_for_training(model, cuda_graphs=True)
    model = get_peft_model(model, MoeQLoraConfig(r=4, target_modules=["experts", "q_proj", "o_proj"])).eval()
    randomize_adapter(model, std=0.3)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in factors} == {torch.float32}
    return model, factors


def test_factors_are_cast_once_per_prompt(device):
    """A captured step reads 16-bit copies of fp32 factors, which follow in-place updates between generations."""
    model, factors = model_in_bf16(device)
    cache = StaticCache(config=model.config, max_cache_len=32)
    ids = token_ids(device, 2)

    def logits(**options) -> torch.Tensor:
        cache.reset()
        options = {"return_dict_in_generate": True, "output_logits": True, "past_key_values": cache, **options}
        return torch.stack(tokens(model, ids, disable_compile=True, **options).logits)

    logits(output_hidden_states=True)  # the cache is not created in inference mode
    found = []
    for scale in (1.0, -2.0, 0.5):
        with torch.no_grad():
            for parameter in factors:
                parameter.mul_(scale)
        with torch.inference_mode(scale == 1.0):
            found.append(logits())
        # steps with recorded outputs are not captured
        assert torch.equal(found[-1], logits(output_hidden_states=True))
    assert replays(model) == 3 * (NEW - 1) - 1
    assert not torch.equal(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize("changed_at", [2, 6], ids=["before the capture", "after it"])
def test_factors_may_change_between_steps(device, changed_at):
    """Without a prompt in between, as when single tokens continue a cache after `load_adapter`."""
    model, factors = model_in_bf16(device)
    ids = token_ids(device, 2)

    def logits(**options) -> torch.Tensor:
        cache, found = StaticCache(config=model.config, max_cache_len=32), []
        for start in range(ids.shape[1]):
            if start == changed_at:
                for parameter in factors:
                    parameter.mul_(-2.0)
            options |= {"position_ids": torch.full((2, 1), start, device=device), "past_key_values": cache}
            found.append(model(input_ids=ids[:, start : start + 1], use_cache=True, **options).logits)
        for parameter in factors:
            parameter.mul_(-0.5)
        return torch.cat(found, 1)

    expected = logits(output_hidden_states=True)  # steps with recorded outputs are not captured
    assert torch.equal(logits(), expected)
    assert replays(model) > 6


def test_generation_in_two_threads(device, monkeypatch):
    """Each thread replays the step of its own cache."""
    model = model_with_adapters(device)
    ids = token_ids(device, 2)
    expected = [tokens(model, row[None]) for row in ids]
    captured(model, ids[:1])  # warms up
    capture = DecodeRunner._capture

    def slow(*args) -> None:
        capture(*args)
        time.sleep(0.01)  # another thread may run here

    monkeypatch.setattr(DecodeRunner, "_capture", slow)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda number: captured(model, ids[number : number + 1]), range(2)))
    assert all(map(torch.equal, found, expected))


def test_prompts_of_one_token(device, monkeypatch):
    """With a cache that is used again, they look like steps; parameters may have moved since."""
    model = model_with_adapters(device)
    captures = []
    init = decode_graphs.CapturedStep.__init__
    monkeypatch.setattr(decode_graphs.CapturedStep, "__init__", lambda *a: captures.append(1) or init(*a))
    ids = token_ids(device, 2)
    cache = StaticCache(config=model.config, max_cache_len=32)
    tokens(model, ids, past_key_values=cache, disable_compile=True)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for count in (1, 2):
        cache.reset()
        found.append(tokens(model, ids[:, :1], past_key_values=cache, disable_compile=True))
        assert len(captures) == count
        for parameter in factors:
            parameter.data = parameter.data * -2
    for one in reversed(found):  # a generation without a graph would count as a prompt
        for parameter in factors:
            parameter.data = parameter.data / -2
        assert torch.equal(one, tokens(model, ids[:, :1]))
    assert not torch.equal(*found)


def test_casts_of_autocast_are_captured(device, monkeypatch):
    """A graph must not read those that autocast caches, which are freed with its context."""
    model, _ = model_in_bf16(device)
    norm, seen = type(model.get_decoder().norm), []
    forward = norm.forward
    monkeypatch.setattr(
        norm, "forward", lambda *args: seen.append(torch.is_autocast_cache_enabled()) or forward(*args)
    )
    with torch.autocast(device, torch.bfloat16):
        captured(model, token_ids(device))
        assert torch.is_autocast_cache_enabled()
    assert seen[0] is True
    assert seen[-1] is False


def test_tuples_are_returned_without_a_graph(device):
    model = model_with_adapters(device)
    cache, ids = StaticCache(config=model.config, max_cache_len=32), token_ids(device)
    with torch.no_grad():
        for number in range(4):
            found = model.get_decoder()(
                input_ids=ids[:, number : number + 1], past_key_values=cache, return_dict=False
            )
            assert isinstance(found, tuple)
    assert "decoding" not in graphs_report(model)


def test_offloaded_caches_are_not_captured():
    """They replace the tensors of the cache in each step."""
    cache = SimpleNamespace(offloading=True, layers=[])
    assert decode_graphs._why_not(nn.Module(), cache) == "the cache is offloaded to the CPU"


@torch.no_grad()
def test_replaced_weights_are_noticed_between_steps(device, monkeypatch):
    """Merging replaces 4-bit weights, and unmerging restores the rest of the state."""
    model = model_with_adapters(device)
    cache, ids = StaticCache(config=model.config, max_cache_len=32), token_ids(device)
    captures = []
    init = decode_graphs.CapturedStep.__init__
    monkeypatch.setattr(decode_graphs.CapturedStep, "__init__", lambda *a: captures.append(1) or init(*a))
    layer = next(module for name, module in model.named_modules() if name.endswith("q_proj")).get_base_layer()
    for number in range(6):
        if number == 4:
            layer.weight = nn.Parameter(layer.weight * 2)
        model(input_ids=ids[:, number : number + 1], past_key_values=cache, use_cache=True)
        assert len(captures) == (0, 0, 1, 1, 2, 2)[number]
