"""What a saved adapter's README says of how it is loaded."""

from __future__ import annotations

from pathlib import Path

_IMPORT = "import peft_moe_qlora"
_PLACE = "Use the code below to get started with the model.\n\n[More Information Needed]"
"""In the template that PEFT fills in (huggingface_hub's model card)."""


def add_loading(directory: str | Path, base: str | None, format_version: int) -> None:
    """Writes how the adapter is loaded into a directory's README.md, once.

    Args:
        directory: of the adapter.
        base: what it was trained on, as its config names it.
        format_version: of the adapter file.
    """
    file = Path(directory, "README.md")
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if _IMPORT in text:
        return
    model = base or "a mixture-of-experts model"
    section = (
        f"An adapter of `peft-moe-qlora`, format version {format_version}, for {model}. "
        "One import makes it known to PEFT.\n\n"
        "```python\n"
        f"{_IMPORT}\n"
        "from peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("this directory, or its name on the hub")\n'
        "```"
    )
    if _PLACE in text:
        text = text.replace(_PLACE, section)
    else:
        text = f"{text.rstrip()}\n\n## Loading\n\n{section}\n".lstrip()
    file.write_text(text, encoding="utf-8")
