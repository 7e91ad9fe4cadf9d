"""The benchmark of the training step runs from end to end on a CPU, and its parts give correct figures."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"

KERNELS = {
    "_grouped_gemm_kernel": "products of experts",
    "specialized_gemm_kernel": "products of experts",
    "void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x<cutlass::gemm::kernel::GemmUniversal<"
    "cutlass::gemm::GroupProblemShape<cute::tuple<int, int, int> >": "products of experts",
    "_reduce_kernel": "reductions to the rank",
    "_factor_gradient_kernel": "gradients of factors",
    "_sum_of_runs_kernel": "gradients of factors",
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)": "decoding",
    "_decode_flat_kernel": "decoding",
    "_gate_backward_kernel": "routing, gate, combining",
    "_gate_factors_kernel": "routing, gate, combining",
    "_sum_of_parts_kernel": "routing, gate, combining",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 7, false>": "routing, gate, combining",
    "void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>": "routing, gate, combining",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, cutlass::bfloat16_t>": "attention",
    "fmha_cutlassB_bf16_aligned_64x64_k128_sm80": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": "linear layers",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>": "linear layers",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float>": "linear layers",
    "sm80_xmma_gemm_f32f32_f32f32_f32_tn_n_tilesize32x32x8_stage3_execute_kernel__5x_cublas": "linear layers in fp32",
    "void cutlass::Kernel2<cutlass_80_simt_sgemm_128x32_8x5_nn_align1>": "linear layers in fp32",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>": (
        "norms, rotary, elementwise"
    ),
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps": (
        "norms, rotary, elementwise"
    ),
    "triton_red_fused__softmax__to_copy_add_mean_mul_pow_rsqrt_3": "norms, rotary, elementwise",
    "_rms_norm_forward_kernel": "norms, rotary, elementwise",
    "_triton_rope": "norms, rotary, elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)": (
        "casts and copies"
    ),
    "Memcpy DtoD (Device -> Device)": "casts and copies",
    "Memset (Device)": "casts and copies",
    "liger_cross_entropy_kernel": "head and loss",
    "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d<float>": "head and loss",
    "void kOptimizerStatic8bit2StateBlockwise<float, 0, 256, 1>": "optimizer",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<TensorListMetadata, FusedAdamMathFunctor": (
        "optimizer"
    ),
    "a_kernel_of_the_future": "other",
}


@pytest.fixture(autouse=True)
def in_process(monkeypatch) -> None:
    """Lets a test import the benchmark's modules."""
    monkeypatch.syspath_prepend(str(FOLDER))


def run(*arguments: object) -> object:
    """The results of a run in this process."""
    from layer import device_name
    from step import Benchmark, parse_arguments
    from step_results import StepResults

    small = ["--device", "cpu", "--shapes", "tiny", "--tokens", "16", "--steps", "1", "--warmup", "1"]
    args = parse_arguments([*small, *map(str, arguments)])
    benchmark = Benchmark(args, StepResults(device_name(torch.device("cpu")), {}, {}))
    modes = {
        "check": benchmark.run_check,
        "optimizers": benchmark.run_optimizers,
        "generate": benchmark.run_generation,
    }
    next((call for name, call in modes.items() if getattr(args, name)), benchmark.run_steps)()
    assert benchmark.failures == 0
    return benchmark.results


# ---- names of kernels


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_classified_by_name(name):
    from kernel_categories import category

    assert category(name) == KERNELS[name]


