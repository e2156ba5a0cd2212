"""The README's Python does what it says, and names what there is."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import qlora_jax

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_readme():
    missing = [name for name in qlora_jax.__all__ if f"q.{name}" not in README]
    assert not missing and len(qlora_jax.__all__) == 12


def test_every_file_that_the_readme_points_to_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"bash (scripts/\w+\.sh)", README)
    assert links and not [link for link in links if not (ROOT / link).exists()]


@pytest.mark.slow
def test_the_python_example_gives_gradients(smollm2_gguf, tmp_path, monkeypatch):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").symlink_to(smollm2_gguf)
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(import jax\n.*?)```", README, re.DOTALL)
    scope = {}
    exec(example, scope)
    tokens = jnp.arange(40, dtype=jnp.int32)[None]
    grads = scope["gradients"](scope["lora"], tokens, tokens + 1)
    norms = {name: float(jnp.linalg.norm(leaves["lora_b"])) for name, leaves in grads.items()}
    assert len(norms) == 7 and all(norm > 0 for norm in norms.values())
    assert jax.tree.structure(grads) == jax.tree.structure(scope["lora"])
