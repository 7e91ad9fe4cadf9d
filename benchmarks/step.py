"""Times the training step of a MoE model with random weights: forward, loss, backward and optimizer.

    python benchmarks/step.py --arms ours ours+compile+graphs+liger attention peft --tokens 4096 --picture step.png
    python benchmarks/step.py --arms ours+graphs+liger --check 50
    python benchmarks/step.py --arms ours --shapes gpt-oss-20b --card 16 --tokens 1024 --expert-rank 4
    python benchmarks/step.py --optimizers adamw-fused adamw8bit paged-adamw8bit
    python benchmarks/step.py --generate 32 --batches 1 16 64 --adapters on off --caches dynamic static
    python benchmarks/step.py --arms ours+graphs --generate 128 --batches 1 16 64 --caches dynamic captured
    python benchmarks/step.py --device cpu --shapes tiny --tokens 16 --arms ours attention peft  # to try it out

LoRA is on attention and, except in the arm `attention`, on experts. benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from layer import device_name, versions
from models import MODELS
from peft import PeftModel
from step_generation import ADAPTERS, CACHES, adapter_state, time_generation
from step_models import build, factors
from step_optimizers import OPTIMIZERS, make_optimizer, optimizer_cost
from step_results import LossRow, StepResults, StepRow, load_steps, report
from step_settings import ARMS, SETTINGS, Arm, Plan, in_order, parse_arm
from step_times import GIB, Training, host_calls, split_step, time_steps
from tqdm.auto import tqdm

from peft_moe_qlora.training import graphs_report

T = TypeVar("T")

SHAPES = [name for name, config in MODELS.items() if not config["model_type"].startswith("gemma")]
RESERVED_GIB = 1.5
"""Memory of a GPU reserved for the context, the display and allocations outside of torch."""
NOISE = {"bfloat16": 2**-9, "float32": 2**-24}
"""Half a unit in the last place, the relative error of one rounding."""
PLAIN = "the plain path"
NOISE_ARM = "the plain path, factors rounded once more"
CHECK_BATCHES = 4


class Benchmark:
    """Builds one model at a time, measures it, and fills `results`.

    Args:
        args: options of the command.
        results: the results; saved to `args.json` after every row, in case the run is interrupted.
    """

    def __init__(self, args: argparse.Namespace, results: StepResults) -> None:
        self.args = args
        self.results = results
        self.failures = 0

    def save(self) -> None:
        if self.args.json:
            self.results.save(self.args.json)

    def attempt(self, action: Callable[[], T]) -> tuple[T | None, str]:
        """The result of an action, or None and the reason of its failure, which must not stop the benchmark."""
        try:
            return action(), ""
        except torch.OutOfMemoryError:
            return None, "out of memory"
        except ImportError as error:
            return None, str(error)
        except Exception as error:
            traceback.print_exc()
            self.failures += 1
            return None, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"

    def plan(self, shape: str, arm: Arm, expert_rank: int | None = None) -> Plan:
        args = self.args
        return Plan(
            shape=shape,
            arm=arm,
            rank=args.rank,
            expert_rank=expert_rank or args.expert_rank[0],
            layers=args.layers,
            dtype=args.dtype,
            device=args.device,
            attention=args.attention,
            seed=args.seed,
        )

    def plans(self) -> Iterator[Plan]:
        """All plans, `in_order`."""
        arms = list(
            dict.fromkeys(parse_arm(text, storage) for text in self.args.arms for storage in self.args.storages)
        )
        for arm, shape, rank in itertools.product(in_order(arms), self.args.shapes, self.args.expert_rank):
            yield self.plan(shape, arm, rank)

    # ---- steps

    def run_steps(self) -> None:
        """Times the steps of all plans; the best of several rounds is reported."""
        args = self.args
        best: dict[tuple, StepRow] = {}
        plans = sorted([*self.plans()] * args.rounds, key=lambda plan: plan.arm.changed_classes)
        bar = tqdm(total=len(plans) * len(args.tokens) * len(args.optimizer), unit="row", file=sys.stderr)
        with bar:
            for plan in plans:
                for settings in self._shared(plan.arm):
                    for row in self._rows_of_a_model(plan, settings):
                        key = (row.shape, row.what, row.expert_rank, row.tokens, row.optimizer)
                        known = best.get(key)
                        if known is None or (row.milliseconds or float("inf")) < (known.milliseconds or float("inf")):
                            best[key] = row
                        self.results.steps = list(best.values())
                        self.save()
                        bar.update()

    def _shared(self, arm: Arm) -> list[list[tuple[int, str]]]:
        """Groups of (number of tokens, optimizer) that can use the same model."""
        settings = list(itertools.product(self.args.tokens, self.args.optimizer))
        return [[one] for one in settings] if arm.is_made_for_one_length or self.args.card else [settings]

    def _rows_of_a_model(self, plan: Plan, settings: list[tuple[int, str]]) -> Iterator[StepRow]:
        rows = [self._row(plan, tokens, optimizer) for tokens, optimizer in settings]
        start = time.perf_counter()
        model, failure = self.attempt(partial(build, plan))
        seconds = time.perf_counter() - start
        for row in rows:
            row.build_seconds = seconds
            if model is None:
                row.note = f"not built: {failure}"
            else:
                row.layers = model.get_base_model().config.num_hidden_layers
                _, row.note = self.attempt(partial(self._fill, row, plan, model))
            yield row
            free_memory()
        del model
        forget_models()

    def _row(self, plan: Plan, tokens: int, optimizer: str) -> StepRow:
        return StepRow(
            shape=plan.shape,
            arm=str(plan.arm),
            storage=plan.arm.storage,
            batch=self.args.batch,
            tokens=tokens,
            rank=plan.rank,
            expert_rank=plan.expert_rank,
            optimizer=optimizer,
            layers=plan.layers,
        )

    def _fill(self, row: StepRow, plan: Plan, model: PeftModel) -> None:
        args = self.args
        trained = [parameter for _, parameter in factors(model)]
        row.trained_parameters = sum(parameter.numel() for parameter in trained)
        free_memory()
        row.resident_gib = torch.cuda.memory_allocated() / GIB if args.on_gpu else 0.0
        training = Training(model, self._optimizer(row.optimizer, trained), args.batch, row.tokens)
        try:
            for name, value in asdict(time_steps(training, args.steps, args.warmup)).items():
                setattr(row, name, value)
            row.tokens_per_second = 1e3 * row.batch * row.tokens / row.milliseconds
            if plan.arm.has("graphs"):
                row.graphs = graphs_report(model.get_base_model())
            # the separate profile of the head may exceed the memory of a small GPU
            if args.on_gpu and not (args.no_split or args.card):
                split = split_step(training)
                row.device_milliseconds, row.split, row.other = split.milliseconds, split.by_category, split.other
                row.kernels, row.launches = split.kernels, split.launches
            if args.host:
                row.host_calls = host_calls(training, args.host)
        finally:
            training.optimizer.zero_grad(set_to_none=True)

    def _optimizer(self, name: str, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        options = {} if self.args.eps is None else {"eps": self.args.eps}
        return make_optimizer(name, trained, self.args.lr, **options)

    # ---- losses

    def run_check(self) -> None:
        """Trains with each arm on the same batches, and compares the losses with those of the plain path."""
        plans = list(self.plans())
        # run the plain paths before Liger changes the classes
        first = list(dict.fromkeys(replace(plan, arm=plan.arm.plain) for plan in plans))
        noisy = [replace(plan, noise=NOISE[self.args.dtype]) for plan in first]
        expected: dict[Plan, list[float]] = {}
        todo = list(dict.fromkeys([*first, *noisy, *plans]))
        for plan in tqdm(todo, unit="arm", file=sys.stderr):
            name = str(plan.arm)
            if plan in first:
                name = f"{name}: {PLAIN}"
            elif plan.noise:
                name = f"{name}: {NOISE_ARM}"
            row = LossRow(plan.shape, name, plan.arm.storage)
            losses, row.note = self.attempt(partial(self._losses, plan))
            row.losses = losses or []
            plain_plan = replace(plan, arm=plan.arm.plain, noise=0.0)
            if plan in first:
                expected[plan] = row.losses
            elif losses and expected.get(plain_plan):
                pairs = zip(losses, expected[plain_plan], strict=True)
                row.largest_difference = max(abs(one - other) for one, other in pairs)
            self.results.losses.append(row)
            self.save()
            forget_models()

    def _losses(self, plan: Plan) -> list[float]:
        args = self.args
        model = build(plan)
        optimizer = self._optimizer(args.optimizer[0], [parameter for _, parameter in factors(model)])
        training = Training(model, optimizer, args.batch, args.tokens[0], CHECK_BATCHES, args.seed)
        return torch.stack([training.step() for _ in range(args.check)]).tolist()

    # ---- optimizers and generation

    def run_optimizers(self) -> None:
        """Times optimizers on factors with the shapes of the first arm's model, of which only one layer is built."""
        args = self.args
        layers = args.layers or MODELS[args.shapes[0]]["num_hidden_layers"]
        plan = replace(next(self.plans()), layers=1)
        shapes = [tuple(parameter.shape) for _, parameter in factors(build(plan))] * layers
        free_memory()
        dtype = getattr(torch, args.dtype) if plan.arm.has("bf16-factors") else torch.float32
        for name in tqdm(args.optimizers, unit="optimizer", file=sys.stderr):
            action = partial(optimizer_cost, name, shapes, dtype, torch.device(args.device), args.steps)
            cost, failure = self.attempt(action)
            if cost is None:
                self.results.notes.append(f"{name}: {failure}")
            else:
                self.results.optimizers.append(cost)
            self.save()
            free_memory()

    def run_generation(self) -> None:
        args = self.args
        for plan in tqdm(list(self.plans()), unit="arm", file=sys.stderr):
            model, failure = self.attempt(partial(build, plan))
            if model is None:
                self.results.notes.append(f"{plan.arm}: not built: {failure}")
                continue
            for adapter in args.adapters:
                _, failure = self.attempt(partial(self._generate, plan, model, adapter))
                if failure:
                    self.results.notes.append(f"{plan.arm}, adapter {adapter}: {failure}")
            del model
            forget_models()

    def _generate(self, plan: Plan, model: PeftModel, adapter: str) -> None:
        args = self.args
        with adapter_state(model, adapter):
            for cache, batch in itertools.product(args.caches, args.batches):
                call = partial(time_generation, model, plan.shape, str(plan.arm), adapter, cache, batch)
                found, failure = self.attempt(partial(call, args.prompt, args.generate))
                if found is None:
                    self.results.notes.append(f"{plan.arm}, adapter {adapter}, {cache} cache, {batch}: {failure}")
                else:
                    self.results.generation.append(found)
                self.save()
                free_memory()