def test_every_kernel_of_the_package_has_a_category():
    from kernel_categories import OTHER, category

    pattern = re.compile(r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\(", re.MULTILINE)
    found = [name for file in ROOT.glob("peft_moe_qlora/**/*.py") for name in pattern.findall(file.read_text())]
    assert len(found) >= 15
    assert [name for name in found if category(name) == OTHER] == []


def test_annotations_are_not_kernels():
    from kernel_categories import is_annotation

    assert is_annotation("Optimizer.step#AdamW8bit.step")
    assert is_annotation("ProfilerStep*")
    assert not any(is_annotation(name) for name in KERNELS)


def test_times_of_a_part_are_subtracted_by_name():
    from kernel_categories import KernelTime, by_category, total, unclassified, without

    whole = {"nvjet_a": KernelTime(10.0, 5), "nvjet_b": KernelTime(7.0, 2), "strange": KernelTime(1.0, 1)}
    head = {"nvjet_a": KernelTime(4.0, 2), "nvjet_b": KernelTime(6.0, 2)}
    rest = without(whole, head)
    assert rest == {"nvjet_a": KernelTime(6.0, 3), "strange": KernelTime(1.0, 1)}
    assert by_category(rest) == {"linear layers": 6.0, "other": 1.0}
    assert total(whole) - total(rest) == 11.0
    assert unclassified(whole) == [("strange", 1.0, 1)]


# ---- arms


def test_arms_are_parsed_with_their_settings():
    from step_settings import parse_arm

    arm = parse_arm("ours+graphs+keep-experts+compile", "nf4/64+dq")
    assert str(arm) == "ours+compile+graphs+keep-experts"
    assert arm.prepare_options == {
        "use_gradient_checkpointing": "keep-experts",
        "compile_layers": True,
        "cuda_graphs": True,
    }
    assert str(parse_arm("ours+graphs+bf16-factors").plain) == "ours+bf16-factors"
    assert parse_arm("ours").prepare_options == {"use_gradient_checkpointing": True}
    assert parse_arm("attention", "nf4/64").storage is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("theirs", "unknown arm"),
        ("ours+fast", "unknown setting"),
        ("ours+keep-experts+no-checkpointing", "mutually exclusive"),
        ("peft+graphs", "requires an arm of this package"),
        ("ours+graphs+reentrant", "reentrant requires torch"),
    ],
)
def test_invalid_arms_are_rejected(text, message):
    from step_settings import parse_arm

    with pytest.raises(ValueError, match=message):
        parse_arm(text)


def test_arms_run_before_those_that_patch_more():
    from step_settings import in_order, parse_arm

    arms = [parse_arm(text) for text in ("ours+liger", "ours", "ours+liger-head", "attention")]
    assert [str(arm) for arm in in_order(arms)] == ["ours", "attention", "ours+liger-head", "ours+liger"]
    for arm in ("ours+liger", "ours+liger-head"):
        with pytest.raises(ValueError, match="--beside"):
            in_order([parse_arm(arm), parse_arm("unsloth")])


def test_unsupported_liger_models_are_rejected():
    from step_models import apply_liger

    with pytest.raises((ValueError, ImportError), match="liger"):
        apply_liger("olmoe")


# ---- models


def build(arm: str, shape: str = "tiny", **options: object):
    from step_models import build as build_model
    from step_settings import Plan, parse_arm

    return build_model(Plan(shape, parse_arm(arm, "nf4/64+dq"), 8, 4, **options))


def test_layers_have_equal_experts_and_different_routers():
    model = build("ours")
    first, second = (layer.mlp for layer in model.get_base_model().model.layers)
    for name in ("gate_up_proj", "down_proj"):
        codes = [block.experts.get_submodule(name).get_base_layer().codes for block in (first, second)]
        assert torch.equal(*codes)
        assert codes[0].data_ptr() != codes[1].data_ptr()
    assert first.experts.config is second.experts.config if hasattr(first.experts, "config") else True
    assert not torch.equal(first.gate.weight, second.gate.weight)


