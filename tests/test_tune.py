"""Tables of tiles: which entry applies, what a user's own measurement adds, and the measurement itself."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
from kernel_cases import DEVICE, NF4, specialized_tiles

from peft_moe_qlora import cli
from peft_moe_qlora.ops import tiles_origin
from peft_moe_qlora.ops.kernels import tuning
from peft_moe_qlora.ops.kernels.launch_recorder import _recordings
from peft_moe_qlora.ops.kernels.tile_table import Entry, TuningTable, parse_entries
from peft_moe_qlora.ops.kernels.tuning import SAFE_MOST_PAIRS, SAFE_TILES, GemmTiles, choose_tiles, forget_tables
from peft_moe_qlora.ops.kernels.user_table import Gpu, cache_directory, read_user_table, table_path, write_user_table
from peft_moe_qlora.ops.layer_shape import LayerShape
from peft_moe_qlora.ops.tune import Product, candidates, kind_of, measure_layer, products_of, with_bounds
from peft_moe_qlora.quantization.formats import Fp8Format, Mxfp4Format

CUDA = torch.device("cuda", 0)
GPU = Gpu("NVIDIA Test 9000", (12, 1), triton.__version__)
TABLES = Path(tuning.__file__).parent / "tables"


def tiles(tile_n: int) -> GemmTiles:
    """Different ones for different numbers."""
    return GemmTiles((64, 16), tile_n, 64, 4, 3, False, False)


def entry(tile_n: int, weight: str = "nf4", along: str = "columns", **values: object) -> dict:
    return {
        "weight": weight,
        "along": along,
        "rows_per_expert": None,
        "tiles": {**tiles(tile_n).__dict__, "heights": [64, 16]},
        **values,
    }


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache is a new directory, and the GPU one that does not exist."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: GPU.device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: GPU.capability)
    forget_tables()
    yield tmp_path
    forget_tables()


def test_older_tables_choose_the_same_tiles() -> None:
    """Entries without a shape: the first with a sufficient number of rows, whatever the requested shape."""
    for path in TABLES.glob("*.json"):
        data = json.loads(path.read_text())
        table = TuningTable("", 0, parse_entries(data["entries"]), data.get("like", {}))
        plain = [entry for entry in data["entries"] if "n" not in entry]
        measured = {entry["weight"] for entry in plain}
        if not plain:
            continue
        for codes in (None, "nf4", "fp4", "e4m3", "int8", "e2m1", "int4"):
            kind = data.get("like", {}).get(codes, codes)
            weight = "dense" if codes is None else kind if kind in measured else "packed"
            for along in ("columns", "rows"):
                for rows in (1 / 512, 0.25, 1.0, 33.3, 256.0, 1024.0, 1e9):
                    expected = next(
                        entry["tiles"]
                        for entry in plain
                        if (entry["weight"], entry["along"]) == (weight, along)
                        and (entry["rows_per_expert"] is None or rows <= entry["rows_per_expert"])
                    )
                    found = table.choose(codes, along == "columns", rows)
                    assert found == GemmTiles(**{**expected, "heights": tuple(expected["heights"])})
                    if len(plain) == len(data["entries"]):
                        assert table.choose(codes, along == "columns", rows, 28672, 4096) == found


def test_measured_products_use_their_own_tiles() -> None:
    """Also where another shape's tiles are near, for which others were the fastest."""
    for path in TABLES.glob("*.json"):
        data = json.loads(path.read_text())
        table = TuningTable("", 0, parse_entries(data["entries"]), data.get("like", {}))
        fastest: dict[tuple, GemmTiles] = {}
        for one, parsed in zip(data["entries"], table.entries, strict=True):
            if "n" in one:
                question = (one["weight"], one["along"] == "columns", one["measured_at"], one["n"], one["k"])
                fastest.setdefault(question, parsed.tiles)
        for (weight, *question), expected in fastest.items():
            found = table.choose("nf4" if weight == "packed" else weight, *question, may_specialize=True)
            assert found == expected, (weight, *question)


def test_specialized_tiles_of_near_shapes_need_whole_rings_of_stages() -> None:
    own = {**entry(16, weight="packed", n=2048, k=768), "tiles": asdict(specialized_tiles((128, 32), 8))}
    entries = parse_entries([own, entry(32, weight="packed")])
    table = TuningTable("", 0, entries, {})

    def is_specialized(n: int, k: int, may_specialize: bool = True) -> bool:
        return table.choose("nf4", True, 50, n, k, may_specialize).specialized

    assert is_specialized(2048, 768), "as measured"
    assert not is_specialized(2048, 768, may_specialize=False)
    assert is_specialized(2880, 1024)
    assert not is_specialized(2880, 960)