def forget_models() -> None:
    """Frees unused models, to which compiled code still refers."""
    torch.compiler.reset()
    free_memory()


def free_memory() -> None:
    """Collects reference cycles and empties the memory cache of the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def limit_memory(card: float, device: torch.device) -> float:
    """Limits torch's memory to that of a GPU with so many GiB; returns the limit.

    Raises:
        ValueError: the GPU has less memory.
    """
    allowed = card - RESERVED_GIB
    size = torch.cuda.get_device_properties(device).total_memory / GIB
    if allowed > size:
        raise ValueError(f"--card {card:g} requires {allowed:g} GiB, but this GPU has {size:.1f} GiB.")
    index = torch.cuda.current_device() if device.index is None else device.index  # requires an index
    torch.cuda.set_per_process_memory_fraction(allowed / size, index)
    return allowed


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    names = {"arms": ARMS, "settings, appended to an arm with +": SETTINGS}
    epilog = [
        f"{title}:\n" + "\n".join(f"  {name}: {text}" for name, text in of.items()) for title, of in names.items()
    ]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n\n".join(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(name: str, text: str, **options) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)" if "default" in options else text, **options)

    on_gpu = torch.cuda.is_available()
    add("--arms", "configurations to time, see below", nargs="+", default=["ours"])
    add("--storages", "storages of the experts, for ours", nargs="+", default=["nf4/64+dq"])
    add("--shapes", "model shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    add("--layers", "number of layers; default: the model's", type=int)
    add("--tokens", "tokens per sequence", nargs="+", type=int, default=[4096])
    add("--batch", "sequences per step", type=int, default=1)
    add("--rank", "LoRA rank on attention", type=int, default=16)
    add("--expert-rank", "LoRA rank on experts; default: --rank", nargs="+", type=int)
    add(
        "--optimizer",
        "optimizer of the step",
        nargs="+",
        choices=OPTIMIZERS,
        default=["adamw8bit" if on_gpu else "adamw"],
    )
    add("--lr", "learning rate", type=float, default=1e-5)
    add("--eps", "eps of the optimizer; default: the optimizer's", type=float)
    add("--attention", "attention implementation; default: transformers' choice")
    add("--steps", "timed steps; the median is reported", type=int, default=8)
    add("--warmup", "untimed steps before the timed ones", type=int, default=3)
    add("--rounds", "rounds over all arms; the best is reported", type=int, default=1)
    add("--no-split", "do not profile the device time by kernel category", action="store_true")
    add("--host", "show this many functions with the most host time", nargs="?", type=int, const=25)
    add("--card", "limit memory to that of a GPU with this many GiB, such as 24 or 16", type=float)
    add("--check", "compare the losses of this many steps instead", nargs="?", type=int, const=50)
    add("--optimizers", "time only the steps of these optimizers instead", nargs="+", choices=OPTIMIZERS)
    add("--generate", "time the generation of this many tokens instead", type=int)
    add("--prompt", "tokens of the prompt", type=int, default=128)
    add("--batches", "batch sizes of generation", nargs="+", type=int, default=[1, 16, 64])
    add("--adapters", "adapter states of generation", nargs="+", choices=ADAPTERS, default=["on"])
    add("--caches", "KV caches of generation", nargs="+", choices=CACHES, default=["dynamic", "static"])
    add("--dtype", "dtype of unquantized weights", choices=NOISE, default="bfloat16")
    add("--device", "device to run on", default="cuda" if on_gpu else "cpu")
    add("--seed", "seed of weights, factors and tokens", type=int, default=0)
    add("--json", "output file for all results", type=Path)
    add("--picture", "output PNG file: time by category", type=Path)
    add("--beside", "results of earlier runs to show in the same table", nargs="+", type=Path, default=[])
    args = parser.parse_args(given)
    args.expert_rank = args.expert_rank or [args.rank]
    args.on_gpu = torch.device(args.device).type == "cuda"
    if args.card and not args.on_gpu:
        parser.error("--card requires a GPU, whose memory it limits.")
    try:
        in_order([parse_arm(text) for text in args.arms])
    except ValueError as error:
        parser.error(str(error))
    return args


def main() -> None:
    args = parse_arguments()
    # before the measurement, to detect an invalid file or a missing matplotlib
    beside = load_steps(args.beside)
    if args.picture:
        from step_plot import plot_steps
    transformers.logging.set_verbosity_error()
    for path in filter(None, (args.json, args.picture)):
        path.parent.mkdir(parents=True, exist_ok=True)
    # exclude the modules loaded so far from garbage collection, which makes it fast
    gc.freeze()
    allowed = limit_memory(args.card, torch.device(args.device)) if args.card else None
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "picture", "beside")}
    results = StepResults(device_name(torch.device(args.device)), versions(), settings)
    benchmark = Benchmark(args, results)
    modes = {
        "check": benchmark.run_check,
        "optimizers": benchmark.run_optimizers,
        "generate": benchmark.run_generation,
    }
    chosen = [run for name, run in modes.items() if getattr(args, name)] or [benchmark.run_steps]
    try:
        for run in chosen:
            run()
    finally:
        benchmark.save()
        rows = [*beside, *results.steps]
        print(report(results, rows, allowed))
    if args.picture:
        plot_steps(rows, args.picture, results.device)
    sys.exit(1 if benchmark.failures else 0)


if __name__ == "__main__":
    main()
