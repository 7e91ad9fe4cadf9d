"""How decoder layers run in training: with kept activations or captures, results equal those of plain layers.

Plain calls replace captures on machines without a GPU; buffers, keys and fallbacks are the same.
"""

from __future__ import annotations

import gc
import pickle
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model, get_peft_model_state_dict
from prepared_models import POLICIES, batch, train, trained_model
from shrunken_models import shrunken_model_or_skip
from tiny_models import randomize_adapter, tiny_model, token_ids
from torch import fx, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments, set_seed

from peft_moe_qlora import MoeQLoraConfig, prepare_model_for_training
from peft_moe_qlora.ops import keep_experts, kept_activations
from peft_moe_qlora.training import graphs_report, layer_runner, release_graphs
from peft_moe_qlora.training.cuda_graphs import CapturedLayer


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("keep", POLICIES)
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_graphs_do_not_change_results(device, keep, model_type):
    """Two alternating lengths, and one that occurs once, with masks."""
    batches = [batch(device, length, seed) for seed, length in enumerate([12, 8, 12, 8, 12, 9, 8, 12])]
    expected = train(trained_model(device, model_type=model_type, use_gradient_checkpointing=False), batches)
    model = trained_model(device, model_type=model_type, use_gradient_checkpointing=keep, cuda_graphs=True)
    found = train(model, batches)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert graphs_report(model) == "4 graphs of layers, for 2 input shapes"
    release_graphs(model)
    assert graphs_report(model) == "0 graphs of layers, for 0 input shapes"


@pytest.mark.parametrize("keep", POLICIES)
def test_checkpointing_does_not_change_results(device, keep):
    batches = [batch(device, length, seed) for seed, length in enumerate([12, 8, 12])]
    expected = train(trained_model(device, use_gradient_checkpointing=False), batches)
    found = train(trained_model(device, use_gradient_checkpointing=keep), batches)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("keep", POLICIES)
def test_dropout_masks_are_reproduced(device, keep):
    """The recomputation uses the forward's masks, and the generator advances as without graphs."""
    dtype = (
        torch.float32 if device == "cpu" else torch.bfloat16
    )  # in fp32 a GPU computes experts with dropout one by one
    batches = [batch(device, 12, seed) for seed in range(4)]
    expected = train(trained_model(device, dtype, 0.3, use_gradient_checkpointing=True), batches)
    model = trained_model(device, dtype, 0.3, use_gradient_checkpointing=keep, cuda_graphs=True)
    torch.testing.assert_close(train(model, batches), expected, rtol=0, atol=0)
    assert graphs_report(model) == "2 graphs of layers, for 1 input shapes"


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("keep", POLICIES)
def test_several_forwards_before_the_backward(device, keep):
    """Two forwards of one shape, then their backwards in either order; and a second backward of one graph."""

    def grads(model: nn.Module, order: list[int]) -> list[torch.Tensor]:
        for _ in range(2):
            model(**batch(device, 12)).loss.backward()
        model.zero_grad()
        losses = [model(**batch(device, 12, seed)).loss for seed in (1, 2)]
        for number in order:
            losses[number].backward(retain_graph=True)
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    for order in ([0, 1], [1, 0], [1, 0, 1]):
        expected = grads(trained_model(device, use_gradient_checkpointing=False), order)
        found = grads(trained_model(device, use_gradient_checkpointing=keep, cuda_graphs=True), order)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("graphs_by_calls")
def test_adapters_take_turns(device):
    """Each adapter has its own graphs, also when disabled; a new rank needs new ones."""
    model, plain = (trained_model(device, cuda_graphs=is_captured) for is_captured in (True, False))
    inputs = batch(device, 12)
    for one in (model, plain):
        one.add_adapter("second", MoeQLoraConfig(r=2, target_modules=["experts", "q_proj"]))
        randomize_adapter(one, seed=7)
    for turn in range(3):
        for adapter in ("default", "second"):
            for one in (model, plain):
                one.set_adapter(adapter)
                one.zero_grad()
                loss = one(**inputs).loss
                loss.backward()
                with one.disable_adapter():
                    one(**inputs)
                    without = one(**inputs).loss.detach()
                grads = [parameter.grad for parameter in one.parameters() if parameter.requires_grad]
                if one is model:
                    found = (loss.detach(), without, grads)
            torch.testing.assert_close(found, (loss.detach(), without, grads), rtol=0, atol=0)
            assert any(grad is not None and grad.any() for grad in grads), turn


