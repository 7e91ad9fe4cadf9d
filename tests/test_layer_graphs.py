"""Which calls of decoder layers are captured, which graph a call uses, and what the report says.

Plain calls replace captures on machines without a GPU; buffers, keys and fallbacks are the same.
"""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from calling_backend import CallingBackend
from peft import get_peft_model
from prepared_models import POLICIES, batch, train, trained_model
from tiny_models import randomize_adapter, tiny_model
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training
from peft_moe_qlora.ops import kept_activations
from peft_moe_qlora.training import graphs_report, layer_graphs, layer_runner, release_graphs
from peft_moe_qlora.training.cuda_graphs import CudaBackend
from peft_moe_qlora.training.layer_runner import LayerRunner, graphs_of


@pytest.mark.gpu
def test_experts_computed_one_by_one_are_not_captured():
    model = trained_model("cuda", lora_dropout=0.3, cuda_graphs=True)
    for _ in range(3):
        model(**batch("cuda", 12)).loss.backward()
    assert "4 times: its experts are computed one at a time: torch's grouped_mm requires" in graphs_report(model)


@pytest.mark.gpu
def test_failed_capture_restores_the_generator():
    backend = CudaBackend(torch.device("cuda", 0))

    def work() -> None:
        torch.nn.functional.dropout(torch.ones(8, device="cuda")).sum().item()

    torch.manual_seed(3)
    expected = torch.rand(4, device="cuda")
    torch.manual_seed(3)
    with pytest.raises(RuntimeError):
        backend.capture(work)
    assert torch.equal(torch.rand(4, device="cuda"), expected)


@pytest.mark.gpu
def test_failed_capture_frees_memory_for_the_next_one():
    backend = CudaBackend(torch.device("cuda", 0))

    def work() -> None:
        torch.empty(2**60, dtype=torch.uint8, device="cuda")

    with pytest.raises(torch.OutOfMemoryError):
        backend.capture(work)
    total = torch.zeros((), device="cuda")
    graph = backend.capture(lambda: total.add_(torch.ones(8, device="cuda").sum()))
    graph.replay()
    assert total == 8


class OutOfMemory(CallingBackend):
    """Has no memory for the third and later captures."""

    def capture(self, work):
        if self.captures == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().capture(work)


class TooSmall(CallingBackend):
    """Has memory for captures, but not for the steps in addition to them."""

    def why_no_room(self):
        return "there are 24.00 GiB"


@pytest.mark.parametrize("keep", POLICIES)
@pytest.mark.parametrize(
    ("backend", "why", "layers"),
    [(OutOfMemory, "a capture ran out of memory", 5), (TooSmall, "there are 24.00 GiB", 6)],
)
def test_graphs_that_do_not_fit_are_freed(monkeypatch, keep, backend, why, layers):
    batches = [batch("cpu", 12, seed) for seed in range(4)]
    expected = train(trained_model("cpu", use_gradient_checkpointing=keep), batches)
    monkeypatch.setattr(layer_runner, "GRAPHS_BACKEND", backend)
    model = trained_model("cpu", use_gradient_checkpointing=keep, cuda_graphs=True)
    torch.testing.assert_close(train(model, batches), expected, rtol=0, atol=0)
    report = graphs_report(model)
    assert "0 graphs of layers" in report
    # two layers in four steps, the first of which is only a warm-up
    assert f"without a graph, {layers} times: the GPU has too little memory for graphs ({why})" in report
    release_graphs(model)
    assert "too little memory" not in graphs_report(model)


@pytest.mark.gpu
def test_memory_for_steps_beside_graphs():
    torch.cuda.empty_cache()
    backend = CudaBackend(torch.device("cuda", 0))
    assert backend.why_no_room() is None
    backend.capture(lambda: torch.zeros(2**26, device="cuda"))
    assert 2**28 <= backend.pool_bytes < 2**28 + 2**23
    allowed = (torch.cuda.memory_reserved() - 2**20) / torch.cuda.get_device_properties(0).total_memory
    before = torch.cuda.get_per_process_memory_fraction()
    try:
        torch.cuda.set_per_process_memory_fraction(allowed)
        backend._plain_peak = torch.cuda.memory_reserved()
        assert "graphs need 0.25 GiB more" in backend.why_no_room()
    finally:
        torch.cuda.set_per_process_memory_fraction(before)


