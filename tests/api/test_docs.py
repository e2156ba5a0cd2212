"""The Python examples of README.md and docs/python.md run, and docs/python.md names every public name."""

import json
import re
from pathlib import Path

import jax
import pytest

import qlora_jax
from tests.e2e.project import write_model

ROOT = Path(__file__).resolve().parents[2]
PYTHON_PAGE = (ROOT / "docs/python.md").read_text(encoding="utf-8")
PAGES = {"README.md": (ROOT / "README.md").read_text(encoding="utf-8"), "docs/python.md": PYTHON_PAGE}


def examples(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def write_project(folder: Path) -> None:
    """The files that the examples use, with a tiny model in place of SmolLM2."""
    write_model(folder / "models/SmolLM2-135M-Instruct", max_position_embeddings=2048)
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


def test_every_public_name_is_on_the_page():
    missing = [name for name in qlora_jax.__all__ if not re.search(rf"\bq\.{name}\b", PYTHON_PAGE)]
    assert not missing
