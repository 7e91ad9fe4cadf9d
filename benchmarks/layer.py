"""Times forward and backward of one experts layer: transformers in 16 bits, PEFT on it, and this package.

    python benchmarks/layer.py --json layer.json --plot layer.png
    python benchmarks/layer.py --device cpu --shapes tiny --tokens 1 16 --repeats 3

benchmarks/README.md explains the columns.
"""

from __future__ import annotations

import argparse
import gc
import platform
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
import transformers
from arms import ARMS, DESCRIPTIONS, Layer
from measure import (
    LAUNCHED_TOKENS,
    MODES,
    Call,
    Timing,
    forward,
    measure_memory,
    step,
    time_calls,
    time_graph,
    time_launched,
)
from reference import relative_errors
from results import Check, LayerInfo, Results, Row, load_rows, report
from shapes import SHAPES, Inputs, Shape, random_inputs
from tqdm.auto import tqdm

T = TypeVar("T")

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "peft-moe-qlora")
LAUNCHED_CALLS = 100
CHECK = "check"


class Benchmark:
    """Measures all shapes, arms, tokens and modes, one layer at a time, and fills `results`.

    Args:
        args: options of the command.
        results: the results; saved to `args.json` after every row, in case the run is interrupted.
    """

    def __init__(self, args: argparse.Namespace, results: Results) -> None:
        self.args = args
        self.results = results
        self.started = time.monotonic()
        self.steps = [*([] if args.no_check else [CHECK]), *args.modes]
        total = len(args.shapes) * len(args.arms) * len(args.tokens) * len(self.steps)
        self.bar = tqdm(total=total, unit="step", mininterval=1)

    def run(self) -> None:
        with self.bar:
            for shape_name in self.args.shapes:
                for arm in self.args.arms:
                    self._run_arm(shape_name, arm)
                    _free_memory()

    @property
    def _is_over(self) -> bool:
        return self.args.budget is not None and time.monotonic() - self.started >= self.args.budget

    def _skip(self, what: str, count: int) -> None:
        self.results.skipped.append(what)
        self.bar.update(count)

    def _run_arm(self, shape_name: str, arm: str) -> None:
        count = len(self.args.tokens) * len(self.steps)
        if self._is_over:
            self._skip(f"{shape_name}, {arm}: all", count)
            return
        shape = SHAPES[shape_name]
        self.bar.set_description(f"{shape_name}, {arm}: building", refresh=False)
        layer, failure = self._attempt(partial(ARMS[arm], shape, self.args.device, self.args.seed))
        if layer is None:
            self.results.rows += [
                Row(shape_name, arm, tokens, mode, note=f"not built: {failure}")
                for tokens in self.args.tokens
                for mode in self.args.modes
            ]
            self.bar.update(count)
            return
        self.results.layers.append(LayerInfo(shape_name, arm, layer.stack_bytes / 2**20, layer.computed_by))
        for tokens in self.args.tokens:
            self._run_tokens(layer, shape_name, arm, tokens)

    def _run_tokens(self, layer: Layer, shape_name: str, arm: str, tokens: int) -> None:
        input_sets: list[Inputs] = []
        for name in self.steps:
            what = f"{shape_name}, {arm}, T = {tokens}, {name}"
            if self._is_over:
                self._skip(what, 1)
                continue
            self.bar.set_description(what, refresh=False)
            if name == CHECK:
                self._check(layer, shape_name, arm, tokens)
            else:
                input_sets = input_sets or [
                    self._inputs(layer.shape, tokens, index) for index in range(self.args.input_sets)
                ]
                row = Row(shape_name, arm, tokens, name)
                _, failure = self._attempt(partial(self._fill, row, layer, input_sets))
                row.note = row.note or failure
                self.results.rows.append(row)
            _free_memory()
            self.bar.update()
            if self.args.json:
                self.results.save(self.args.json)

    def _inputs(self, shape: Shape, tokens: int, index: int) -> Inputs:
        return random_inputs(shape, tokens, self.args.skew, self.args.device, seed=1000 * (self.args.seed + 1) + index)

    def _check(self, layer: Layer, shape_name: str, arm: str, tokens: int) -> None:
        # inputs that are not used in the timing
        inputs = self._inputs(layer.shape, tokens, self.args.input_sets)
        errors, failure = self._attempt(partial(relative_errors, layer, inputs))
        if errors is None:
            self.results.rows.append(Row(shape_name, arm, tokens, CHECK, note=failure))
        else:
            self.results.checks.append(Check(shape_name, arm, tokens, errors))

    def _attempt(self, action: Callable[[], T]) -> tuple[T | None, str]:
        """The result of an action, or None and the reason of its failure, which must not stop the benchmark."""
        try:
            return action(), ""
        except torch.OutOfMemoryError:
            return None, "out of memory"
        except Exception as error:
            traceback.print_exc()
            self.results.failures += 1
            return None, f"{type(error).__name__}: {error}"

    def _fill(self, row: Row, layer: Layer, input_sets: list[Inputs]) -> None:
        """Measures one row, with the fastest implementation of transformers' forward if there are several."""
        args = self.args
        calls = [partial(step(row.mode), layer, inputs) for inputs in input_sets]
        names = layer.implementations(row.tokens, needs_gradients=row.mode != "fwd")
        timings: dict[str, Timing] = {}
        notes = []
        for name in names:
            layer.use(name)
            timing, failure = self._attempt(partial(time_calls, calls, args.device, args.repeats, args.warmup))
            if timing is not None:
                timings[name] = timing
            else:
                notes.append(f"{name}: {failure}".removeprefix(": "))
            _free_memory()
        if timings:
            row.implementation = min(timings, key=lambda name: timings[name].ms)
            layer.use(row.implementation)
            _update(row, asdict(timings[row.implementation]))
            memory = measure_memory(layer, input_sets[0], row.mode)
            _update(row, {} if memory is None else asdict(memory))
        if row.mode == "fwd" and row.tokens <= LAUNCHED_TOKENS and args.device.type == "cuda":
            calls = [partial(forward, layer, inputs) for inputs in input_sets]
            for name in timings:
                layer.use(name)
                notes += self._fill_launch_and_graph(row, calls, name)
        row.note = "; ".join(notes)

    def _fill_launch_and_graph(self, row: Row, calls: list[Call], name: str) -> list[str]:
        """Measures launched and graph times, keeps the lower of old and new; returns notes on failures."""
        args = self.args
        launched_ms = time_launched(calls, args.device, LAUNCHED_CALLS)
        row.launched_ms = min(launched_ms, row.launched_ms or launched_ms)
        try:
            graph_ms = time_graph(calls, args.device, args.repeats)
        except RuntimeError as error:
            return [f"no CUDA graph of {name or 'this layer'}: {error}"]
        if row.graph_ms is None or graph_ms < row.graph_ms:
            row.graph_ms, row.graph_implementation = graph_ms, name
        return []


