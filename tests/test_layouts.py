"""Every experts class of the installed transformers, with and without an adapter, against a per-token reference.

The reference (`per_token.py`) is fp32 on the CPU and gets the dequantized weights and the adapter's deltas as dense
stacks. It is itself compared with each class's own forward. For a class without a formula there, the forward itself is
the reference, and pytest prints its name at the end of the test run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import conftest
import per_token
import pytest
import torch
import transformers
from conftest import NO_FORMULA
from experts_classes import (
    DEFAULT_SIZES,
    ExpertsClass,
    Sizes,
    TinyConfig,
    build,
    find_experts_classes,
    tiny_config,
)
from packaging.version import Version
from torch import nn

from peft_moe_qlora import ExpertsLora, MoeQLoraConfig, QuantizedExperts, quantize_experts
from peft_moe_qlora.experts import convert_experts, find_experts, revert_experts
from peft_moe_qlora.experts.layout import ALWAYS_ON_CLASSES, UNSUPPORTED_CLASSES
from peft_moe_qlora.quantization import FourBitFormat

TOLERANCE = {
    torch.float32: 1e-5,  # largest difference, in units of the largest magnitude of the reference
    torch.bfloat16: 2e-2,  # relative L2 error: operands and results of every product are rounded to 8 bits
}

# Standard deviation of the hidden states. In fp32 values exceed every clamp. In bf16 they stay below it: rounding
# would move some across a clamp, where the gradient is discontinuous.
SPREAD = {torch.float32: 1.0, torch.bfloat16: 0.25}

RANK = 3
ALPHAS = (6.0, 4.5)  # of the first and of the down projection; different, to detect a mix-up

UNALIGNED = Sizes(hidden=20, intermediate=10)  # numbers of weights that are not multiples of the block size
ODD = Sizes(hidden=7, intermediate=5)  # an expert's last code fills half a byte
SQUARE_GATE_UP = Sizes(hidden=24, intermediate=12)
SQUARE_DOWN = Sizes(hidden=16, intermediate=16)

ALL_CLASSES = find_experts_classes()
DECORATED = [found for found in ALL_CLASSES if found.is_decorated]
UNDECORATED = [found for found in ALL_CLASSES if not found.is_decorated]
BY_NAME = {found.name: found for found in ALL_CLASSES}

# one class for each combination: plain, transposed with biases, without gate, with a norm at the end
KINDS = ["Qwen3MoeExperts", "GptOssExperts", "NemotronHExperts", "MuseSparkExperts"]

every_class = pytest.mark.parametrize("experts_class", DECORATED, ids=lambda found: found.name)
every_kind = pytest.mark.parametrize(
    "experts_class", [found for found in DECORATED if found.name in KINDS], ids=lambda found: found.name
)
every_storage = pytest.mark.parametrize("storage", [FourBitFormat(), None], ids=["nf4", "unquantized"])


def random_routing(num_tokens: int, top_k: int = 2) -> torch.Tensor:
    """Different experts for each token, as from a router."""
    return torch.rand(num_tokens, DEFAULT_SIZES.num_experts).topk(top_k).indices


def idle_experts() -> torch.Tensor:
    """Only experts 1 and 3 have tokens."""
    return torch.tensor([[1, 3], [3, 1], [1, 3]])


def experts_of_other_ranks() -> torch.Tensor:
    """Expert parallelism gives these pairs the id E; the second token has no local expert."""
    E = DEFAULT_SIZES.num_experts
    return torch.tensor([[0, E], [E, E], [4, 2], [E, 1]])


ROUTINGS = {
    "random": lambda: random_routing(9),
    "idle experts": idle_experts,
    "all to one": lambda: torch.full((6, 1), 2),
    "one token": lambda: random_routing(1, top_k=3),
    "no token": lambda: random_routing(0),
    "experts of other ranks": experts_of_other_ranks,
}


class Block(nn.Module):
    """The module that contains the experts in a model."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts


