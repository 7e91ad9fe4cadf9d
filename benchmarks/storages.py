"""Trains an adapter on the quickstart's base in several storages, and merges each into its storage.

    pip install -e ".[examples]" && python benchmarks/storages.py --json storages.json --plot storages.png
    python benchmarks/storages.py --base-steps 30 --steps 20 --storages fp8/128x128 --directory DIR  # to try it out

All trainings use the same batches in the same order, the same initial factors and the same options. The base is saved
once in each storage; training and both merges use the saved base. With --directory, all files are kept, and existing
bases are reused.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import quickstart  # isort: skip - first, since it disables a warning of a library before its import

import peft
import torch
import transformers
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from plot import COLORS
from tabulate import tabulate
from torch import nn
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from peft_moe_qlora import MoeQLoraConfig, experts_report, load_quantized, prepare_model_for_training, quantize_experts
from peft_moe_qlora.merge import MergeReport, kl_divergence, merge_quantized, next_token_logits
from peft_moe_qlora.quantization import parse_format

BASELINE = "16 bits"
STORAGES = ("nf4/64", "fp8/128x128", "int8/channel", "mxfp4", "int4/32", "nvfp4")
ROUNDINGS = ("nearest", "second-order")
SMOOTHED = 20
"""Number of steps in the moving average of losses; fewer at the beginning."""
ADAPTER = {"r": 16, "lora_alpha": 32, "expert_r": 4, "target_modules": "all-linear"}
"""Options of the adapter, as in the quickstart."""


@dataclass
class Merge:
    """Results of a merge.

    Args:
        kl: mean KL divergence from the live adapter over the held-out tokens, in nats.
        unchanged: stacks and linear layers that the merge has not changed.
        error: largest relative L2 error of a merged stack against the exact one.
        delta_kept: smallest fraction of the delta in a merged stack.
        kl_of_experts: KL divergence if only the experts are rounded, over tokens with the same routing.
    """

    kl: float
    unchanged: int
    error: float
    delta_kept: float
    kl_of_experts: float | None = None

    @classmethod
    def of(cls, report: MergeReport, kl: float) -> Merge:
        kept = [stack.delta_kept for stack in report.stacks if stack.delta_kept is not None]
        unchanged = report.tensors_expected - report.tensors_changed
        return cls(kl, unchanged, max(stack.relative_error for stack in report.stacks), min(kept, default=0.0))


@dataclass
class Run:
    """Results of one storage.

    Args:
        storage: name of the format, or `BASELINE`.
        expert_bytes: bytes of codes and scales.
        training: loss of every step.
        held_out: number of steps -> loss on the held-out windows.
        largest_gap: largest absolute difference between the smoothed training losses and those in 16 bits.
        gap_at: step of the largest gap, starting at 1.
        held_out_gap: final held-out loss minus that in 16 bits.
        kl_of_base: KL divergence of the base without the adapter from the live adapter.
        kl_of_linear: KL divergence if only the linear layers are rounded, to 16 bits; over all tokens.
        rerouted: fraction of tokens that some layer routes to other experts than the live adapter does, if only the
            experts are rounded, by either rounding.
        merges: rounding -> merge into the storage.
        seconds: total time.
    """

    storage: str
    expert_bytes: int
    training: list[float]
    held_out: dict[int, float]
    largest_gap: float = 0.0
    gap_at: int = 0
    held_out_gap: float = 0.0
    kl_of_base: float | None = None
    kl_of_linear: float | None = None
    rerouted: float | None = None
    merges: dict[str, Merge] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def smoothed(self) -> list[float]:
        return quickstart.moving_average(self.training, SMOOTHED)

    @property
    def final(self) -> float:
        return self.held_out[len(self.training)]

    def compare(self, baseline: Run) -> None:
        """Sets the gaps relative to the baseline."""
        gaps = [abs(own - other) for own, other in zip(self.smoothed, baseline.smoothed, strict=True)]
        self.largest_gap = max(gaps)
        self.gap_at = gaps.index(self.largest_gap) + 1
        self.held_out_gap = self.final - baseline.final


def is_registered(name: str) -> bool:
    """Whether the package has a format with this name."""
    try:
        parse_format(name)
    except ValueError:
        return False
    return True


def folder_of(args: argparse.Namespace, kind: str, storage: str) -> Path:
    return args.directory / f"{kind}-{storage.replace('/', '-').replace(' ', '-')}"


def write_base(args: argparse.Namespace, storage: str) -> Path:
    """Saves the base with its experts in a storage, unless it exists; returns its directory."""
    if storage == BASELINE:
        return args.base
    folder = folder_of(args, "base", storage)
    if not folder.is_dir():
        model = quickstart.load(args.base, args.device)
        quantize_experts(model, storage=storage, progressbar=False)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.base).save_pretrained(folder)
    return folder


def load(folder: Path, storage: str, dtype: torch.dtype, device: str) -> nn.Module:
    """Loads a checkpoint in its storage, with `dtype` as its compute dtype."""
    if storage == BASELINE:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map=device)
    return load_quantized(str(folder), dtype=dtype, device_map=device)


def train(
    args: argparse.Namespace, storage: str, windows: quickstart.Windows, initial: dict[str, torch.Tensor]
) -> Run:
    """Trains an adapter and saves it.

    Args:
        args: options of the command.
        storage: storage of the experts.
        windows: data for training and evaluation.
        initial: initial factors of the first training; empty before it, which fills it.

    Raises:
        RuntimeError: the initial factors differ, so that trainings cannot be compared.
    """
    model = load(write_base(args, storage), storage, torch.bfloat16, args.device)
    loss_before = quickstart.evaluate(model, windows.held_out)
    prepare_model_for_training(model, use_gradient_checkpointing=False)
    how = {"quant_type": None} if storage == BASELINE else {"storage": storage}
    torch.manual_seed(args.seed)
    model = get_peft_model(model, MoeQLoraConfig(**ADAPTER, **how, task_type="CAUSAL_LM"))
    factors = {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}
    if not initial:
        initial.update(factors)
    different = [name for name in factors.keys() | initial.keys() if not _equal(factors.get(name), initial.get(name))]
    if different:
        raise RuntimeError(
            f"{storage}: {len(different)} initial factors of the adapter, such as {min(different)}, differ from those "
            "of the first storage. Expected equal factors, since seed and options are the same. Check that layers are "
            "adapted in the same order for all storages."
        )
    curve = quickstart.train(
        model, windows, args.steps, args.learning_rate, args.seed, f"Adapting, {storage}", quickstart.EVALUATIONS
    )
    model.save_pretrained(folder_of(args, "adapter", storage))
    return Run(storage, experts_report(model).nbytes, curve.training, {0: loss_before, **curve.held_out})


def _equal(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    return left is not None and right is not None and torch.equal(left, right)


def load_live(args: argparse.Namespace, storage: str) -> PeftModel:
    """Loads a trained adapter on its base, with fp32 as compute dtype."""
    model = load(write_base(args, storage), storage, torch.float32, args.device)
    return PeftModel.from_pretrained(model, str(folder_of(args, "adapter", storage))).eval()


class Said(NamedTuple):
    """Outputs of a model for some windows.

    Args:
        logits: `(tokens, V)` fp32.
        experts: `(tokens, layers, K)` ids of the chosen experts, in ascending order.
    """

    logits: torch.Tensor
    experts: torch.Tensor

    @classmethod
    def by(cls, model: nn.Module, windows: torch.Tensor) -> Said:
        chosen: dict[str, list[torch.Tensor]] = {}

        def record(name: str, args: tuple, kwargs: dict[str, torch.Tensor]) -> None:
            top_k_index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]
            chosen.setdefault(name, []).append(top_k_index.sort(dim=-1).values.cpu())

        handles = [
            module.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: record(name, args, kwargs), with_kwargs=True
            )
            for name, module in model.named_modules()
            if name.endswith(".experts")
        ]
        try:
            logits = next_token_logits(model, windows)
        finally:
            for handle in handles:
                handle.remove()
        return cls(logits.flatten(0, 1), torch.stack([torch.cat(of_layer) for of_layer in chosen.values()], dim=1))

    def is_routed_as(self, other: Said) -> torch.Tensor:
        """`(tokens,)` bool: whether all layers chose the same experts."""
        return (self.experts == other.experts).flatten(1).all(dim=1)

    def kl(self, against: Said, where: torch.Tensor | None = None) -> float:
        """Mean KL divergence over all tokens, or over a subset."""
        mask = slice(None) if where is None else where
        return kl_divergence(self.logits[None, mask], against.logits[None, mask])


def merge(args: argparse.Namespace, run: Run, text: Path, windows: torch.Tensor) -> None:
    """Merges a trained adapter into its storage and adds the results to the run.

    Models are compared in fp32, since rounding of activations in bf16 would hide the effect of the merge.
    """
    live = load_live(args, run.storage)
    said = Said.by(live, windows)
    with live.disable_adapter():
        run.kl_of_base = said.kl(Said.by(live, windows))
    exact = live.merge_and_unload(progressbar=False, dtype=torch.float32)
    linear = weights_of_linear_layers(exact)
    rounded_experts = {}
    for rounding in ROUNDINGS:
        with TemporaryDirectory(dir=args.directory) as folder:
            report = merge_quantized(
                write_base(args, run.storage),
                folder_of(args, "adapter", run.storage),
                Path(folder, "merged"),
                run.storage,
                rounding=rounding,
                calibration=text if rounding == "second-order" else None,
                device=args.device,
                progressbar=False,
                allow_unchanged=True,  # reported in the table
            )
            merged = load(Path(folder, "merged"), run.storage, torch.float32, args.device).eval()
        run.merges[rounding] = Merge.of(report, said.kl(Said.by(merged, windows)))
        rounded = weights_of_linear_layers(merged)
        set_linear_layers(merged, linear)
        rounded_experts[rounding] = Said.by(merged, windows)
    # the linear layers are in 16 bits, with the same rounding in both
    set_linear_layers(exact, rounded)
    run.kl_of_linear = said.kl(Said.by(exact, windows))
    is_alike = torch.stack([said.is_routed_as(found) for found in rounded_experts.values()]).all(dim=0)
    run.rerouted = 1 - is_alike.float().mean().item()
    for rounding, found in rounded_experts.items():
        run.merges[rounding].kl_of_experts = said.kl(found, is_alike)


def weights_of_linear_layers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }


@torch.no_grad()
def set_linear_layers(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        model.get_submodule(name).weight.copy_(weight)


def training_table(runs: Sequence[Run]) -> str:
    header = ("storage", "bytes of experts", "held-out loss", "largest gap", "at step", "held-out gap")
    rows = []
    for run in runs:
        gaps = ("", "", "") if run.storage == BASELINE else (run.largest_gap, run.gap_at, run.held_out_gap)
        rows.append((run.storage, run.expert_bytes, run.final, *gaps))
    return tabulate(rows, header, floatfmt=("", "", ".4f", ".4f", "", "+.4f"))


def merge_table(runs: Sequence[Run]) -> str:
    header = ("KL from the live adapter", "nearest", "2nd order", "ratio", "linear layers", "base", "rerouted %")
    header += ("experts: nearest", "2nd order", "ratio")
    rows = []
    for run in runs:
        if run.merges:
            nearest, second_order = (run.merges[name] for name in ROUNDINGS)
            whole, experts = (nearest.kl, second_order.kl), (nearest.kl_of_experts, second_order.kl_of_experts)
            row = (run.storage, *whole, _ratio(*whole), run.kl_of_linear, run.kl_of_base, 100 * run.rerouted)
            rows.append((*row, *experts, _ratio(*experts)))
    kl = ".1e"
    return tabulate(rows, header, floatfmt=("", kl, kl, ".2f", kl, kl, ".2f", kl, kl, ".2f"))


def _ratio(nearest: float, second_order: float) -> float | None:
    return second_order / nearest if nearest > 0 else None


def plot(runs: Sequence[Run], path: Path) -> None:
    """Plots losses, and below the smoothed training losses minus those in 16 bits."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    panels = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for run, color in zip(runs, COLORS):
        steps = range(1, len(run.training) + 1)
        is_baseline = run.storage == BASELINE
        width = 4 if is_baseline else 1.3
        panels[0].plot(steps, run.smoothed, color=color, linewidth=width, alpha=0.5 if is_baseline else 1)
        panels[0].plot(*zip(*run.held_out.items()), color=color, linewidth=0, marker="o", markersize=4)
        differences = [own - other for own, other in zip(run.smoothed, runs[0].smoothed)]
        panels[1].plot(steps, differences, color=color, linewidth=width if is_baseline else 1.3, label=run.storage)
    panels[0].set(
        ylabel="loss (nats per token)",
        title=f"Adapters on one base in several storages\n(lines: training, mean of {SMOOTHED} steps; dots: held out)",
    )
    panels[1].set(xlabel="step", ylabel="training, minus 16 bits")
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=150, format="png")


