"""QLoRA on a mixture-of-experts model from training to merging, on a CPU, without a download.

    pip install -e ".[examples]" && python examples/quickstart.py

1. Trains a small Qwen3-MoE from scratch on the sources of Python's standard library, and saves it in the layout of
   checkpoints on the hub.
2. Loads it and trains adapters on new text, Python's language reference as shown by `help()` (`pydoc_data.topics`):
   once with 16-bit and once with 4-bit experts, on the same batches.
3. Reloads the adapter of the 4-bit experts in a new process. Then merges it on disk into a bf16 checkpoint, which
   transformers loads without this package, and into a checkpoint with 4-bit experts.

A table compares sizes, losses on held-out text, and the KL divergence of the merged models from the adapter; a plot
shows the training losses.

    python examples/quickstart.py --model PATH_OR_ID --device cuda

runs steps 2 and 3 with a real model.
"""
# ruff: noqa: E402 - a warning of a library is disabled before the library is imported

from __future__ import annotations

import argparse
import gc
import json
import logging
import math
import random
import subprocess
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

# its import warns about a missing kernel for 4-bit linear layers, which are not used here
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from tabulate import tabulate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from peft_moe_qlora import (
    MoeQLoraConfig,
    experts_report,
    load_quantized,
    prepare_model_for_training,
    quantize_experts,
)
from peft_moe_qlora.merge import kl_divergence, merge_checkpoint, merge_quantized, next_token_logits

BATCH_SIZE = 8
WINDOW = 128  # tokens
NOT_SOURCES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data"}
MODULE_LENGTH = 8_000  # characters; parts of many modules have more variety than a few whole ones
HELD_OUT_MODULES = 15
HELD_OUT_SHARE = 0.1  # of the language reference
EVALUATIONS = 4  # during the training of an adapter

QUANT_TYPES = {"16-bit": None, "4-bit": "nf4"}
LOOKS = {  # the 4-bit line is drawn over the 16-bit line
    "16-bit": {"color": "#8ecae6", "linewidth": 5, "marker": "o", "markersize": 11},
    "4-bit": {"color": "#d1495b", "linewidth": 1.5, "marker": "x", "markersize": 8},
}


# --- Texts -----------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """A text as `(N, WINDOW)` tokens."""

    training: torch.Tensor
    held_out: torch.Tensor


