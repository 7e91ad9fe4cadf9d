"""The simulator of Gluon kernels notices mistakes of a small kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from gluon_on_cpu import launch_on_cpu
from kernel_cases import relative_error
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from peft_moe_qlora.ops.kernels.specialized_copy import copy_async


@gluon.jit
def _copy_steps(X, ring, full, empty, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    place = X + row * 64 + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)), 0)
    for step in range(STEPS + 1 if MISTAKE == "one step more" else STEPS):
        stage = step % 2
        if MISTAKE != "copies early":
            mbarrier.wait(empty.index(stage), step // 2 % 2 ^ 1)
        copy_async(ring.index(stage), place + step * 64 * 64)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        if MISTAKE == "arrives again":
            mbarrier.arrive(full.index(stage))


@gluon.jit
def _multiply_steps(W, OUT, ring, full, empty, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    row = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(1, LAYOUT)), 1)
    place = row * 64 + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)), 0)
    weights = gl.convert_layout(gl.load(W + place), gl.DotOperandLayout(0, LAYOUT, 2))
    acc = gl.zeros([64, 64], gl.float32, LAYOUT)
    for step in range(STEPS):
        stage = step % 2
        if MISTAKE != "reads early":
            mbarrier.wait(full.index(stage), step // 2 % 2)
        if MISTAKE != "no fence":
            fence_async_shared()
        acc = warpgroup_mma(weights, ring.index(stage), acc, is_async=True)
        if MISTAKE == "frees early":
            mbarrier.arrive(empty.index(stage))
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        if MISTAKE != "frees early" and MISTAKE != "never frees":
            mbarrier.arrive(empty.index(stage))
    gl.store(OUT + gl.program_id(0) * 64 * 64 + place, acc)


@gluon.jit
def _sum_of_products(X, W, OUT, STEPS: gl.constexpr, MISTAKE: gl.constexpr):
    """The sum of `W` times each of `STEPS` matrices, in each program."""
    SHARED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16)
    ring = gl.allocate_shared_memory(X.dtype.element_ty, [2, 64, 64], SHARED)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(full.index(stage), 128)
        mbarrier.init(empty.index(stage), 1)
    gl.warp_specialize(
        [
            (_multiply_steps, (W, OUT, ring, full, empty, STEPS, MISTAKE)),
            (_copy_steps, (X, ring, full, empty, STEPS, MISTAKE)),
        ],
        [4],
        [64],
    )


def sum_of_products(mistake: str) -> bool:
    """Whether the result of a kernel with this mistake is right in all programs."""
    x, w = torch.randn(7, 64, 64).half(), torch.randn(64, 64).half()
    out = torch.empty(3, 64, 64)
    launch_on_cpu(_sum_of_products, (3,), (x, w, out), (), STEPS=7, MISTAKE=mistake)
    return all(relative_error(one, w.float() @ x.float().sum(0)) < 1e-5 for one in out)


def test_simulated_warps() -> None:
    assert sum_of_products("")


@pytest.mark.parametrize("mistake", ["copies early", "reads early", "frees early"])
def test_accesses_in_a_wrong_order_are_noticed(mistake: str) -> None:
    try:
        assert not sum_of_products(mistake)
    except RuntimeError as error:
        assert "barrier" in str(error)  # noqa: PT017 - an error or a wrong result


@pytest.mark.parametrize(
    ("mistake", "error", "message"),
    [
        ("one step more", IndexError, "outside"),
        ("never frees", RuntimeError, "deadlock"),
        ("arrives again", RuntimeError, "arrivals"),
        ("no fence", RuntimeError, "fence"),
    ],
)
def test_other_mistakes_are_errors(mistake: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sum_of_products(mistake)