def run_all(args: argparse.Namespace) -> list[Run]:
    if not args.base.is_dir():
        quickstart.build_base(args)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    windows = quickstart.reference_windows(tokenizer)
    if args.held_out is not None:
        windows = quickstart.Windows(windows.training, windows.held_out[: args.held_out])
    text = args.directory / "calibration.txt"
    text.write_text(tokenizer.decode(windows.training.flatten()), encoding="utf-8")
    runs, initial = [], {}
    for storage in (BASELINE, *args.storages):
        started = time.perf_counter()
        run = train(args, storage, windows, initial)
        runs.append(run)
        run.compare(runs[0])
        if storage != BASELINE:
            merge(args, run, text, windows.held_out)
        run.seconds = time.perf_counter() - started
        if args.json:
            write_json(args, runs)  # after each storage, in case the run is interrupted
    return runs


def write_json(args: argparse.Namespace, runs: Sequence[Run]) -> None:
    names = ("steps", "base_steps", "learning_rate", "seed", "held_out", "device")
    results = {
        "settings": {name: getattr(args, name) for name in names} | {"adapter": ADAPTER, "smoothed": SMOOTHED},
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, peft)},
        "rows": [asdict(run) for run in runs],
    }
    args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--storages", nargs="+", help=(f"storages in addition to {BASELINE}; default: {' '.join(STORAGES)}")
    )
    parser.add_argument("--steps", type=int, default=200, help="training steps of each adapter (default: %(default)s)")
    parser.add_argument(
        "--base-steps", type=int, default=640, help=("training steps of the base (default: %(default)s)")
    )
    parser.add_argument(
        "--learning-rate", type=float, default=1e-2, help=("learning rate of the adapters (default: %(default)s)")
    )
    parser.add_argument("--held-out", type=int, help="number of held-out windows in the evaluation; default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--directory", type=Path, help="directory in which bases and adapters are kept")
    parser.add_argument("--json", type=Path, help="output file for the results")
    parser.add_argument("--plot", type=Path, help="output PNG file with the losses")
    args = parser.parse_args(arguments)
    if min(args.steps, args.base_steps, args.held_out or 1) < 1:
        parser.error("--steps, --base-steps and --held-out must be at least 1")
    unknown = [name for name in args.storages or STORAGES if not is_registered(name)]
    if args.storages and unknown:
        parser.error(f"unknown formats: {', '.join(unknown)}")
    if unknown:
        print(f"Skipped, not supported by the package: {', '.join(unknown)}")
    args.storages = [name for name in args.storages or STORAGES if name not in unknown]
    return args


def main() -> None:
    args = parse_arguments()
    # PEFT still uses the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    disable_progress_bar()
    torch.set_num_threads(1)  # as in the quickstart; gives the same results on any number of cores
    with TemporaryDirectory() as temporary:
        args.directory = (args.directory or Path(temporary)).resolve()
        args.directory.mkdir(parents=True, exist_ok=True)
        args.base = args.directory / "base"
        started = time.perf_counter()
        runs = run_all(args)
    print(f"\n{training_table(runs)}\n\n{merge_table(runs)}\n")
    print(f"Total seconds: {time.perf_counter() - started:.0f}")
    if args.plot:
        plot(runs, args.plot)


if __name__ == "__main__":
    main()