@pytest.mark.usefixtures("graphs_by_calls")
def test_moved_parameters_are_captured_again(device):
    """Graphs that read the old addresses are freed."""
    model, plain = (trained_model(device, cuda_graphs=is_captured) for is_captured in (True, False))
    for one in (model, plain):
        for _ in range(2):
            one(**batch(device, 12)).loss.backward()
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data * 2
        one.zero_grad()
        one(**batch(device, 12)).loss.backward()
    found, expected = (
        [parameter.grad for parameter in one.parameters() if parameter.requires_grad] for one in (model, plain)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert "2 graphs of layers" in graphs_report(model)


@pytest.mark.parametrize("nested", [False, True])
def test_moved_scales_and_buffers_are_noticed(nested):
    """They may move alone: after a model was on the CPU, large tensors often get their old addresses."""
    linear = Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=nested).to("cpu")
    layer = nn.ModuleList([linear, nn.BatchNorm1d(4)])
    scales = linear.weight.quant_state
    assert scales.nested is nested
    moved = [(scales, "absmax"), (layer[1], "running_mean")] + [(scales.state2, "absmax")] * nested
    for owner, name in moved:
        before = layer_graphs.layer_state(layer)
        assert layer_graphs.layer_state(layer) == before
        old = getattr(owner, name)
        setattr(owner, name, old.clone())
        assert layer_graphs.layer_state(layer) != before


@pytest.mark.usefixtures("graphs_by_calls")
def test_numbers_that_change_in_each_call(device):
    model = trained_model(device, cuda_graphs=True)
    inputs = batch(device, 12)
    for number in range(layer_graphs.MOST_SHAPES + 2):
        model(**inputs, num_items_in_batch=number + 3).loss.backward()
    assert "4 times: arguments that are numbers or strings have had 8 values" in graphs_report(model)
    (graphs,) = graphs_of(model)[:1]
    assert len(graphs._captures) == 2 * layer_graphs.MOST_SHAPES
    for _ in range(2):
        model(**inputs, num_items_in_batch=torch.tensor(20, device=device)).loss.backward()
    assert "2 graphs of layers" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
def test_recorded_outputs_inside_a_layer(device):
    """The load-balancing loss needs the router logits, which a graph would not return."""
    model, plain = (trained_model(device, cuda_graphs=is_captured) for is_captured in (True, False))
    inputs = {**batch(device, 12), "output_router_logits": True}
    for _ in range(3):
        found, expected = (one(**inputs) for one in (model, plain))
        torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=0, atol=0)
        assert found.aux_loss > 0
    assert "without a graph, 6 times: output_router_logits=True records" in graphs_report(model)
    hidden = [one(**batch(device, 12), output_hidden_states=True).hidden_states for one in (model, plain)]
    torch.testing.assert_close(*hidden, rtol=0, atol=0)


@pytest.mark.usefixtures("graphs_by_calls")
def test_layers_with_hooks_are_not_captured(device):
    model = trained_model(device, cuda_graphs=True)
    seen = []
    model.get_submodule("base_model.model.model.layers.1.mlp").register_forward_hook(lambda *_: seen.append(1))
    for _ in range(3):
        model(**batch(device, 12)).loss.backward()
    assert len(seen) == 3  # a recomputation stops before the hook
    assert "2 times: mlp has a forward hook" in graphs_report(model)
    assert "1 graphs of layers" in graphs_report(model)
    layer = model.get_submodule("base_model.model.model.layers.0")
    handle = layer.self_attn.q_norm.register_forward_pre_hook({}.get)  # a method without `__module__`
    model(**batch(device, 12)).loss.backward()
    assert "1 times: self_attn.q_norm has a forward hook" in graphs_report(model)
    handle.remove()
    handle = layer.self_attn.register_forward_pre_hook(lambda *_: seen.append(2))  # after the capture
    model(**batch(device, 12)).loss.backward()
    assert seen.count(2) == 2, "in the forward and in the recomputation"
    assert "1 times: self_attn has a forward hook" in graphs_report(model)
    handle.remove()
    before = graphs_report(model)
    model(**batch(device, 12)).loss.backward()
    assert seen.count(2) == 2
    assert graphs_report(model).splitlines()[0] == before.splitlines()[0]


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_layers_with_backward_hooks_are_not_captured(device, register):
    model = trained_model(device, cuda_graphs=True)
    layers = model.get_submodule("base_model.model.model.layers")
    calls = []
    getattr(layers[1].mlp, register)(lambda *_: calls.append(1))
    for _ in range(3):
        model(**batch(device, 12)).loss.backward()
    assert calls == [1, 1, 1]
    assert "2 times: mlp has a backward hook" in graphs_report(model)
    assert "1 graphs of layers" in graphs_report(model)
    getattr(layers[0].self_attn, register)(lambda *_: calls.append(0))  # after the capture
    model(**batch(device, 12)).loss.backward()
    assert sorted(calls) == [0, 1, 1, 1, 1]
    assert "1 times: self_attn has a backward hook" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
