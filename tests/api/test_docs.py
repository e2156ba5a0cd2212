"""The Python examples of README.md and docs/python.md run, and docs/python.md names every public name."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import qlora_jax
from qlora_jax.models.partition import partition
from qlora_jax.training.step import gradients
from tests.e2e.project import TEMPLATE, write_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON_PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
PAGES = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), "docs/python.md": PYTHON_PAGE}


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def write_project(folder: Path) -> None:
    """The files that the examples use, with a tiny model in place of SmolLM2."""
    write_model(folder / "HuggingFaceTB/SmolLM2-135M-Instruct", max_position_embeddings=2048)
    rows = [{"prompt": f"say {word}", "completion": word} for word in ("sun", "moon", "star", "sky") * 8]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    scope: dict[str, object] = {}
    found = examples(PAGES[page])
    for number, example in enumerate(found):
        with jax.numpy_dtype_promotion("standard"):  # optax requires it, and it is the default outside of tests
            exec(compile(example, f"{page}, example {number + 1}", "exec"), scope)
    assert (tmp_path / "adapter/adapter_config.json").is_file() and (tmp_path / "runs/mine/config.yaml").is_file()


# Reasoning is written into the last turn alone, so earlier turns are branches.
DROPS_REASONING = TEMPLATE.replace("m['content']", "(m.reasoning_content or '' if loop.last else '') + m['content']")


@pytest.mark.slow
def test_the_training_loop_of_the_page_gives_rows_with_branches_their_mask(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_project(tmp_path)
    settings = tmp_path / "HuggingFaceTB/SmolLM2-135M-Instruct/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "chat_template": DROPS_REASONING}))
    turns = [("user", "say sun", ""), ("assistant", "sun", "a word;"), ("user", "moon", ""), ("assistant", "m", "it;")]
    messages = [{"role": role, "content": text, "reasoning_content": thought} for role, text, thought in turns]
    rows = [{"messages": messages}, {"messages": [*messages[2:], *messages]}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scope: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        loop = next(example for example in examples(PYTHON_PAGE) if "q.prepare_data" in example)
        in_f32 = loop.replace('SmolLM2-135M-Instruct")', 'SmolLM2-135M-Instruct", compute_dtype="float32")')
        assert in_f32 != loop
        exec(in_f32, scope)
    batch = scope["batch"].arrays()
    assert scope["data"].branching and (batch["parents"] != batch["segments"]).any()
    parts = partition(scope["trained"])
    expected, loss = gradients(parts, batch, None, remat="none")
    micro = {name: array[0] for name, array in batch.items()}
    value, found = jax.jit(jax.value_and_grad(scope["loss"]))(scope["lora"], scope["frozen"], micro)
    np.testing.assert_allclose(value, loss.total / loss.count, rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * np.abs(ours).max())


def test_every_public_name_is_on_the_page():
    missing = [name for name in qlora_jax.__all__ if not re.search(rf"\bq\.{name}\b", PYTHON_PAGE)]
    assert not missing