@pytest.mark.parametrize("shape", ["tiny", "tiny-gpt-oss"])
@pytest.mark.parametrize("arm", ["ours", "ours-bf16", "peft"])
def test_experts_have_their_own_rank(arm, shape):
    from step_models import factors

    shapes = [tuple(factor.shape) for name, factor in factors(build(arm, shape)) if ".experts." in name]
    ranks = {min(shape[-2:]) if len(shape) == 3 else min(shape) // 4 for shape in shapes}
    assert len(shapes) == 8
    assert ranks == {4}


@pytest.mark.parametrize("arm", ["ours", "ours+graphs", "attention"])
def test_separate_head_gives_the_models_loss(arm):
    from step_models import head_alone

    model = build(arm, dtype="float32").eval()
    ids = torch.randint(0, 128, (1, 16))
    hidden_states = []
    handle = model.get_base_model().model.norm.register_forward_hook(lambda _, args, out: hidden_states.append(out))
    expected = model(input_ids=ids, labels=ids).loss
    handle.remove()
    decoder = model.get_base_model().model
    found = head_alone(model, hidden_states[0])(input_ids=ids, labels=ids).loss
    assert torch.equal(found, expected)
    assert model.get_base_model().model is decoder
    assert torch.equal(model(input_ids=ids, labels=ids).loss, expected)


def test_models_of_equal_plans_are_equal_and_noise_is_small():
    from step_models import factors

    one, other, noisy = (dict(factors(build("ours", noise=noise))) for noise in (0.0, 0.0, 1e-3))
    for name, factor in one.items():
        assert torch.equal(factor, other[name])
        assert 0 < (noisy[name] - factor).norm() / factor.norm() < 2e-3


# ---- the command


def test_command_writes_table_json_and_picture(tmp_path):
    arguments = ["--device", "cpu", "--shapes", "tiny", "--tokens", 16, 24, "--steps", 2, "--warmup", 1]
    arguments += ["--arms", "ours", "attention", "--expert-rank", 4, "--host", 3]
    arguments += ["--json", tmp_path / "step.json", "--picture", tmp_path / "step.png"]
    # a file of an earlier version, shown next to this run
    arguments += ["--beside", FOLDER / "results" / "h200-step.json"]
    command = [sys.executable, str(FOLDER / "step.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "step.json").read_text())["steps"]
    assert [(row["arm"], row["tokens"]) for row in rows] == [
        ("ours", 16),
        ("ours", 24),
        ("attention", 16),
        ("attention", 24),
    ]
    for row in rows:
        assert row["least_milliseconds"] <= row["milliseconds"]
        assert row["tokens_per_second"] == pytest.approx(1e3 * row["tokens"] / row["milliseconds"], rel=1e-3)
        assert 4 < row["loss"] < 6
        assert len(row["host_calls"]) == 3
    for text in ("ours nf4/64+dq", "attention", "the host's step", "measured on NVIDIA H200"):
        assert text in done.stdout
    assert (tmp_path / "step.png").read_bytes().startswith(b"\x89PNG")


def test_every_arm_takes_a_step():
    arms = ["ours", "ours-bf16", "attention", "peft", "ours+no-checkpointing+bf16-factors"]
    rows = run("--shapes", "tiny", "tiny-gpt-oss", "--arms", *arms).steps
    assert len(rows) == 2 * len(arms)
    for row in rows:
        assert row.note == ""
        assert row.milliseconds > 0
    trained = {row.arm: row.trained_parameters for row in rows if row.shape == "tiny"}
    assert trained["ours"] == trained["ours-bf16"] == trained["peft"] > trained["attention"] > 0


def test_storages_alternate():
    rows = run("--storages", "nf4/64", "fp8/32x32", "--rounds", 2, "--expert-rank", 2, 4).steps
    found = {(row.storage, row.expert_rank) for row in rows}
    assert found == {(storage, rank) for storage in ("nf4/64", "fp8/32x32") for rank in (2, 4)}
    assert len(rows) == 4


def test_losses_match_the_plain_path():
    arms = ["ours+no-checkpointing", "ours+keep-experts", "ours+reentrant"]
    rows = run("--check", 6, "--dtype", "float32", "--lr", 1e-3, "--arms", *arms).losses
    plain, noise, *others = rows
    assert plain.largest_difference is None
    assert plain.losses[0] > plain.losses[4] - 1
    assert 0 < noise.largest_difference < 1e-4
    assert [row.arm for row in others] == arms
    for row in others:
        assert len(row.losses) == 6
        assert row.largest_difference < 1e-5


def test_other_factor_dtypes_have_their_own_reference():
    rows = run("--check", 2, "--eps", 1e-6, "--arms", "ours", "ours+bf16-factors+no-checkpointing").losses
    names = [row.arm for row in rows]
    assert names[:2] == ["ours: the plain path", "ours+bf16-factors: the plain path"]
    assert names[-1] == "ours+no-checkpointing+bf16-factors"
    assert rows[-1].largest_difference == 0


def test_optimizers_are_compared():
    from step_results import optimizer_table

    results = run("--optimizers", "adamw", "adamw-fused", "adamw8bit", "--layers", 3)
    costs = {cost.optimizer: cost for cost in results.optimizers}
    assert set(costs) == {"adamw", "adamw-fused", "adamw8bit"}
    assert len({cost.parameters for cost in costs.values()}) == 1
    assert costs["adamw-fused"].difference < 1e-5
    assert 0 < costs["adamw8bit"].difference < 0.2
    assert "adamw8bit" in optimizer_table(results.optimizers)


def test_missing_package_is_named():
    from step_optimizers import OPTIMIZERS, make_optimizer

    def missing(parameters, lr):
        raise ModuleNotFoundError("no", name="some_package")

    try:
        OPTIMIZERS["missing"] = missing
        with pytest.raises(ImportError, match="requires some_package"):
            make_optimizer("missing", [], 1.0)
    finally:
        del OPTIMIZERS["missing"]


def test_generation_with_the_adapter_on_off_and_merged():
    from step_results import generation_table

    caches = "dynamic", "captured", "reused"
    rows = run(
        "--generate",
        3,
        "--prompt",
        4,
        "--batches",
        2,
        "--adapters",
        "on",
        "off",
        "merged",
        "--caches",
        *caches,
    )
    assert rows.notes == []
    found = [(row.adapter, row.cache) for row in rows.generation]
    assert found == [(adapter, cache) for adapter in ("on", "off", "merged") for cache in caches]
    for row in rows.generation:
        assert row.milliseconds_per_token > 0
    assert "merged" in generation_table(rows.generation)


def test_card_table_shows_what_fits():
    from step_results import StepRow, card_table

    fits = StepRow("tiny", milliseconds=3.0, tokens=16, peak_gib=2.0, warmup_peak_gib=3.0)
    too_large = StepRow("tiny", tokens=32, note="out of memory")
    table = card_table([fits, too_large], 22.5)
    assert table.startswith("22.5 GiB allowed")
    assert re.search(r"16 .* yes .* 3\.00", table)
    assert re.search(r"32 .*out of memory", table)


def test_card_requires_a_gpu(capsys):
    from step import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--card", "24", "--device", "cpu"])
    assert "--card requires a GPU" in capsys.readouterr().err


def test_results_of_other_benchmarks_are_rejected(tmp_path):
    from step_results import load_steps

    (tmp_path / "layer.json").write_text(json.dumps({"rows": []}))
    with pytest.raises(ValueError, match=r"layer\.json has no steps"):
        load_steps([tmp_path / "layer.json"])


@pytest.mark.gpu
def test_time_is_split_on_a_gpu():
    from step import Benchmark, parse_arguments
    from step_results import StepResults

    args = parse_arguments(["--shapes", "tiny", "--tokens", "64", "--steps", "2", "--arms", "ours", "attention"])
    benchmark = Benchmark(args, StepResults("", {}, {}))
    benchmark.run_steps()
    assert benchmark.failures == 0
    for row in benchmark.results.steps:
        assert sum(row.split.values()) == pytest.approx(row.device_milliseconds)
        assert row.split.get("other", 0.0) < 0.1 * row.device_milliseconds
        assert {"attention", "linear layers", "head and loss", "optimizer", "products of experts"} <= set(row.split)
        assert row.kernels >= row.launches > 0
        assert row.device_milliseconds < row.milliseconds