def test_copies_of_modules_follow_the_adapter(device):
    """With both adapters trained, only the active adapters tell which copies a layer computes."""

    def gradients(**options):
        model = tiny_model(device=device, mlp_only_layers=[1])
        prepare_model_for_training(model, **options)
        config = MoeQLoraConfig(r=2, target_modules=["experts"], modules_to_save=["q_norm"])
        model = get_peft_model(model, config)
        model.add_adapter("other", config)
        randomize_adapter(model)
        model.train()
        found = []
        for _ in range(3):
            for adapter in ("default", "other"):
                model.set_adapter(adapter)
                model.set_requires_grad(["default", "other"], True)
                model.zero_grad()
                model(**batch(device, 12)).loss.backward()
                copies = [one for name, one in model.named_parameters() if f"q_norm.modules_to_save.{adapter}" in name]
                assert len(copies) == 2
                assert all(parameter.grad.any() for parameter in copies)
                found += [parameter.grad for parameter in copies]
        return found, graphs_report(model)

    found, report = gradients(cuda_graphs=True)
    torch.testing.assert_close(found, gradients()[0], rtol=0, atol=0)
    assert report == "4 graphs of layers, for 1 input shapes"


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("is_stack", [False, True])
def test_graphs_after_an_interrupted_forward(device, is_stack):
    """torch does not call hooks after Ctrl-C."""
    model = trained_model(device, cuda_graphs=True)
    whole = model.get_base_model()
    called, last = (whole.model, "norm") if is_stack else (whole, "lm_head")
    inputs = {name: value for name, value in batch(device, 12).items() if name != "labels"}

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = called.get_submodule(last).register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        called(**inputs, output_router_logits=True)
    handle.remove()
    for _ in range(2):
        called(**inputs)[0].sum().backward()
    assert "2 graphs of layers" in graphs_report(model)
    assert called(**inputs, output_router_logits=True).router_logits is not None


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("place", ["lm_head", "model.layers.0"])
def test_forward_inside_a_forward(device, place):
    """Such as that of a reference, by a hook."""
    model = trained_model(device, cuda_graphs=True)
    whole, seen = model.get_base_model(), []

    def reference(*_):
        if not whole.training:
            return
        whole.eval()
        with torch.no_grad():
            seen.append(whole(**batch(device, 12)).loss)
        whole.train()

    whole.get_submodule(place).register_forward_pre_hook(reference)
    for asks in (True, False, False, True):
        out = model(**batch(device, 12), output_router_logits=asks)
        out.loss.backward()
        assert (out.router_logits is not None) is asks
        if asks:
            assert len(out.router_logits) == 2
    assert len(seen) == 4


@pytest.mark.usefixtures("graphs_by_calls")
def test_forwards_in_two_threads(device):
    """Each thread has its own forwards in progress, and pauses graphs for itself."""
    model = trained_model(device, cuda_graphs=True).get_base_model()
    (hooks,) = {
        hook.__self__
        for hook in model._forward_hooks.values()
        if isinstance(hook.__self__, layer_runner._ForwardHooks)
    }
    now = hooks.graphs.now
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for thread, is_before, module in (
            (first, True, model),
            (first, True, model.model),
            (second, True, model),
            (first, False, model.model),
            (second, True, model.model),
            (first, False, model),
            (second, False, model.model),
        ):
            if is_before:
                options = {"output_router_logits": True} if thread is second else {}
                thread.submit(hooks.before, module, (), options).result()
            else:
                thread.submit(hooks.after, module, (), None).result()
        assert first.submit(lambda: now.is_paused).result() is None
        assert "output_router_logits" in second.submit(lambda: now.is_paused).result()
        second.submit(hooks.after, model, (), None).result()
        for thread in (first, second):
            assert thread.submit(lambda: (now.is_paused, now.running)).result() == (None, [])