def test_nearest_shape_is_chosen() -> None:
    entries = parse_entries(
        [
            entry(16, weight="packed"),
            entry(32, weight="packed", n=1536, k=2048),
            entry(64, weight="packed", n=28672, k=4096),
            entry(128, n=1536, k=2048, rows_per_expert=100, from_rows_per_expert=10),
            entry(256, weight="e4m3"),
        ]
    )
    table = TuningTable("", 0, entries, {"int8": "e4m3"})

    def tile_n(codes: str, rows: float, n: int | None = None, k: int | None = None) -> int | None:
        found = table.choose(codes, True, rows, n, k)
        return found and found.tile_n

    assert tile_n("fp4", 50, 1536, 2048) == 32
    assert tile_n("fp4", 50, 2048, 3000) == 32
    assert tile_n("fp4", 50, 14336, 4096) == 64
    assert tile_n("fp4", 50, 64, 64) == 16, "all shapes are far"
    assert tile_n("fp4", 50) == 16, "of no shape"
    assert tile_n("nf4", 50, 1536, 2048) == 128, "its own kind before another"
    assert tile_n("nf4", 5, 1536, 2048) == 32, "not measured at so few rows"
    assert tile_n("nf4", 500, 1536, 2048) == 32, "not measured at so many rows"
    assert tile_n("int8", 50, 1536, 2048) == 256, "one that is like it before all others"
    assert table.choose(None, True, 50, 1536, 2048) is None
    assert table.choose("fp4", False, 50, 1536, 2048) is None
    of_one_shape = TuningTable("", 0, entries[1:2], {})
    assert of_one_shape.choose("nf4", True, 1, 64, 64).tile_n == 32, "far, but all there is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"along": "diagonals"}, "diagonals"),
        ({"tiles": {**entry(32)["tiles"], "tile_n": 48}}, "powers of two"),
        ({"tiles": {**entry(32)["tiles"], "heights": [16, 64]}}, "not in descending order"),
        ({"tiles": {**entry(32)["tiles"], "heights": [96, 64]}}, "powers of two"),
        ({"tiles": {**entry(32)["tiles"], "heights": [], "specialized": True}}, "powers of two"),
        ({"tiles": {**entry(32)["tiles"], "heights": [96, 32], "specialized": True}}, "powers of two"),
        ({"tiles": {**entry(32)["tiles"], "heights": [112, 64], "specialized": True}}, "powers of two"),
        ({"tiles": {**entry(32)["tiles"], "heights": [72, 64], "specialized": True}}, "powers of two"),
        ({"tiles": {**entry(32)["tiles"], "heights": [512, 256], "specialized": True}}, "more than 256 rows"),
        ({"tiles": {**entry(32)["tiles"], "num_warps": 3}}, "num_warps=3"),
        ({"tiles": {**entry(32)["tiles"], "weight_left": 1}}, "weight_left=1"),
        ({"tiles": {"heights": [16]}}, "TypeError"),
        ({"n": 5}, "k=None"),
        ({"n": -5, "k": 3}, "n=-5"),
        ({"rows_per_expert": "many"}, "many"),
    ],
)
def test_entries_that_would_break_kernels_are_rejected(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"entry 1.*{message}"):
        parse_entries([entry(32), {**entry(32), **change}])


def test_measured_tiles_are_used_and_named(own_cache: Path) -> None:
    question = (CUDA, torch.bfloat16, "nf4", True, 50.0, 1536, 2048)
    assert choose_tiles(*question) is SAFE_TILES
    assert "this GPU and dtype are not tuned" in tiles_origin(CUDA, torch.bfloat16)
    _recordings["of old tiles"] = object()
    path = write_user_table(GPU, [entry(128, n=1536, k=2048)], "2026-11-29")
    assert path.is_relative_to(own_cache / "peft-moe-qlora")
    forget_tables()
    assert not _recordings, "launches with other tiles were recorded"
    assert choose_tiles(*question) == tiles(128)
    assert choose_tiles(CUDA, torch.float32, *question[2:]) is SAFE_TILES
    assert choose_tiles(CUDA, torch.bfloat16, "e4m3", *question[3:]) is SAFE_TILES
    assert tuning.most_pairs_without_sorting(CUDA, torch.bfloat16) == SAFE_MOST_PAIRS
    origin = tiles_origin(CUDA, torch.bfloat16)
    assert origin == "tiles measured on NVIDIA Test 9000 by tune, 2026-11-29, for 1536x2048"

    # another model's entries are added, and the same one's replaced
    write_user_table(GPU, [entry(64, n=2048, k=768)], "2026-11-30")
    write_user_table(GPU, [entry(32, n=1536, k=2048)], "2026-12-01")
    forget_tables()
    assert choose_tiles(*question) == tiles(32)
    assert choose_tiles(*question[:-2], 2048, 768) == tiles(64)
    assert len(read_user_table(GPU).entries) == 2
    assert not list(path.parent.glob("*.part"))


