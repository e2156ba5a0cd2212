"""Every notebook of examples/ runs from top to bottom and prints what it shows."""

import contextlib
import functools
import io
import json
import re
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"
NEEDS_SMOLLM2 = EXAMPLES / "finetune_and_chat.ipynb"
NOTEBOOKS = sorted({*EXAMPLES.rglob("*.ipynb")} - {NEEDS_SMOLLM2})


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def shown(cell: dict) -> str:
    """The text that the notebook stores as a cell's output."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")


def without_digits(text: str) -> str:
    """Accuracies differ in their last digits between processors and versions."""
    return re.sub(r"\d+", "0", text)


@functools.cache
def printed(path: Path) -> list[str]:
    """The text that each cell prints, when all run in one namespace."""
    scope: dict = {}
    texts = []
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as in a user's session
        for cell in code_cells(path):
            stream = io.StringIO()
            with contextlib.redirect_stdout(stream):
                exec("".join(cell["source"]), scope)
            texts.append(stream.getvalue())
    return texts


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_prints_what_it_shows(path):
    stored = [without_digits(shown(cell)) for cell in code_cells(path)]
    assert list(map(without_digits, printed(path))) == stored


def test_the_flax_notebook_learns_its_second_task():
    text = "".join(printed(EXAMPLES / "flax_layers.ipynb"))
    before, after = map(float, re.findall(r"([\d.]+)% before, ([\d.]+)% after", text)[0])
    assert after > before + 30


@pytest.mark.slow
def test_the_chat_notebook_finetunes_and_answers(smollm2_gguf, monkeypatch):
    monkeypatch.chdir(EXAMPLES)
    *_, finetuned, answered, saved = printed(NEEDS_SMOLLM2)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", finetuned)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert answered.startswith("str of ") and "adapter_model.safetensors" in saved