@pytest.mark.usefixtures("graphs_by_calls")
def test_accumulated_gradients_and_hooks(device):
    """Hooks of the factors run at each backward, as data parallelism requires."""
    model, plain = (trained_model(device, cuda_graphs=is_captured) for is_captured in (True, False))
    calls = []
    for one in (model, plain):
        for _ in range(2):
            one(**batch(device, 12)).loss.backward()
        factor = next(parameter for name, parameter in one.named_parameters() if "lora_B" in name)
        factor.register_post_accumulate_grad_hook(lambda parameter: calls.append(parameter.grad.clone()))
        for seed in (3, 4):
            (one(**batch(device, 12, seed)).loss / 2).backward()
    torch.testing.assert_close(calls[:2], calls[2:], rtol=0, atol=0)
    found, expected = ([parameter.grad for parameter in one.parameters()] for one in (model, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("graphs_by_calls")
def test_mixed_precision(device):
    """Under autocast, whose casts of factors must not outlive a step."""
    batches = [batch(device, 12, seed) for seed in range(4)]
    found, expected = (
        train(trained_model(device, cuda_graphs=is_captured), batches, autocast=True) for is_captured in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("graphs_by_calls")
def test_evaluation_is_not_captured(device):
    model = trained_model(device, cuda_graphs=True)
    for _ in range(3):
        model(**batch(device, 12)).loss.backward()
    before = graphs_report(model)
    model.eval()
    plain = trained_model(device).eval()
    ids = token_ids(device)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=0)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **options), plain.generate(input_ids=ids, **options))
    assert graphs_report(model) == before
    model.train()
    model(**batch(device, 12)).loss.backward()
    assert graphs_report(model) == before


def test_activations_after_a_failed_forward():
    """torch 2.11 leaves the region of a checkpoint only when the exception is freed."""
    model = trained_model("cpu", use_gradient_checkpointing="keep-experts")

    def fail(*_):
        raise RuntimeError("out of memory")

    layer = model.get_submodule("base_model.model.model.layers.0")
    handle = layer.mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        model(**batch("cpu", 12))
    handle.remove()
    with torch.no_grad():
        model.eval()(**batch("cpu", 12))
    assert kept_activations._local.run is None
    forward, _ = keep_experts()
    with forward:
        del raised  # its region ends now, in the other one
        gc.collect()
        assert kept_activations._local.run is forward
    assert kept_activations._local.run is None


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("options", [{}, {"cuda_graphs": True}, {"compile_layers": True}], ids=str)
def test_filled_caches_are_read_in_training(device, options):
    """Without checkpointing; an empty cache, as transformers creates by default, does not prevent graphs."""
    model = trained_model(device, use_gradient_checkpointing=False, **options)
    ids = batch(device, 12)["input_ids"]
    expected = model(input_ids=ids).logits[:, 8:]
    with torch.no_grad():
        cache = model.eval()(input_ids=ids[:, :8], use_cache=True).past_key_values
    found = model.train()(input_ids=ids[:, 8:], past_key_values=cache)
    torch.testing.assert_close(found.logits, expected, rtol=0, atol=1e-5)
    found.logits.sum().backward()
    if "cuda_graphs" in options:
        for _ in range(2):
            model(input_ids=ids).logits.sum().backward()
        assert "2 graphs of layers" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("options", [{"use_gradient_checkpointing": "keep-experts"}, {"cuda_graphs": True}], ids=str)
def test_layers_on_several_devices(device, options):
    """accelerate moves tensors between layers by forwards of its own; here, the second layer is on the meta device."""
    accelerate = pytest.importorskip("accelerate.hooks")
    model = tiny_model(device=device, mlp_only_layers=[1]).model
    for module in (model.layers[1], model.norm):
        module.to("meta")
    devices = {"": device, "layers.1": "meta", "norm": "meta"}
    places = {name: devices.get(name, device) for name in ("embed_tokens", "rotary_emb", "layers.0", *devices) if name}
    accelerate.attach_align_device_hook_on_blocks(model, execution_device=places, offload=dict.fromkeys(places, False))
    accelerate.remove_hook_from_module(model)  # which moves results to the first device
    with pytest.raises(ValueError, match="forwards of their own, by which accelerate moves"):
        prepare_model_for_training(model, compile_layers=True)
    prepare_model_for_training(model, **options)
    ids = batch(device, 12)["input_ids"]
    for is_training in (True, True, False):
        with torch.set_grad_enabled(is_training):
            out = model.train(is_training)(input_ids=ids, use_cache=False).last_hidden_state
        assert out.device.type == "meta"
    if "cuda_graphs" in options:
        assert "accelerate moves its weights" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