def _update(row: Row, values: dict[str, float | None]) -> None:
    for name, value in values.items():
        setattr(row, name, value)


def _free_memory() -> None:
    """Frees unused layers and inputs; some have reference cycles, which only the garbage collector frees."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that are compared."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, found {text!r}")
    return value


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="arms:\n" + "\n".join(f"  {name}: {text}" for name, text in DESCRIPTIONS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, **options) -> None:
        parser.add_argument(name, help=f"{text} (default: %(default)s)" if "default" in options else text, **options)

    add("--shapes", "which layers", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    add("--arms", "arms to time, see below", nargs="+", choices=ARMS, default=list(ARMS))
    add("--tokens", "numbers of tokens", nargs="+", type=_positive, default=[1, 16, 128, 512, 4096, 16384])
    add("--modes", "modes to time; ckpt: with gradient checkpointing", nargs="+", choices=MODES, default=list(MODES))
    add("--skew", "skew of the routing: 0 is even up to chance, 1 is Zipf's law", type=float, default=0.0)
    add("--repeats", "timed calls; the median is reported", type=_positive, default=20)
    add("--warmup", "untimed calls before those", type=_positive, default=5)
    add("--input-sets", "sets of inputs, used in turns", type=_positive, default=4)
    add("--seed", "seed of weights, factors and inputs", type=int, default=0)
    add("--device", "where", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--no-check", "skip the comparison with fp32", action="store_true")
    add("--budget", "seconds after which no measurement is started", type=float)
    add("--json", "output file for all results", type=Path)
    add("--plot", "output PNG file", type=Path)
    add("--peer-json", "results of other runs to show in the same table", nargs="+", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    # before the measurement, to detect an invalid file or a missing matplotlib
    load_rows(args.peer_json or ())
    if args.plot:
        from plot import plot
    transformers.logging.set_verbosity_error()
    torch.set_float32_matmul_precision("highest")
    for path in filter(None, (args.json, args.plot)):
        path.parent.mkdir(parents=True, exist_ok=True)
    # exclude the modules loaded so far from garbage collection, which makes it fast
    gc.freeze()

    settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peer_json")}
    results = Results(device_name(args.device), versions(), settings)
    try:
        Benchmark(args, results).run()
    finally:
        rows = [*results.rows, *load_rows(args.peer_json or (), taken={row.arm for row in results.rows})]
        if args.json:
            results.save(args.json)
        print(report(results, rows, {name: str(shape) for name, shape in SHAPES.items()}, MODES))
    if args.plot:
        plot(rows, args.plot, "fwd+bwd" if "fwd+bwd" in args.modes else args.modes[0], results.device)
    sys.exit(1 if results.failures else 0)


if __name__ == "__main__":
    main()