def python_sources(seed: int) -> list[str]:
    """Modules of the standard library, shuffled."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.rglob("*.py")) if not NOT_SOURCES & set(path.relative_to(root).parts)]
    if len(paths) <= HELD_OUT_MODULES:
        raise SystemExit(
            f"{root} does not contain the sources of the standard library. Pass --model PATH_OR_ID instead."
        )
    random.Random(seed).shuffle(paths)
    return [path.read_text(encoding="utf-8", errors="replace")[:MODULE_LENGTH] for path in paths]


def language_reference() -> str:
    """The unique paragraphs of all topics; topics overlap, and training must not contain held-out paragraphs."""
    paragraphs = [paragraph for topic in topics.values() for paragraph in topic.split("\n\n")]
    return "\n\n".join({" ".join(paragraph.split()): paragraph for paragraph in paragraphs}.values())


def to_windows(tokenizer: PreTrainedTokenizerBase, texts: list[str], at_most: float = math.inf) -> torch.Tensor:
    """The first `(N, WINDOW)` tokens; tokenizes only as many texts as needed."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= at_most * WINDOW:
            break
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    num_windows = int(min(len(ids) // WINDOW, at_most))
    return torch.tensor(ids[: num_windows * WINDOW]).view(num_windows, WINDOW)


def reference_windows(tokenizer: PreTrainedTokenizerBase) -> Windows:
    """The language reference; its end is held out."""
    windows = to_windows(tokenizer, [language_reference()])
    num_held_out = math.ceil(HELD_OUT_SHARE * len(windows))
    return Windows(windows[:-num_held_out], windows[-num_held_out:])


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Trains a byte-level BPE tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


# --- Training and evaluation -----------------------------------------------------------------------------------------


@dataclass
class Curve:
    """Losses of a training.

    Args:
        training: loss of every step.
        held_out: number of steps -> loss on the held-out windows.
    """

    training: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(model: nn.Module, windows: torch.Tensor) -> float:
    """Mean loss per token, in nats."""
    model.eval()
    total = 0.0
    for batch in tqdm(windows.split(BATCH_SIZE), desc="Evaluating", unit="batch", leave=False, delay=2):
        batch = batch.to(model.device)
        total += model(input_ids=batch, labels=batch, use_cache=False).loss.item() * len(batch)
    return total / len(windows)


def first_logits(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Logits for the first 16 windows; those for all windows may exceed the memory."""
    return next_token_logits(model.eval(), windows[:16])


def train(
    model: nn.Module,
    windows: Windows,
    steps: int,
    learning_rate: float,
    seed: int,
    description: str,
    evaluations: int,
) -> Curve:
    """Trains all parameters that require gradients; evaluates at equal intervals."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    generator = torch.Generator().manual_seed(seed)
    num_epochs = math.ceil(steps * BATCH_SIZE / len(windows.training))
    order = torch.cat([torch.randperm(len(windows.training), generator=generator) for _ in range(num_epochs)])

    curve = Curve()
    bar = tqdm(range(steps), desc=description, unit="step")
    for step in bar:
        model.train()
        batch = windows.training[order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]].to(model.device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        curve.training.append(loss.item())
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) * evaluations // steps > step * evaluations // steps:
            curve.held_out[step + 1] = evaluate(model, windows.held_out)
    return curve


# --- Results ---------------------------------------------------------------------------------------------------------


class Results:
    """A table to which each part of the script adds a row."""

    header = ("", "experts, MiB", "held-out loss", "KL from the adapter", "seconds")

    def __init__(self) -> None:
        self.rows: list[tuple[str, float, float, str, float]] = []
        self.since = time.perf_counter()

    def add(self, name: str, expert_bytes: int, loss: float, divergence: str = "") -> None:
        now = time.perf_counter()
        self.rows.append((name, expert_bytes / 2**20, loss, divergence, now - self.since))
        self.since = now

    def add_evaluated(
        self, name: str, model: nn.Module, windows: torch.Tensor, adapted: torch.Tensor | None = None
    ) -> float:
        """Adds a model, with its KL divergence from the adapter if the adapter's logits are given."""
        loss = evaluate(model, windows)
        divergence = "" if adapted is None else f"{kl_divergence(adapted, first_logits(model, windows)):.1e}"
        self.add(name, experts_report(model).nbytes, loss, divergence)
        return loss

    def __str__(self) -> str:
        return tabulate(self.rows, self.header, floatfmt=("", ".2f", ".4f", "", ".0f"), disable_numparse=[3])


def moving_average(losses: list[float], width: int) -> list[float]:
    """Mean of each loss and those before it; of fewer values at the beginning."""
    spans = [losses[max(0, end - width) : end] for end in range(1, len(losses) + 1)]
    return [sum(span) / len(span) for span in spans]


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Plots all losses, and below the difference between two trainings."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(len(curves), sharex=True, squeeze=False, height_ratios=(3, 1)[: len(curves)])[:, 0]
    for name, curve in curves.items():
        look = LOOKS[name]
        steps = range(1, len(curve.training) + 1)
        losses = moving_average(curve.training, width=max(1, len(steps) // 10))
        panels[0].plot(steps, losses, **look | {"marker": ""}, label=f"{name} experts, training (moving average)")
        panels[0].plot(*zip(*curve.held_out.items()), **look | {"linewidth": 0}, label=f"{name} experts, held out")
    panels[0].set(ylabel="loss (nats per token)", title="Adapting a mixture of experts to new text")
    panels[0].legend()
    if len(curves) == len(LOOKS):
        differences = [a - b for a, b in zip(curves["4-bit"].training, curves["16-bit"].training)]
        panels[1].axhline(0, color="gray", linewidth=1)
        panels[1].plot(range(1, len(differences) + 1), differences, color=LOOKS["4-bit"]["color"], linewidth=1)
        panels[1].set(ylabel="4-bit minus\n16-bit, training")
    panels[-1].set(xlabel="step")
    for panel in panels:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


# --- Steps -----------------------------------------------------------------------------------------------------------


def build_base(args: argparse.Namespace) -> None:
    """Trains a small Qwen3-MoE on Python sources and saves it as a bf16 checkpoint."""
    sources = python_sources(args.seed)
    sources, held_out = sources[HELD_OUT_MODULES:], sources[:HELD_OUT_MODULES]
    tokenizer = train_tokenizer(sources, vocab_size=2048)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        initializer_range=0.05,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(args.seed)
    model = Qwen3MoeForCausalLM(config).to(args.device)
    windows = Windows(to_windows(tokenizer, sources, args.base_steps * BATCH_SIZE), to_windows(tokenizer, held_out))
    curve = train(model, windows, args.base_steps, 6e-3, args.seed, "Training a base from scratch", evaluations=1)
    model.to(torch.bfloat16).save_pretrained(args.base)
    tokenizer.save_pretrained(args.base)
    print(
        "The base is trained on Python sources. Its loss on held-out modules is "
        f"{curve.held_out[args.base_steps]:.3f}; uniform guessing gives ln({config.vocab_size}) = "
        f"{math.log(config.vocab_size):.3f}."
    )
    with safe_open(args.base / "model.safetensors", framework="pt") as checkpoint:
        key = next(key for key in sorted(checkpoint.keys()) if "gate_proj" in key)
    print(f"It is saved with one tensor per expert, like checkpoints on the hub: {key}, ...")


def free_memory() -> None:
    """Frees unused models; only the garbage collector can, since they have reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load(path: str | Path, device: str) -> nn.Module:
    """Loads a model without this package's options."""
    free_memory()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=device)


def load_adapted(args: argparse.Namespace) -> PeftModel:
    """Loads the 4-bit adapter on the base; the storage of the experts is read from the adapter."""
    return PeftModel.from_pretrained(load(args.base, args.device), adapter_folder(args, "4-bit"))


def adapter_folder(args: argparse.Namespace, name: str) -> Path:
    return args.output / f"adapter-{name}"


def adapt(name: str, windows: Windows, args: argparse.Namespace, results: Results) -> Curve:
    """Trains and saves an adapter on attention and experts, with 16-bit or 4-bit experts."""
    quant_type = QUANT_TYPES[name]
    model = load(args.base, args.device)
    if quant_type is not None:
        quantize_experts(model, quant_type)
    loss_before = results.add_evaluated(f"base, {name} experts", model, windows.held_out)

    prepare_model_for_training(model, use_gradient_checkpointing=args.model is not None)
    config = MoeQLoraConfig(
        r=16, lora_alpha=32, expert_r=4, target_modules="all-linear", quant_type=quant_type, task_type="CAUSAL_LM"
    )
    torch.manual_seed(args.seed)
    model = get_peft_model(model, config)
    description = f"Adapting, {name} experts"
    curve = train(model, windows, args.steps, args.learning_rate, args.seed, description, EVALUATIONS)
    curve.held_out[0] = loss_before
    model.save_pretrained(adapter_folder(args, name))

    report = model.experts_report()
    results.add(f"adapted, {name} experts", report.nbytes, curve.held_out[args.steps])
    # for a real model, the whole report has hundreds of lines
    print(report if args.model is None else str(report).splitlines()[-1])
    return curve


def evaluate_in_fresh_process(args: argparse.Namespace) -> dict[str, float]:
    """Runs `evaluate_saved` in a new process."""
    command = [sys.executable, __file__, "--evaluate-saved", "--output", args.output, "--device", args.device]
    if args.model is not None:
        command += ["--model", args.model]
    free_memory()
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def evaluate_saved(args: argparse.Namespace) -> None:
    """Evaluates the saved adapter in the new process; the last line of its output is the result."""
    windows = reference_windows(AutoTokenizer.from_pretrained(args.base))
    model = load_adapted(args)
    loss = evaluate(model, windows.held_out)
    print(json.dumps({"loss": loss, "expert_bytes": model.experts_report().nbytes}))


def add_merged(args: argparse.Namespace, windows: torch.Tensor, results: Results) -> None:
    """Merges the 4-bit adapter on disk into 16 and 4 bits, and loads the results."""
    adapted = first_logits(load_adapted(args), windows)
    adapter = adapter_folder(args, "4-bit")
    free_memory()
    report = merge_checkpoint(args.base, adapter, args.output / "merged-bf16")
    # loaded by transformers without peft_moe_qlora
    merged = load(args.output / "merged-bf16", args.device)
    results.add_evaluated("adapter merged into bf16, reloaded", merged, windows, adapted)
    del merged
    for rounding in ("nearest", "second-order"):
        folder = args.output / f"merged-nf4-{rounding}"
        free_memory()
        # nearest rounding may remove a small delta completely; the table shows the effect
        merge_quantized(args.base, adapter, folder, rounding=rounding, device=args.device, allow_unchanged=True)
        merged = load_quantized(str(folder), device_map=args.device)
        results.add_evaluated(f"adapter merged into nf4, {rounding} rounding", merged, windows, adapted)
        del merged
    # for a real model, the whole report has hundreds of lines
    print(f"\n{report if args.model is None else str(report).splitlines()[-1]}")


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if args.model is None:
        build_base(args)
    windows = reference_windows(AutoTokenizer.from_pretrained(args.base))
    results = Results()

    names = ["4-bit"] if args.skip_16bit else ["16-bit", "4-bit"]
    curves = {name: adapt(name, windows, args, results) for name in names}
    plot(curves, args.output / "loss.png")

    fresh = evaluate_in_fresh_process(args)
    results.add("adapter reloaded in a fresh process", fresh["expert_bytes"], fresh["loss"])
    add_merged(args, windows.held_out, results)

    print(f"\n{results}\n")
    difference = fresh["loss"] - curves["4-bit"].held_out[args.steps]
    print(f"Loss in the fresh process minus loss at the end of training: {difference}")
    print(f"In {args.output}: {', '.join(sorted(path.name for path in args.output.iterdir()))}")
    print(f"Total seconds: {time.perf_counter() - started:.0f}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", help=("path or hub id of the MoE model to adapt; default: a small model trained by this script")
    )
    parser.add_argument("--output", type=Path, default=Path("quickstart_output"), help="output directory")
    parser.add_argument("--steps", type=int, default=160, help="training steps of each adapter (default: %(default)s)")
    parser.add_argument(
        "--base-steps", type=int, default=640, help=("training steps of the base (default: %(default)s)")
    )
    parser.add_argument(
        "--learning-rate", type=float, help=("learning rate of the adapters; default: 1e-2, with --model 2e-4")
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="default: %(default)s")
    parser.add_argument("--skip-16bit", action="store_true", help="skip the training with 16-bit experts")
    parser.add_argument("--evaluate-saved", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.steps, args.base_steps) < 1:
        parser.error("--steps and --base-steps must be at least 1")
    if args.learning_rate is None:
        args.learning_rate = 1e-2 if args.model is None else 2e-4
    args.output = args.output.resolve()
    args.base = args.model or args.output / "base"
    return args


def main() -> None:
    args = parse_arguments()
    # PEFT still uses the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if args.model is None:
        disable_progress_bar()
        # a second thread gains little for such small matrices, and costs much on a busy machine; one thread also gives
        # the same results on any number of cores
        torch.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.evaluate_saved:
        evaluate_saved(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
