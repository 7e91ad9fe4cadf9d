"""The whole experts layer as one function: forward, all gradients, and its integration with torch.

Compared with plain torch, in Triton's interpreter without a GPU, in fp32 in both cases; at real sizes on a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from gate_formulas import gated

from peft_moe_qlora.ops import Factors, Gate, packed_weight
from peft_moe_qlora.quantization import DenseStack, Format, FourBitFormat, QuantizedStack, Stack
from peft_moe_qlora.quantization.formats import Fp8Format, Int4Format, Int8Format, Mxfp4Format, Nvfp4Format

pytest.importorskip("triton", reason="the kernels need Triton")

from experts_layer import run_layer
from kernel_cases import DEVICE, GATES, NF4, TILES, assert_close, random_ids, random_stack

from peft_moe_qlora.ops import fused_experts as fused_experts_module
from peft_moe_qlora.ops import fused_op, fused_steps
from peft_moe_qlora.ops.fused_experts import fused_experts
from peft_moe_qlora.ops.fused_steps import experts_forward_gemv
from peft_moe_qlora.ops.kernels.gate import apply_gate
from peft_moe_qlora.ops.kernels.gemv import fits_gemv
from peft_moe_qlora.ops.kernels.launch_recorder import LaunchRecorder, forget_recordings
from peft_moe_qlora.ops.kernels.tuning import GemmTiles


@pytest.fixture(autouse=True)
def no_recordings() -> None:
    forget_recordings()  # tests change tiles, which recordings do not check


CASES = {
    # tokens, K, hidden, intermediate, E, transposed, storage, gate, rank, bias
    "plain": (5, 2, 64, 64, 4, False, NF4, Gate("silu"), 4, False),
    "no adapter": (5, 2, 128, 64, 4, True, NF4, Gate("silu"), 0, False),
    "nested, biases": (7, 2, 128, 64, 3, False, FourBitFormat("fp4", 32, True), Gate("gelu_tanh"), 3, True),
    "transposed": (7, 2, 128, 64, 3, True, FourBitFormat("nf4", 128), GATES[4], 3, True),
    "grid": (7, 2, 64, 96, 3, False, Fp8Format((32, 32)), Gate("silu"), 3, True),
    "grid cut short": (7, 2, 72, 40, 3, False, Fp8Format(), Gate("silu"), 3, False),
    "grid of a transposed class": (7, 2, 64, 96, 3, True, Mxfp4Format(), GATES[4], 3, True),
    "a scale for each row": (5, 2, 72, 40, 3, False, Fp8Format((1, 0), "bf16"), GATES[1], 2, False),
    "int8": (5, 2, 72, 96, 3, False, Int8Format(), Gate("silu"), 2, True),
    "int8 in groups": (5, 2, 64, 96, 3, True, Int8Format((1, 32), "bf16"), GATES[1], 2, False),
    "int4": (5, 2, 64, 96, 3, False, Int4Format((1, 32), "bf16"), Gate("silu"), 2, True),
    "two levels of scales": (5, 2, 64, 96, 3, False, Nvfp4Format(), Gate("silu"), 2, True),
    "two levels, rows in turn": (5, 2, 64, 40, 3, True, Nvfp4Format(is_inverse=True), GATES[1], 2, False),
    "16-bit": (7, 2, 40, 24, 3, True, None, GATES[3], 3, True),
    "unaligned blocks": (7, 2, 40, 24, 3, False, NF4, GATES[1], 3, False),
    "one of each": (1, 1, 40, 24, 1, False, None, Gate("silu"), 1, False),
    "square": (6, 2, 64, 32, 3, True, NF4, Gate("silu"), 2, False),
    "many rows, high rank": (90, 4, 64, 32, 5, False, NF4, Gate("silu"), 20, False),
    "more pairs than one program sorts": (150, 2, 64, 32, 3, False, NF4, Gate("silu"), 3, False),
}
FEW_TOKENS = {name: case for name, case in CASES.items() if case[0] <= 10}


@pytest.mark.parametrize("tuned", TILES, ids=lambda t: f"{'left' if t.weight_left else 'right'}-{t.decode_first}")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layer_and_all_gradients(case: tuple, tuned: GemmTiles, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, top_k, hidden, intermediate, num_experts, transposed, storage, gate, rank, has_bias = case

    monkeypatch.setattr(fused_steps, "choose_tiles", lambda *_: tuned)
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    stacks = tuple(
        random_stack((num_experts, *(shape[::-1] if transposed else shape)), transposed, storage) for shape in shapes
    )
    # on a GPU the second run replays the recording of the first, with other inputs and routing
    for _ in range(2 if DEVICE.type == "cuda" else 1):
        for found, expected in run_layer(num_tokens, top_k, stacks, gate, rank, has_bias, torch.float32):
            assert_close(found, torch.zeros_like(found) if expected is None else expected)


@pytest.mark.parametrize("case", FEW_TOKENS.values(), ids=FEW_TOKENS.keys())
@pytest.mark.parametrize("storage", [None, FourBitFormat("nf4", 64, True)], ids=["of the case", "nested"])
def test_forward_by_gemv(case: tuple, storage: FourBitFormat | None, monkeypatch: pytest.MonkeyPatch) -> None:
    num_tokens, top_k, hidden, intermediate, num_experts, transposed, of_case, gate, rank, has_bias = case
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    stacks = tuple(
        random_stack((num_experts, *(shape[::-1] if transposed else shape)), transposed, storage or of_case)
        for shape in shapes
    )
    ran = []
    monkeypatch.setattr(
        fused_experts_module, "experts_forward_gemv", lambda *a: ran.append(1) or experts_forward_gemv(*a)
    )
    for most_pairs in (0, 100):
        monkeypatch.setattr(fused_steps, "most_pairs_without_sorting", lambda *_, most_pairs=most_pairs: most_pairs)
        torch.manual_seed(3)
        found, expected = run_layer(num_tokens, top_k, stacks, gate, rank, has_bias, torch.float32, backward=False)[0]
        assert_close(found, expected)
    assert len(ran) == fits_gemv(*map(packed_weight, stacks))


def test_recording_is_replayed_with_other_inputs() -> None:
    def copy(num_bytes: int, addresses: list[int], _stream: int) -> None:
        source, target = addresses
        ctypes.memmove(target, source, num_bytes)

    first = torch.arange(8.0)
    recorder = LaunchRecorder([first, None])
    middle, result = torch.empty(8), torch.empty(4)
    recorder.add_allocation(middle)
    recorder.add_launch(partial(copy, 32), [first, middle])
    recorder.add_allocation(result)
    recorder.add_launch(partial(copy, 16), [middle[4:], result])
    recorder.finish([result, None], "extra")
    for again in (torch.rand(8), torch.rand(8)):
        out, absent = recorder.replay([again.data_ptr(), 0])
        assert torch.equal(out, again[4:])
        assert absent is None
        assert out.data_ptr() != result.data_ptr()
    with pytest.raises(ValueError, match="neither an input nor allocated while recording"):
        recorder.add_launch(copy, [torch.rand(3)])


@pytest.mark.gpu
def test_replay_in_a_new_thread() -> None:
    arguments = layer_arguments()
    with torch.no_grad():
        expected = [fused_experts(**arguments) for _ in range(2)]
        torch.cuda.synchronize()
        found = []
        thread = threading.Thread(target=torch.no_grad()(lambda: found.append(fused_experts(**arguments))))
        thread.start()
        thread.join()
    assert torch.equal(found[0], expected[0])


@pytest.mark.gpu
def test_replay_equals_the_first_run_bitwise() -> None:
    stacks = random_stack((5, 128, 64), False, NF4), random_stack((5, 64, 64), False, FourBitFormat("fp4", 64, True))
    runs = []
    for _ in range(3):
        torch.manual_seed(2)
        runs.append([found for found, _ in run_layer(30, 2, stacks, Gate("silu"), 3, True, torch.float32)])
        run_layer(30, 2, stacks, Gate("silu"), 3, True, torch.float32)  # other inputs in between
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again))


def test_unneeded_gradients_are_not_computed() -> None:
    stacks = random_stack((3, 64, 64), False, NF4), random_stack((3, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    x = torch.randn(4, 64, device=DEVICE)
    ids, top_k_weights = random_ids(4, 2, 3), torch.rand(4, 2, device=DEVICE)
    factors = [
        torch.randn(3, *shape, device=DEVICE, requires_grad=True) for shape in ((2, 64), (64, 2), (2, 32), (64, 2))
    ]
    terms = Factors(*factors[:2], 1.0), Factors(*factors[2:], 1.0)
    fused_experts(x, ids, top_k_weights, *weights, Gate("silu"), *terms).sum().backward()
    assert x.grad is None
    assert all(factor.grad is not None for factor in factors)
    frozen = [Factors(A.detach(), B.detach(), scaling) for A, B, scaling in terms]
    x.requires_grad_()
    fused_experts(x, ids, top_k_weights, *weights, Gate("silu"), *frozen).sum().backward()
    assert x.grad is not None


def test_equal_inputs_give_equal_bits() -> None:
    stacks = random_stack((3, 64, 64), False, NF4), random_stack((3, 64, 32), False, NF4)
    runs = []
    for _ in range(3):
        torch.manual_seed(1)
        runs.append([found for found, _ in run_layer(40, 2, stacks, Gate("silu"), 3, False, torch.float32)])
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [16, 512, 4096, 16384])
@pytest.mark.parametrize("transposed", [False, True])
def test_equal_inputs_give_equal_bits_at_real_sizes(num_tokens: int, transposed: bool) -> None:
    """A race condition would change bits; with the tiles of the table, on a busy device."""
    num_experts, hidden, intermediate, top_k = 64, 2048, 768, 8
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    weights = [
        packed_weight(random_stack((num_experts, *(shape[::-1] if transposed else shape)), transposed, NF4))
        for shape in shapes
    ]
    x, ids = torch.randn(num_tokens, hidden, device=DEVICE).bfloat16(), random_ids(num_tokens, top_k, num_experts)
    top_k_weights, grad = torch.rand(num_tokens, top_k, device=DEVICE), torch.randn_like(x)
    factors = [
        torch.randn(num_experts, *size, device=DEVICE)
        for size in ((16, hidden), (2 * intermediate, 16), (16, intermediate), (hidden, 16))
    ]
    inputs = [tensor.requires_grad_() for tensor in (x, top_k_weights, *factors)]
    runs = []
    for _ in range(8):
        terms = Factors(*factors[:2], 1.0), Factors(*factors[2:], 1.0)
        out = fused_experts(x, ids, top_k_weights, *weights, Gate("silu"), *terms)
        runs.append([out, *torch.autograd.grad(out, inputs, grad)])
    for again in runs[1:]:
        assert all(torch.equal(first, second) for first, second in zip(runs[0], again))


REAL_SHAPES = {
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "gpt-oss-20b": (32, 2880, 2880, 4),
    "Mixtral 8x7B": (8, 4096, 1792, 2),  # an eighth of its width
}


@pytest.mark.gpu
@pytest.mark.parametrize("storage", [NF4, FourBitFormat("fp4", 64, True), Fp8Format(), Mxfp4Format(), None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 16, 300, 3000])
@pytest.mark.parametrize("shape", REAL_SHAPES.values(), ids=REAL_SHAPES.keys())
def test_real_shapes_in_16_bits(
    shape: tuple[int, int, int, int], num_tokens: int, dtype: torch.dtype, storage: Format | None
) -> None:
    num_experts, hidden, intermediate, top_k = shape
    transposed = hidden == intermediate
    shapes = ((2 * intermediate, hidden), (hidden, intermediate))
    stacks = []
    for rows, columns in (shape[::-1] if transposed else shape for shape in shapes):
        weight = torch.randn(num_experts, rows, columns, device=DEVICE, dtype=dtype) * 0.02
        stack = DenseStack(weight, transposed)
        parts = 2 if len(stacks) == 0 and not transposed else 1
        stacks.append(stack if storage is None else QuantizedStack.from_dense(weight, transposed, storage, parts))
    # gpt-oss's gate has a nonzero mean, so errors of the weights that have a mean accumulate
    gate = Gate("swiglu_oai", limit=7.0, alpha=1.702) if transposed else Gate("silu")
    limit = 6e-3 if dtype == torch.bfloat16 else 1.5e-3
    for index, (found, expected) in enumerate(run_layer_by_expert(num_tokens, top_k, tuple(stacks), gate, dtype)):
        if num_tokens > 1:
            assert_close(found, expected, limit)
        elif index != 3:
            assert_close(found, expected, 2 * limit)  # a few values each
        # the gradients of one token's weights are single dot products, which may cancel to zero


def run_layer_by_expert(
    num_tokens: int, top_k: int, stacks: tuple[Stack, Stack], gate: Gate, dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """As `run_layer`, but the reference processes one expert at a time; the output without gradients is first."""
    up, down = stacks
    num_experts, hidden, intermediate, rank = up.num_experts, up.in_features, down.in_features, 8
    shapes = ((rank, hidden), (2 * intermediate, rank), (rank, intermediate), (hidden, rank))
    factors = [(torch.randn(num_experts, *shape, device=DEVICE) * 0.02).requires_grad_() for shape in shapes]
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype).requires_grad_()
    scores, ids = torch.topk(torch.randn(num_tokens, num_experts, device=DEVICE), top_k)
    weights = torch.softmax(scores, -1).requires_grad_()
    grad = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    terms = Factors(*factors[:2], 2.0), Factors(*factors[2:], 2.0)
    arguments = (x, ids, weights, packed_weight(up), packed_weight(down), gate, *terms)
    with torch.no_grad():
        generated = fused_experts(*arguments)
    out = fused_experts(*arguments)
    found = [generated, out, *torch.autograd.grad(out, [x, weights, *factors], grad)]

    inputs = [tensor.detach().float().requires_grad_() for tensor in (x, weights, *factors)]
    x, weights, A_up, B_up, A_down, B_down = inputs
    expected = torch.zeros(num_tokens, hidden, device=DEVICE)
    for expert in range(num_experts):
        token, choice = torch.where(ids == expert)
        if not token.numel():
            continue
        W_up, W_down = (stack.decode_expert(expert, torch.float32) for stack in stacks)
        if up.is_transposed:
            W_up, W_down = W_up.T, W_down.T
        inner = x[token] @ (W_up + 2 * B_up[expert] @ A_up[expert]).T
        hidden_rows = gated(inner, gate)
        rows = hidden_rows @ (W_down + 2 * B_down[expert] @ A_down[expert]).T
        expected = expected.index_add(0, token, rows * weights[token, choice, None])
    return list(zip(found, [expected, expected, *torch.autograd.grad(expected, inputs, grad.float())]))


@pytest.mark.gpu
def test_under_torch_compile_without_a_graph_break() -> None:
    stacks = random_stack((4, 64, 64), False, NF4), random_stack((4, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    ids = random_ids(20, 2, 4)

    def layer(x: torch.Tensor, top_k_weights: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        terms = Factors(*factors[:2], 0.5), Factors(*factors[2:], 2.0)
        return fused_experts(x * 2, ids, top_k_weights, *weights, Gate("silu"), *terms) + 1

    inputs = [torch.randn(20, 64, device=DEVICE), torch.rand(20, 2, device=DEVICE)]
    inputs += [torch.randn(4, *shape, device=DEVICE) for shape in ((3, 64), (64, 3), (3, 32), (64, 3))]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    grad = torch.randn(20, 64, device=DEVICE)
    expected = layer(*inputs)
    expected_grads = torch.autograd.grad(expected, inputs, grad)
    found = torch.compile(layer, fullgraph=True)(*inputs)
    found_grads = torch.autograd.grad(found, inputs, grad)
    for a, b in zip([found, *found_grads], [expected, *expected_grads]):
        assert_close(a, b, 1e-6)


def test_generation_under_torch_compile_uses_gemv(monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = random_stack((4, 128, 64), False, NF4), random_stack((4, 64, 64), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    factors = [torch.randn(4, *shape, device=DEVICE) for shape in ((3, 64), (128, 3), (3, 64), (64, 3))]
    terms = Factors(*factors[:2], 0.5), Factors(*factors[2:], 2.0)
    monkeypatch.setattr(fused_op, "experts_forward_gemv", Mock(side_effect=experts_forward_gemv))

    def layer(x: torch.Tensor, ids: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return fused_experts(x * 2, ids, top_k_weights, *weights, Gate("silu"), *terms) + 1

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for num_tokens, runs in ((3, 1), (5, 2), (60, 2)):
            x, ids = torch.randn(64, num_tokens, device=DEVICE).T, random_ids(num_tokens, 2, 4)
            top_k_weights = torch.rand(num_tokens, 2, device=DEVICE)
            assert_close(compiled(x, ids, top_k_weights), layer(x, ids, top_k_weights))
            assert fused_op.experts_forward_gemv.call_count == runs


@pytest.mark.gpu
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_gradient_checkpointing_and_autocast(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    stacks = random_stack((4, 64, 64), False, NF4), random_stack((4, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    ids, top_k_weights = random_ids(20, 2, 4), torch.rand(20, 2, device=DEVICE, requires_grad=True)
    x = torch.randn(20, 64, device=DEVICE, requires_grad=True)

    def layer(x: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        return fused_experts(x, ids, top_k_weights, *weights, Gate("silu"))

    with torch.autocast("cuda", dtype=torch.bfloat16):
        plain = torch.autograd.grad(layer(x, top_k_weights).sum(), [x, top_k_weights])
        again = checkpoint(layer, x, top_k_weights, use_reentrant=use_reentrant)
    again.sum().backward()
    assert torch.equal(x.grad, plain[0])
    assert torch.equal(top_k_weights.grad, plain[1])


@pytest.mark.gpu
def test_capture_in_a_cuda_graph_and_replay_with_other_routing() -> None:
    stacks = random_stack((4, 64, 64), False, NF4), random_stack((4, 64, 32), False, NF4)
    weights = [packed_weight(stack) for stack in stacks]
    x, ids, top_k_weights = (
        torch.randn(600, 64, device=DEVICE),
        random_ids(600, 2, 4),
        torch.rand(600, 2, device=DEVICE),
    )
    fused_experts(x, ids, top_k_weights, *weights, Gate("silu"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_experts(x, ids, top_k_weights, *weights, Gate("silu"))
    ids.copy_(random_ids(600, 2, 4))
    ids[:400] = 3
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, fused_experts(x, ids, top_k_weights, *weights, Gate("silu")))


def layer_arguments() -> dict:
    """Valid arguments of a small layer."""
    up, down = random_stack((3, 64, 64), False, NF4), random_stack((3, 64, 32), False, NF4)
    A_up, B_up, A_down, B_down = (torch.randn(3, *s, device=DEVICE) for s in ((2, 64), (64, 2), (2, 32), (64, 2)))
    return {
        "hidden_states": torch.randn(4, 64, device=DEVICE),
        "top_k_index": random_ids(4, 2, 3),
        "top_k_weights": torch.rand(4, 2, device=DEVICE),
        "up": packed_weight(up),
        "down": packed_weight(down),
        "gate": Gate("silu"),
        "up_factors": Factors(A_up, B_up, 1.0),
        "down_factors": Factors(A_down, B_down, 1.0),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hidden_states", lambda x: x[:, :32], "hidden_states has shape"),
        ("hidden_states", lambda x: x[:3], "top_k_index has shape"),
        ("top_k_weights", lambda w: w[:, :1], "top_k_weights has shape"),
        ("up_factors", lambda f: f._replace(A=f.A[..., :32]), "factor A has shape"),
        ("down_factors", lambda f: f._replace(B=f.B[..., :1]), "factor B has shape"),
        ("up_factors", lambda f: f._replace(A=f.A[:2], B=f.B[:2]), "factor A has shape"),
        ("up_factors", lambda f: Factors(f.A[:, :0], f.B[..., :0], 1.0), "Factors of rank 0"),
        ("down", lambda w: w._replace(columns=64), "Expected those of gated experts"),
    ],
)
def test_invalid_arguments_are_rejected(name: str, change: object, message: str) -> None:
    arguments = layer_arguments()
    fused_experts(**arguments)
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        fused_experts(**arguments)


def test_unusual_strides() -> None:
    arguments = layer_arguments()
    expected = fused_experts(**arguments)
    odd = dict(arguments)
    odd["hidden_states"] = arguments["hidden_states"].T.contiguous().T
    odd["top_k_index"] = arguments["top_k_index"].T.contiguous().T
    odd["up_factors"] = arguments["up_factors"]._replace(A=arguments["up_factors"].A.mT.contiguous().mT)
    assert torch.equal(fused_experts(**odd), expected)
    bias = torch.randn(3, 64, device=DEVICE)
    with_bias = fused_experts(**arguments, down_bias=bias)
    assert torch.equal(fused_experts(**arguments, down_bias=bias.T.contiguous().T), with_bias)
    weight = torch.randn(3, 64, 64, device=DEVICE)
    stacks = DenseStack(weight, False), DenseStack(weight.mT.contiguous().mT, False)
    first, second = (fused_experts(**{**arguments, "up": packed_weight(stack)}) for stack in stacks)
    assert torch.equal(first, second)


@pytest.mark.parametrize("kind", ["clamped_silu", "swiglu_oai"])
def test_clamped_gates_propagate_nan(kind: str) -> None:
    x = torch.full((1, 64), float("nan"), device=DEVICE)
    assert apply_gate(x, Gate(kind, limit=1.0, alpha=1.0)).isnan().all()


def test_overlapping_inputs_are_detected() -> None:
    x = torch.randn(8, device=DEVICE)
    assert LaunchRecorder([x, None, x]).has_overlapping_inputs()
    assert LaunchRecorder([x[:4], x[3:]]).has_overlapping_inputs()
    assert not LaunchRecorder([x[:4], None, x[4:]]).has_overlapping_inputs()
