"""Runs the examples in the docstrings of public names, in a folder with a tiny model and its data."""

import doctest
import importlib
import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import qlora_jax as q

# Names whose examples are pages (tests/extensions/test_page.py runs docs/extending.md), and those of settings.
WITHOUT = {
    *("register_method", "register_objective", "register_row_format", "register_export", "MethodDeclaration"),
    *("RowFormat", "LoRA", "Config", "QuantRule", "QTensor", "nn"),
}
# Columns of files, by the number of a row.
ROWS = {
    "labels.jsonl": {"text": lambda n: f"row {n}", "label": lambda n: ("bad", "good")[n % 2]},
    "numbers.jsonl": {"text": lambda n: f"row {n}", "label": float},
    "pairs.jsonl": {"anchor": lambda n: f"row {n}", "positive": lambda n: f"line {n}"},
}


def documented() -> list:
    names = [name for name in q.__all__ if name not in WITHOUT]
    return [pytest.param(name, marks=pytest.mark.slow) if name == "make_plan" else name for name in names]  # compiles


@pytest.mark.parametrize("name", documented())
def test_its_example_runs(name, project, tmp_path, monkeypatch):
    (tmp_path / "model").symlink_to(project.model_folder)
    (tmp_path / "rows.jsonl").symlink_to(project.rows)
    for file, columns in ROWS.items():
        rows = [{column: value(number) for column, value in columns.items()} for number in range(8)]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    found = inspect.unwrap(getattr(q, name))
    module = importlib.import_module(found.__module__)
    names = {"q": q, "jax": jax, "jnp": jnp, "np": np, "optax": optax, "nnx": nnx}
    names |= {"model": project.base, "tokenizer": project.tokenizer}
    text = inspect.getdoc(found)
    examples = doctest.DocTestParser().get_doctest(text, names, name, module.__file__, 0)
    assert examples.examples, f"{name} has no example"
    report: list[str] = []
    doctest.DocTestRunner().run(examples, out=report.append)
    assert not report, "".join(report)