def test_enabling_checkpointing_again_has_no_effect(device, monkeypatch):
    """As Trainer does with gradient_checkpointing=True."""
    model = trained_model(device, cuda_graphs=True)
    for _ in range(2):
        model(**batch(device, 12)).loss.backward()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model(**batch(device, 12)).loss.backward()
    assert graphs_report(model) == "2 graphs of layers, for 1 input shapes"
    calls = []
    run_forward = CapturedLayer.run_forward
    monkeypatch.setattr(CapturedLayer, "run_forward", lambda *args: calls.append(1) or run_forward(*args))
    model(**batch(device, 12)).loss.backward()
    assert len(calls) == 2


@pytest.mark.parametrize("change", ["gradient_checkpointing_enable", "gradient_checkpointing_disable"])
def test_kept_experts_do_not_depend_on_the_trainer(device, change, monkeypatch):
    """Trainer enables checkpointing with its own arguments; TRL disables it around passes of the reference."""
    calls = []
    keep_experts = layer_runner.keep_experts
    monkeypatch.setattr(layer_runner, "keep_experts", lambda: calls.append(1) or keep_experts())
    model = trained_model(device, use_gradient_checkpointing="keep-experts")
    getattr(model, change)()
    model(**batch(device, 12)).loss.backward()
    assert len(calls) == 2, "one for each layer"


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("options", [{"cuda_graphs": True}, {"use_gradient_checkpointing": "keep-experts"}], ids=str)
def test_layers_that_read_the_cache_of_others_get_it(options):
    """The decoder of DiffusionGemma reads the keys and values of its encoder."""
    ids = token_ids(length=8)
    results = []
    for prepares in (False, True):
        model = shrunken_model_or_skip("diffusion_gemma", dtype=torch.float32)
        if prepares:
            prepare_model_for_training(model, **options)
        model = get_peft_model(model, MoeQLoraConfig(r=4))
        randomize_adapter(model)
        model.train()
        for _ in range(3):
            model.zero_grad()
            out = model(input_ids=ids, decoder_input_ids=ids.flip(1)).logits
            out.square().mean().backward()
        results.append([out.detach(), *[parameter.grad for parameter in model.parameters()]])
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("graphs_by_calls")
def test_direct_calls_of_the_stack_of_layers(device):
    """As in trainers with their own heads: the layers are checkpointed once, and router logits are recorded."""
    grads = []
    for is_captured in (False, True):
        model = trained_model(device, cuda_graphs=is_captured)
        model.gradient_checkpointing_enable()
        for asks in (False, True, False, False):
            model.zero_grad()
            out = model.get_base_model().model(batch(device, 12)["input_ids"], output_router_logits=asks)
            assert (getattr(out, "router_logits", None) is not None) is asks
            loss = out.last_hidden_state.square().mean()
            (loss + sum(one.square().mean() for one in out.router_logits) if asks else loss).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert "without a graph, 2 times: output_router_logits=True records" in graphs_report(model)
    assert "2 graphs of layers" in graphs_report(model)


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("keep", POLICIES)
def test_whole_model_compiled(device, keep):
    """Its layers are traced as any other function, without graphs and separate compilation."""
    batches = [{**batch(device, 12), "use_cache": False}] * 3
    traced = []

    def losses(**options) -> tuple:
        def count(module: fx.GraphModule, inputs: list) -> fx.GraphModule:
            traced[-1] += sum(len(part.graph.nodes) for part in module.modules() if isinstance(part, fx.GraphModule))
            return module

        torch._dynamo.reset()
        traced.append(0)
        return train(torch.compile(trained_model(device, **options), backend=count), batches)

    expected = train(trained_model(device, use_gradient_checkpointing=keep), batches)
    plain = {"use_gradient_checkpointing": keep is not False}
    options = {"use_gradient_checkpointing": keep}
    for one in (plain, {**options, "cuda_graphs": True}, {**options, "compile_layers": True}):
        torch.testing.assert_close(losses(**one), expected, rtol=0, atol=1e-6)
    assert traced[0] > 500
    assert traced == [traced[0]] * 3