@pytest.mark.usefixtures("graphs_by_calls")
def test_other_implementation_of_attention(device):
    """Also if arguments of layers are the same for it."""
    AttentionInterface.register("own", sdpa_attention_forward)
    AttentionMaskInterface.register("own", sdpa_mask)
    model = trained_model(device, cuda_graphs=True)
    for attention, count in (("sdpa", 2), ("own", 4), ("sdpa", 4)):
        model.get_base_model().set_attn_implementation(attention)
        for _ in range(2):
            model(**batch(device, 12)).loss.backward()
        assert f"{count} graphs of layers" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
def test_number_of_captured_shapes_is_limited(device, monkeypatch):
    monkeypatch.setattr(layer_graphs, "MOST_SHAPES", 1)
    batches = [batch(device, length) for length in (12, 12, 8, 8, 12)]
    expected = train(trained_model(device), batches)
    model = trained_model(device, cuda_graphs=True)
    torch.testing.assert_close(train(model, batches), expected, rtol=0, atol=0)
    assert "without a graph, 2 times: 1 input shapes are captured already; pad or pack" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
def test_copies_have_their_own_captures(device):
    model = trained_model(device, cuda_graphs=True)
    for _ in range(2):
        model(**batch(device, 12)).loss.backward()
    twin = copy.deepcopy(model)
    assert not {id(graphs) for graphs in graphs_of(twin)} & {id(graphs) for graphs in graphs_of(model)}
    assert graphs_report(twin) == "0 graphs of layers, for 0 input shapes"
    for one in (model, twin):
        one.zero_grad()
        for _ in range(2):
            one(**batch(device, 12)).loss.backward()
    grads = [[parameter.grad for parameter in one.parameters()] for one in (model, twin)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    runner = pickle.loads(pickle.dumps(twin.get_submodule("base_model.model.model.layers.0"))).forward
    assert isinstance(runner, LayerRunner)
    assert isinstance(runner.graphs, layer_graphs.LayerGraphs)


def test_cuda_graphs_need_a_gpu(monkeypatch):
    monkeypatch.setattr(layer_runner, "GRAPHS_BACKEND", CudaBackend)
    model = trained_model("cpu", cuda_graphs=True)
    model(**batch("cpu", 12)).loss.backward()
    assert "without a graph, 2 times: it is on cpu, not on cuda" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
def test_arguments_that_contain_tensors_are_not_captured(device):
    """Such as the masks of flex attention: a graph would keep reading the tensors of the first one."""

    class Mask:
        def __init__(self, scale: float) -> None:
            self.scale = torch.tensor(scale, device=device)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, device=device))

        def forward(self, hidden_states: torch.Tensor, mask: Mask) -> torch.Tensor:
            return hidden_states * self.weight * mask.scale

    layer, graphs = Layer(), layer_graphs.LayerGraphs(make_backend=layer_runner.GRAPHS_BACKEND)
    mask, x = Mask(2.0), torch.ones(1, 2, 4, device=device)
    for scale in (2.0, 2.0, 5.0):
        mask.scale = torch.tensor(scale, device=device)
        out = graphs.run(layer, layer.forward, layer.forward, (x,), {"mask": mask})
        assert torch.equal(out, scale * x)
    assert graphs.report()[-1] == "without a graph, 3 times: arguments of type Mask are neither tensors nor constants"


@pytest.mark.usefixtures("graphs_by_calls")
def test_captured_forwards_compute_as_for_a_backward(device):
    """Experts would use another kernel for few tokens."""
    seen = []

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, device=device))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_grad_enabled() or kept_activations.has_backward())
            return hidden_states * self.weight

    layer, graphs = Layer(), layer_graphs.LayerGraphs(make_backend=layer_runner.GRAPHS_BACKEND)
    for _ in range(2):
        graphs.run(layer, layer.forward, layer.forward, (torch.ones(1, 2, 4, device=device),), {})
    assert "1 graphs of layers" in graphs.report()[0]
    assert all(seen)
    assert not kept_activations.has_backward()
