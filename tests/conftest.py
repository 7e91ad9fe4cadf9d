"""Shared fixtures: devices, seeds and tiny models."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers

if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined; kernels then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    # what was imported lives to the end; garbage collection, an eighth of the time otherwise, need not visit it
    gc.collect()
    gc.freeze()


NO_FORMULA = "experts classes without a formula in tests/per_token.py, held against their own forward"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for of_outcome in terminalreporter.stats.values() for report in of_outcome]
    properties = [entry for report in reports for entry in getattr(report, "user_properties", ())]
    names = sorted({value for name, value in properties if name == NO_FORMULA})
    if names:
        terminalreporter.section(NO_FORMULA)
        terminalreporter.write_line(", ".join(names))


def pytest_configure() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # products this small gain nothing from threads, which only wait for each other
    torch.set_num_threads(1)
    # fp32 tests on a GPU use full fp32 products, not TF32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def graphs_by_calls(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain calls replace captures of decoder layers without a GPU."""
    # not at the top, as below
    from calling_backend import CallingBackend

    from peft_moe_qlora.training import layer_runner

    if device == "cpu":
        monkeypatch.setattr(layer_runner, "GRAPHS_BACKEND", CallingBackend)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Liger itself; the classes of transformers that it replaces are restored."""
    module = pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    for name in ("Qwen3MoeExperts", "Qwen3MoeRMSNorm", "apply_rotary_pos_emb"):
        monkeypatch.setattr(modeling_qwen3_moe, name, getattr(modeling_qwen3_moe, name))
    causal_lm = modeling_qwen3_moe.Qwen3MoeForCausalLM
    monkeypatch.setattr(causal_lm, "forward", causal_lm.forward)
    return module


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """Directory with a trained base and a trained adapter, and a text in the adapter's language."""
    # not at the top: modules that define kernels must be imported after the interpreter is chosen
    from trained_model import save_trained, sentences

    directory = tmp_path_factory.mktemp("trained")
    save_trained(directory)
    return directory, sentences(2, 64, 24, torch.Generator().manual_seed(9))