@dataclass
class Inputs:
    hidden_states: torch.Tensor
    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    cotangent: torch.Tensor

    @classmethod
    def random(
        cls,
        top_k_index: torch.Tensor,
        hidden: int = DEFAULT_SIZES.hidden,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        weights_dtype: torch.dtype | None = None,
    ) -> Inputs:
        num_tokens = top_k_index.shape[0]
        return cls(
            torch.randn(num_tokens, hidden).mul(SPREAD[dtype]).to(device, dtype).requires_grad_(),
            top_k_index.to(device),
            torch.rand(top_k_index.shape).add(0.1).to(device, weights_dtype or dtype).requires_grad_(),
            torch.randn(num_tokens, hidden).to(device, dtype),
        )


def adapted(
    experts_class: ExpertsClass,
    storage: FourBitFormat | None,
    sizes: Sizes = DEFAULT_SIZES,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> QuantizedExperts:
    """Converted experts with an adapter whose factors are all nonzero; biases and norms are trainable, too."""
    block = Block(build(experts_class, sizes).to(device, dtype))
    convert_experts(block, storage)
    experts = block.experts
    config = MoeQLoraConfig(r=RANK, init_lora_weights=False)
    for projection, alpha in zip(experts.layout.projections, ALPHAS):
        layer = ExpertsLora(experts.stack(projection), "default", config, RANK, alpha)
        experts.add_module(projection, layer)
    for name, parameter in experts.named_parameters():
        if name.endswith(("_bias", "norm.weight")):
            parameter.requires_grad_()
    return experts


def trainable(layer: QuantizedExperts) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in layer.named_parameters() if parameter.requires_grad}


def leaves_of(layer: QuantizedExperts, inputs: Inputs) -> dict[str, torch.Tensor]:
    """All tensors that have a gradient, by name."""
    return {"hidden_states": inputs.hidden_states, "top_k_weights": inputs.top_k_weights, **trainable(layer)}