@pytest.mark.usefixtures("graphs_by_calls")
def test_prepared_model_is_pickled(device):
    model = trained_model(device, use_gradient_checkpointing=False, cuda_graphs=True)
    expected = train(model, [batch(device, 12)] * 2)
    twin = pickle.loads(pickle.dumps(trained_model(device, use_gradient_checkpointing=False, cuda_graphs=True)))
    torch.testing.assert_close(train(twin, [batch(device, 12)] * 2), expected, rtol=0, atol=0)


def test_checkpointing_is_switched_off():
    model = tiny_model()
    prepare_model_for_training(model)
    prepare_model_for_training(model, use_gradient_checkpointing=False)
    assert not model.is_gradient_checkpointing


def test_invalid_options_are_rejected():
    with pytest.raises(ValueError, match="use_gradient_checkpointing='experts' is not valid"):
        trained_model("cpu", use_gradient_checkpointing="experts")
    for options in ({"cuda_graphs": True}, {"use_gradient_checkpointing": "keep-experts"}):
        with pytest.raises(ValueError, match=r"gradient_checkpointing_kwargs=.* apply to torch's"):
            trained_model("cpu", gradient_checkpointing_kwargs={}, **options)
    with pytest.raises(ValueError, match=r"contain \['selective'\].*keep-experts"):
        trained_model("cpu", gradient_checkpointing_kwargs={"selective": True})
    model = tiny_model()
    prepare_model_for_training(model, cuda_graphs=True)
    for options in ({}, {"compile_layers": True}, {"use_gradient_checkpointing": "keep-experts"}):
        with pytest.raises(ValueError, match="are already prepared"):
            prepare_model_for_training(model, **options)


def test_rejected_models_are_unchanged():
    for model in ("Qwen/Qwen3-30B-A3B", nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"Found a {type(model).__name__}. Expected a transformers model"):
            prepare_model_for_training(model)
    model = tiny_model()
    model.model.layers = nn.ModuleList()
    with pytest.raises(ValueError, match="has no GradientCheckpointingLayer"):
        prepare_model_for_training(model, cuda_graphs=True)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.is_gradient_checkpointing


@pytest.mark.usefixtures("graphs_by_calls")
def test_data_parallel(device):
    """Its reducer waits for the hooks of all factors, and returns views of its buckets as gradients."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        results = []
        for is_captured in (True, False):
            model = trained_model(device, cuda_graphs=is_captured)
            parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            losses = []
            for seed in range(4):
                with parallel.no_sync() if seed % 2 else nullcontext():
                    loss = parallel(**batch(device, 12, seed)).loss
                    loss.backward()
                losses.append(loss.detach())
                optimizer.step()
            results.append((losses, [parameter.detach() for parameter in model.parameters()]))
            if is_captured:
                assert graphs_report(model) == "2 graphs of layers, for 1 input shapes"
        torch.testing.assert_close(*results, rtol=0, atol=0)
    finally:
        dist.destroy_process_group()


def run_trainer(directory: Path, device: str, steps: int, resume: str | None = None, **options) -> Trainer:
    """Accumulates, evaluates and clips, with a checkpoint every second step."""
    set_seed(0)
    model = trained_model(device, lora_dropout=0.1, **options)
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        logging_steps=1,
        lr_scheduler_type="constant",
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    rows = [{"input_ids": row, "labels": row} for row in batch("cpu", 12)["input_ids"].repeat(8, 1)]
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:2])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.usefixtures("graphs_by_calls")
@pytest.mark.parametrize("device", ["cpu"])  # a Trainer would use all available GPUs
def test_trainer(tmp_path):
    """With its own gradient_checkpointing, with evaluation between the steps, and resumed from a checkpoint."""
    plain, captured = (
        run_trainer(tmp_path / str(is_captured), "cpu", 4, cuda_graphs=is_captured) for is_captured in (False, True)
    )
    assert graphs_report(captured.model) == "2 graphs of layers, for 1 input shapes"
    expected, found = (
        [log.get("loss", log.get("eval_loss")) for log in trainer.state.log_history] for trainer in (plain, captured)
    )
    assert len(found) > 8
    assert found == expected
    run_trainer(tmp_path / "stopped", "cpu", 2, cuda_graphs=True)
    resumed = run_trainer(tmp_path / "stopped", "cpu", 4, str(tmp_path / "stopped" / "checkpoint-2"), cuda_graphs=True)
    factors = [get_peft_model_state_dict(trainer.model) for trainer in (plain, captured, resumed)]
    torch.testing.assert_close(factors[1], factors[0], rtol=0, atol=0)
    torch.testing.assert_close(factors[2], factors[0], rtol=0, atol=0)