def test_user_tiles_take_precedence_over_shipped_ones(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = GPU._replace(capability=(9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: gpu.capability)
    shipped = choose_tiles(CUDA, torch.bfloat16, "nf4", True, 50.0, 28672, 4096)
    write_user_table(gpu, [entry(16, n=1536, k=2048)], "2026-11-29")
    forget_tables()
    assert choose_tiles(CUDA, torch.bfloat16, "nf4", True, 50.0, 1536, 2048) == tiles(16)
    assert choose_tiles(CUDA, torch.bfloat16, "nf4", True, 50.0, 28672, 4096) == shipped, "a shape that is far"
    assert "by tune, 2026-11-29, for 1536x2048; else tiles of NVIDIA H200" in tiles_origin(CUDA, torch.bfloat16)


def test_other_gpus_and_compilers_have_separate_files(own_cache: Path) -> None:
    write_user_table(GPU, [entry(16, n=64, k=64)], "2026-11-29")
    others = [GPU._replace(device="NVIDIA Other"), GPU._replace(capability=(9, 0)), GPU._replace(triton="0.1")]
    assert all(read_user_table(other) is None for other in others)
    assert len({table_path(gpu) for gpu in (GPU, *others)}) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "it is not a text file"),
        (b"{", "it is not valid JSON"),
        (b"[]", "expected kind 'peft-moe-qlora tiles', version 1, found kind None"),
        (b'{"kind": "peft-moe-qlora tiles", "version": 99}', "version 1, found .*, version 99"),
        ("other GPU", "expected device 'NVIDIA Test 9000', found 'NVIDIA Other'"),
        ("bad entry", "entry 0 is not a valid entry"),
        ("no entries", "no list of entries"),
    ],
)
def test_damaged_or_foreign_file_is_rejected_by_name(own_cache: Path, content: bytes | str, message: str) -> None:
    path = write_user_table(GPU, [entry(16, n=64, k=64)], "2026-11-29")
    if isinstance(content, str):
        data = json.loads(path.read_text())
        changes = {
            "other GPU": {"device": "NVIDIA Other"},
            "bad entry": {"entries": [{}]},
            "no entries": {"entries": None},
        }
        content = json.dumps({**data, **changes[content]}).encode()
    path.write_bytes(content)
    forget_tables()
    for action in (
        lambda: choose_tiles(CUDA, torch.bfloat16, "nf4", True, 50.0, 64, 64),
        lambda: write_user_table(GPU, [entry(16, n=64, k=64)], "2026-11-29"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            action()
        assert str(path) in str(caught.value)
        assert "Delete the file" in str(caught.value)
    assert path.read_bytes() == content


def test_cache_directory_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_directory() == tmp_path / ".cache" / "peft-moe-qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_directory() == tmp_path / ".cache" / "peft-moe-qlora"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_directory() == Path("/elsewhere/peft-moe-qlora")


def test_products_of_a_layer() -> None:
    expected = [
        Product(1536, 2048, "columns", True),
        Product(2048, 768, "columns", False),
        Product(2048, 1536, "rows", False),
        Product(768, 2048, "rows", True),
    ]
    shape = LayerShape(128, 2048, 768, 8)
    assert products_of(shape, NF4) == expected
    flipped = {"columns": "rows", "rows": "columns"}
    transposed = [product._replace(along=flipped[product.along]) for product in expected]
    assert products_of(shape._replace(is_transposed=True), NF4) == transposed
    assert products_of(shape._replace(is_transposed=True), Mxfp4Format()) == expected, "stored (out, in) anyway"
    assert products_of(shape._replace(has_gate=False), None)[0].n == 768
    assert kind_of(None, expected[0]) == "dense"
    assert kind_of(NF4, expected[0]) == "nf4"
    assert kind_of(NF4, Product(64, 72, "columns", True)) == "dense", "blocks that span rows"
    assert kind_of(Fp8Format(), Product(64, 72, "columns", True)) == "e4m3"


@pytest.mark.parametrize("thorough", [False, True])
def test_candidates_decode_in_and_before_the_product(thorough: bool) -> None:
    for rows in (0.25, 1, 8, 32, 64, 256, 4096):
        tried = candidates(rows, thorough)
        assert len(set(tried)) == len(tried)
        assert {tiles.decode_first for tiles in tried} == ({False, True} if rows >= 64 else {False})
        assert {tiles.weight_left for tiles in tried} == {False, True}
        assert len(tried) <= 60
        parse_entries([{**entry(16), "tiles": {**tiles.__dict__, "heights": list(tiles.heights)}} for tiles in tried])


def test_bounds_are_between_measured_values() -> None:
    measured = [entry(16, n=64, k=64, rows_per_expert=rows) for rows in (1.0, 64.0, 256.0)]
    measured.append(entry(16, n=64, k=128, rows_per_expert=9.0))
    found = [
        (one["from_rows_per_expert"], one["measured_at"], one["rows_per_expert"]) for one in with_bounds(measured)
    ]
    assert found == [(0.25, 1, 8), (8, 64, 128), (128, 256, None), (2.25, 9, None)]


def test_layer_is_measured_product_by_product() -> None:
    """With a fake timer, in fp32, where the interpreter computes as a GPU does."""
    shape = LayerShape(3, 64, 64, 2)
    times = []

    def timer(run) -> float:
        run()
        times.append(10.0 - len(times) % 8)
        return times[-1]

    entries = measure_layer(shape, NF4, 4, [1.0, 2.0], workers=0, timer=timer, dtype=torch.float32, device=DEVICE)
    assert len(entries) == 8
    assert all(parse_entries(entries))
    assert {(one["n"], one["k"], one["along"]) for one in entries} == {
        (128, 64, "columns"),
        (64, 64, "columns"),
        (64, 128, "rows"),
        (64, 64, "rows"),
    }
    assert len(times) == 4 * sum(len(candidates(rows)) for rows in (1.0, 2.0))
    table = TuningTable("", 0, parse_entries(entries), {})
    # the last candidate was the fastest
    assert table.choose("nf4", True, 1.0, 128, 64) == candidates(1.0)[-1]
    assert [one["milliseconds"] for one in entries] == [3.0] * 8


def test_differing_results_of_candidates_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_moe_qlora.ops import tune

    product = tune.grouped_gemm
    monkeypatch.setattr(tune, "grouped_gemm", lambda *a: product(*a) * (1 + a[5].weight_left))
    with pytest.raises(ValueError, match="differ from"):
        measure_layer(
            LayerShape(2, 64, 64, 1), NF4, 0, [1.0], 0, timer=lambda run: 1.0, dtype=torch.float32, device=DEVICE
        )


def test_benchmark_replaces_only_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    import tune as benchmark

    assert benchmark.layer_shape(benchmark.SHAPES["qwen3-30b-a3b"]) == LayerShape(128, 2048, 768, 8)
    assert benchmark.layer_shape(benchmark.SHAPES["gpt-oss-20b"]) == LayerShape(32, 2880, 2880, 4, True)
    of_any_shape = entry(16, weight="packed")
    old = [of_any_shape, entry(32, weight="packed", n=64, k=64), entry(64, weight="packed", n=64, k=32)]
    new = [entry(128, weight="packed", n=64, k=64)]
    assert benchmark.merged(new, old) == [new[0], of_any_shape, old[2]]


def run_command(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["tune", *arguments])
    return code, *capsys.readouterr()


def test_command_without_a_gpu_raises(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, error = run_command(capsys, "--hidden", "64")
    assert code == 1
    assert "tune requires a GPU, but torch finds none" in error


def test_command_saves_its_measurements(
    own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_moe_qlora.ops import tune

    asked = []

    def measured(*arguments: object) -> list[dict]:
        asked.append(arguments)
        shape = arguments[0]
        return [entry(16, n=shape.hidden, k=shape.intermediate, measured_at=1.0, milliseconds=0.5)]

    monkeypatch.setattr(tune, "measure_layer", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    sizes = ["--hidden", "128", "--intermediate", "64", "--experts", "4", "--top-k", "2"]
    code, out, error = run_command(capsys, *sizes, "--rows", "16", "256", "--rank", "8", "--storage", "nf4/128")
    assert (code, error) == (0, "")
    assert asked[0][0] == LayerShape(4, 128, 64, 2)
    assert (str(asked[0][1]), *asked[0][2:]) == ("nf4/128", 8, [16, 256], None)
    assert str(table_path(GPU)) in out
    assert "tiles measured on NVIDIA Test 9000 by tune" in out
    assert read_user_table(GPU).entries == (Entry("nf4", "columns", math.inf, tiles(16), n=128, k=64),)

    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "vocab_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_command(capsys, str(tmp_path), "--storage", "16-bit")[0] == 0
    assert asked[1][:2] == (LayerShape(8, 64, 32, 3), None)

    for arguments, message in (
        (sizes[:2], "Pass a model, or all of --hidden, --intermediate, --experts, --top-k"),
        ([str(tmp_path), *sizes[:2]], "--hidden is only valid with a shape instead of a model"),
        ([*sizes, "--storage", "nf5"], "nf5"),
    ):
        code, _, error = run_command(capsys, *arguments)
        assert code == 1
        assert message in error
    assert len(asked) == 2, "refused before the work"
