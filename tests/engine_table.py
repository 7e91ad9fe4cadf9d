"""The page docs/engines.md, generated from the package's table of engines; test_engine_models.py tests its rows.

`python tests/engine_table.py` writes it.
"""

from __future__ import annotations

from pathlib import Path

from peft_moe_qlora.layouts.engines import LLAMA_CPP, MLX, SGLANG, VLLM, Engine

PAGE = Path(__file__).parent.parent / "docs" / "engines.md"
ENGINES = (VLLM, SGLANG, LLAMA_CPP, MLX)
EVIDENCE = {
    "run": "**",
    "converted": "*",
    "source": "",
}
"""Evidence of a row -> format of its cell: bold, italic or plain."""


def cell(engine: Engine, class_name: str) -> str:
    row = engine.rows.get(class_name)
    if row is None:
        return ""
    mark = EVIDENCE[row["evidence"]]
    return f"{mark}{row['layout']}{mark}"


def notes() -> list[str]:
    """A line for each note, with the models that it applies to."""
    found: dict[tuple[str, str], list[str]] = {}
    for engine in ENGINES:
        for name, row in engine.rows.items():
            if row["note"]:
                found.setdefault((engine.name, row["note"]), []).append(f"`{name}`")
    return [f"| {engine} | {', '.join(models)} | {note} |" for (engine, note), models in found.items()]


def documentation() -> str:
    """The text of the page."""
    classes = sorted({name for engine in ENGINES for name in engine.rows}, key=str.lower)
    lines = [
        "# Engines",
        "",
        "Written by `python tests/engine_table.py` from [engines.csv](../peft_moe_qlora/layouts/engines.csv), the",
        "table that `peft-moe-qlora convert` uses. `tests/test_engine_models.py` checks every row against",
        "transformers and against the list of models that `tests/check_engines.py` runs in the engines' own code.",
        "",
        "A cell names the adapter layout that the engine reads for the model: **bold** if the engine's own code has",
        "loaded such an adapter and produced its delta, *italic* if the engine's converter has accepted or rejected",
        "it, plain if it was read in the engine's source. An empty cell is not on the tested list, and `convert`",
        "rejects it; [merge](merging.md) the adapter instead.",
        "",
        f"| model | {' | '.join(engine.name for engine in ENGINES)} |",
        f"|--|{'--|' * len(ENGINES)}",
        *(f"| `{name}` | {' | '.join(cell(engine, name) for engine in ENGINES)} |" for name in classes),
        "",
        "## Notes",
        "",
        "| engine | models | |",
        "|--|--|--|",
        *notes(),
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(documentation(), encoding="utf-8")