def results_of_package(layer: QuantizedExperts, inputs: Inputs) -> dict[str, torch.Tensor]:
    """Output and gradients by name; an input that is not connected to the output raises an error."""
    leaves = leaves_of(layer, inputs)
    output = layer(inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    gradients = torch.autograd.grad(output, list(leaves.values()), inputs.cotangent)
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def dequantized(layer: QuantizedExperts) -> dict[str, torch.Tensor]:
    return {name: layer.stack(name).decode(torch.float32).cpu() for name in layer.layout.projections}


def reference_is_transposed(experts_class: ExpertsClass) -> bool:
    if experts_class.name in per_token.GATES:
        return experts_class.name in per_token.TRANSPOSED
    return build(experts_class).is_transposed


def reference_output(
    experts_class: ExpertsClass, sizes: Sizes, parameters: Mapping[str, torch.Tensor], *arguments: torch.Tensor
) -> torch.Tensor:
    """By the class's formula; without one, by its own forward."""
    if experts_class.name in per_token.GATES:
        config = tiny_config(experts_class, sizes)
        return per_token.experts_output(experts_class.name, config, parameters, *arguments)
    return per_token.own_output(build(experts_class, sizes), parameters, *arguments)


def results_of_reference(
    experts_class: ExpertsClass,
    layer: QuantizedExperts,
    inputs: Inputs,
    stacks: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """The reference's results; optionally with other `stacks` than the layer's, to check the comparison itself."""
    leaves = {leaf: value.detach().cpu().float().requires_grad_() for leaf, value in leaves_of(layer, inputs).items()}
    parameters = {leaf: value for leaf, value in leaves.items() if leaf.endswith(("_bias", "norm.weight"))}
    is_transposed = reference_is_transposed(experts_class)
    for projection, stack in (stacks or dequantized(layer)).items():
        A, B = (leaves[f"{projection}.lora_{factor}.default.weight"] for factor in "AB")
        alpha = ALPHAS[projection == "down_proj"]
        parameters[projection] = per_token.with_lora(stack, is_transposed, A, B, alpha / RANK)
    layout = layer.layout
    sizes = Sizes(layout.num_experts, layout.hidden_size, layout.intermediate_size)
    arguments = (leaves["hidden_states"], inputs.top_k_index.cpu(), leaves["top_k_weights"])
    output = reference_output(experts_class, sizes, parameters, *arguments)
    cotangent = inputs.cotangent.cpu().float()
    gradients = torch.autograd.grad(
        output, list(leaves.values()), cotangent, allow_unused=True, materialize_grads=True
    )
    return {"output": output.detach(), **dict(zip(leaves, gradients))}


def largest_magnitude(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.abs().max() if tensor.numel() else tensor.sum()


MEASURE = {torch.float32: largest_magnitude, torch.bfloat16: torch.linalg.vector_norm}


def error(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """In units of TOLERANCE; absolute if the reference is zero or empty."""
    scale = MEASURE[dtype](expected).item()
    return MEASURE[dtype](found.cpu().float() - expected).item() / (scale or 1)


def assert_close(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name].shape != expected[name].shape] == []
    errors = {name: error(found[name], expected[name], dtype) for name in expected}
    # a NaN is not within any tolerance either
    assert {name: value for name, value in errors.items() if not value <= TOLERANCE[dtype]} == {}


def assert_zeros_kept(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Gradients without a token are exactly zero in the reference, and must be zero here."""
    assert [name for name in expected if found[name].cpu()[expected[name] == 0].any()] == []


def test_all_known_classes_are_found():
    """The search finds every class of the oldest supported version of transformers."""
    assert len(BY_NAME) == len(ALL_CLASSES)
    assert len(DECORATED) >= 51
    named = {*per_token.TRANSPOSED, *per_token.UNGATED, *per_token.BIASED, *per_token.NORMED, *KINDS}
    assert named <= per_token.GATES.keys()
    if Version(transformers.__version__).release[:2] == (5, 24):
        assert {found.name for found in DECORATED} == per_token.GATES.keys()


def test_every_class_is_declared_or_rejected():
    """A class that neither declares its layout nor is rejected by name would be ignored."""
    names = {found.name for found in UNDECORATED}
    # in early versions of transformers, where it is the only experts class of its model
    assert names - {"AriaGroupedExpertsGemm", "Llama4TextExperts"} <= UNSUPPORTED_CLASSES.keys()


@every_class
def test_reference_equals_class(experts_class, record_property):
    """The reference's formula equals the class's forward, at the model's real limits and epsilons."""
    if experts_class.name not in per_token.GATES:
        record_property(NO_FORMULA, experts_class.name)
        return
    experts = build(experts_class)
    inputs = Inputs.random(random_routing(9))
    arguments = (inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    parameters = dict(experts.named_parameters())
    expected = experts(*arguments)
    found = reference_output(experts_class, DEFAULT_SIZES, parameters, *arguments)
    leaves = [inputs.hidden_states, inputs.top_k_weights, *parameters.values()]
    names = ["output", "hidden_states", "top_k_weights", *parameters]
    assert_close(
        dict(zip(names, [found, *torch.autograd.grad(found, leaves, inputs.cotangent)])),
        dict(zip(names, [expected, *torch.autograd.grad(expected, leaves, inputs.cotangent)])),
    )


@every_kind
@pytest.mark.parametrize("routing", ["random", "no token", "experts of other ranks"])
def test_class_without_a_formula_uses_its_own_forward(experts_class, routing, monkeypatch):
    """A class of a later version of transformers is compared with itself."""
    layer, inputs = adapted(experts_class, FourBitFormat(), UNALIGNED), Inputs.random(ROUTINGS[routing](), 20)
    by_formula = results_of_reference(experts_class, layer, inputs)
    monkeypatch.delitem(per_token.GATES, experts_class.name)
    by_itself = results_of_reference(experts_class, layer, inputs)
    assert_close(by_itself, by_formula)
    assert_close(results_of_package(layer, inputs), by_itself)


def test_classes_without_a_formula_are_named(monkeypatch):
    """At the end of the test run."""
    properties: list[tuple[str, str]] = []
    monkeypatch.delitem(per_token.GATES, "Qwen3MoeExperts")
    test_reference_equals_class(BY_NAME["Qwen3MoeExperts"], lambda *entry: properties.append(entry))
    reports = [SimpleNamespace(user_properties=properties), SimpleNamespace(user_properties=[])]
    lines: list[str] = []
    reporter = SimpleNamespace(stats={"passed": reports}, section=lines.append, write_line=lines.append)
    conftest.pytest_terminal_summary(reporter)
    assert lines[-1] == "Qwen3MoeExperts"


@pytest.mark.parametrize(
    "experts_class", [found for found in DECORATED if found.name in per_token.GATES], ids=lambda found: found.name
)
def test_reference_knows_the_orientation_of_stacks(experts_class):
    E, H, width = DEFAULT_SIZES.num_experts, DEFAULT_SIZES.hidden, DEFAULT_SIZES.intermediate
    name = experts_class.name
    up = per_token.up_name(name)
    shapes = {parameter: tuple(value.shape) for parameter, value in build(experts_class).named_parameters()}
    factor = 1 if name in per_token.UNGATED else 2
    assert shapes[up] == per_token.stored_shape(name, E, H, factor * width)
    assert shapes["down_proj"] == per_token.stored_shape(name, E, width, H)
    biases = {f"{up}_bias", "down_proj_bias"} if name in per_token.BIASED else set()
    norms = {"post_expert_norm.weight"} if name in per_token.NORMED else set()
    assert shapes.keys() == {up, "down_proj"} | biases | norms


@pytest.mark.parametrize(
    "experts_class", [found for found in DECORATED if found.name in per_token.LIMITED], ids=lambda found: found.name
)
def test_inputs_reach_the_limits(experts_class):
    """A clamp that no value reaches would not be tested."""
    parameters = dict(build(experts_class).named_parameters())
    inputs = Inputs.random(random_routing(9))
    config = tiny_config(experts_class, DEFAULT_SIZES)
    unlimited = TinyConfig(config, swiglu_limit=1e9, mlp_gate_softcap=1e9, mlp_up_softcap=1e9)
    outputs = [
        per_token.experts_output(
            experts_class.name, each, parameters, inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights
        )
        for each in (config, unlimited)
    ]
    assert error(*outputs, torch.float32) > 100 * TOLERANCE[torch.float32]


@every_class
@every_storage
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_output_and_gradients(experts_class, storage, routing, device):
    """In fp32. Idle experts, pairs of other ranks and the factors of a batch without tokens get zero gradients."""
    layer = adapted(experts_class, storage, device=device)
    inputs = Inputs.random(routing(), device=device)
    found, expected = results_of_package(layer, inputs), results_of_reference(experts_class, layer, inputs)
    assert_close(found, expected)
    assert_zeros_kept(found, expected)


@every_class
@every_storage
def test_output_and_gradients_in_bf16(experts_class, storage, device):
    layer = adapted(experts_class, storage, device=device, dtype=torch.bfloat16)
    inputs = Inputs.random(random_routing(9), device=device, dtype=torch.bfloat16)
    found = results_of_package(layer, inputs)
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    assert_close(found, results_of_reference(experts_class, layer, inputs), torch.bfloat16)


@every_kind
@every_storage
def test_router_weights_may_be_more_precise(experts_class, storage, device):
    """Routers compute in fp32, and some models return fp32 weights."""
    layer = adapted(experts_class, storage, device=device, dtype=torch.bfloat16)
    inputs = Inputs.random(random_routing(9), device=device, dtype=torch.bfloat16, weights_dtype=torch.float32)
    found = results_of_package(layer, inputs)
    assert found["output"].dtype == torch.bfloat16
    assert found["top_k_weights"].dtype == torch.float32
    assert_close(found, results_of_reference(experts_class, layer, inputs), torch.bfloat16)


@every_class
@pytest.mark.parametrize("sizes", [UNALIGNED, ODD], ids=["unaligned", "odd"])
def test_sizes_that_are_not_multiples_of_a_block(experts_class, sizes, device):
    layer = adapted(experts_class, FourBitFormat(), sizes, device)
    inputs = Inputs.random(random_routing(9), sizes.hidden, device)
    assert_close(results_of_package(layer, inputs), results_of_reference(experts_class, layer, inputs))


@pytest.mark.parametrize("name", ["GptOssExperts", "Qwen3MoeExperts"])
@every_storage
@pytest.mark.parametrize(
    ("sizes", "projection"), [(SQUARE_GATE_UP, "gate_up_proj"), (SQUARE_DOWN, "down_proj")], ids=["gate_up", "down"]
)
def test_orientation_of_square_stacks(name, storage, sizes, projection, device):
    """The class determines the orientation, not the shape: the other orientation fits too, and gives wrong results."""
    layer = adapted(BY_NAME[name], storage, sizes, device)
    inputs = Inputs.random(random_routing(9), sizes.hidden, device)
    found, stacks = results_of_package(layer, inputs), dequantized(layer)
    assert_close(found, results_of_reference(BY_NAME[name], layer, inputs, stacks))
    assert stacks[projection].shape[1] == stacks[projection].shape[2]
    stacks[projection] = stacks[projection].transpose(1, 2)
    with pytest.raises(AssertionError):
        assert_close(found, results_of_reference(BY_NAME[name], layer, inputs, stacks))


@every_class
@every_storage
def test_without_adapter_equals_the_class(experts_class, storage, device):
    """Equals the class's own forward on the dequantized weights, and every parameter is back in place."""
    original = build(experts_class).to(device)
    before = {name: parameter.detach().clone() for name, parameter in original.named_parameters()}
    block = Block(original)
    convert_experts(block, storage)
    assert isinstance(block.experts, QuantizedExperts)
    inputs = Inputs.random(random_routing(9), device=device)
    arguments = (inputs.hidden_states, inputs.top_k_index, inputs.top_k_weights)
    found = block.experts(*arguments)
    stacks = {name: block.experts.stack(name).decode(torch.float32) for name in block.experts.layout.projections}
    revert_experts(block, torch.float32)
    assert block.experts is original
    assert error(found, block.experts(*arguments).cpu(), torch.float32) <= 1e-5
    after = dict(block.experts.named_parameters())
    assert after.keys() == before.keys()
    assert [name for name in after if not torch.equal(after[name], {**before, **stacks}[name])] == []


@every_kind
@every_storage
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_results_are_bitwise_reproducible(experts_class, storage, dtype, device):
    """No atomic adds: equal inputs give equal bits, also in gradients."""
    layer = adapted(experts_class, storage, device=device, dtype=dtype)
    inputs = Inputs.random(random_routing(9), device=device, dtype=dtype)
    first, *others = (results_of_package(layer, inputs) for _ in range(3))
    for other in others:
        assert [name for name in first if not torch.equal(other[name], first[name])] == []


@every_kind
@every_storage
def test_step_does_not_change_the_base(experts_class, storage, device):
    layer = adapted(experts_class, storage, device=device)
    frozen = {name: value.clone() for name, value in layer.named_parameters() if not value.requires_grad}
    factors = {name: value.detach().clone() for name, value in trainable(layer).items()}
    results = results_of_package(layer, Inputs.random(random_routing(9), device=device))
    for name, parameter in trainable(layer).items():
        parameter.grad = results[name]
    torch.optim.AdamW(trainable(layer).values(), lr=0.1).step()
    after = dict(layer.named_parameters())
    assert frozen
    assert [name for name in frozen if not torch.equal(after[name], frozen[name])] == []
    assert [name for name in factors if torch.equal(after[name], factors[name])] == []


@pytest.mark.parametrize(
    "experts_class",
    [found for found in UNDECORATED if found.name != "Llama4TextExperts"],
    ids=lambda found: found.name,
)
def test_undecorated_classes_are_rejected(experts_class):
    name = experts_class.name
    block = Block(build(experts_class))
    experts = block.experts
    before = {key: value.clone() for key, value in block.state_dict().items()}
    is_refused_by_name = name in UNSUPPORTED_CLASSES and name not in ALWAYS_ON_CLASSES
    message = f"experts is of class {name}, which is not supported" if is_refused_by_name else "No routed experts"
    with pytest.raises(ValueError, match=message):
        quantize_experts(block, progressbar=False)
    assert block.experts is experts
    assert [key for key, value in block.state_dict().items() if not torch.equal(value, before[key])] == []


@pytest.mark.parametrize(
    "experts_class",
    [found for found in UNDECORATED if found.name in set(UNSUPPORTED_CLASSES) - ALWAYS_ON_CLASSES],
    ids=lambda found: found.name,
)
def test_error_is_raised_before_any_change(experts_class):
    """With one unsupported module, the others are not converted either."""
    routed = build(BY_NAME["Qwen3MoeExperts"])
    model = nn.ModuleList([Block(routed), Block(build(experts_class))])
    with pytest.raises(ValueError, match=f"1.experts is of class {experts_class.name}"):
        quantize_experts(model, progressbar=False)
    assert model[0].experts is routed


def test_shared_experts_stay_next_to_routed_ones():
    shared = build(BY_NAME["InklingSharedExperts"])
    model = nn.ModuleDict({"routed": Block(build(BY_NAME["InklingExperts"])), "shared": Block(shared)})
    quantize_experts(model, progressbar=False)
    assert isinstance(model["routed"].experts, QuantizedExperts)
    assert model["shared"].experts is shared
    assert [path for path, _ in find_experts(model)] == ["routed.experts"]


@every_kind
@pytest.mark.parametrize("projection", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_comparison_detects_a_wrong_factor(experts_class, projection, dtype):
    """One expert's B is off by 2 %, or by 20 % in bf16."""
    layer = adapted(experts_class, FourBitFormat(), dtype=dtype)
    inputs = Inputs.random(torch.tensor([[1, 0], [3, 1], [4, 2], [2, 1]]), dtype=dtype)
    found = results_of_package(layer, inputs)
    _, B = layer.get_submodule(layer.layout.projections[projection]).factors("default")
    with torch.no_grad():
        B[1] *= 1.02 if dtype == torch.float32 else 1.2
    with pytest.raises(AssertionError):
        assert_close(found, results_of_reference(experts_class, layer, inputs), dtype)


def test_comparison_detects_a_wrong_split_of_gate_and_up():
    """Swapped halves, and interleaved rows read as concatenated."""
    inputs = Inputs.random(random_routing(9))
    layer = adapted(BY_NAME["Qwen3MoeExperts"], FourBitFormat())
    stacks = dequantized(layer)
    stacks["gate_up_proj"] = stacks["gate_up_proj"].roll(DEFAULT_SIZES.intermediate, dims=1)
    with pytest.raises(AssertionError):
        assert_close(
            results_of_package(layer, inputs),
            results_of_reference(BY_NAME["Qwen3MoeExperts"], layer, inputs, stacks),
        )
    layer = adapted(BY_NAME["GptOssExperts"], FourBitFormat())
    with pytest.raises(AssertionError):
        assert_close(
            results_of_package(layer, inputs),
            results_of_reference(BY_NAME["OpenAIPrivacyFilterExperts"], layer, inputs),
        )
