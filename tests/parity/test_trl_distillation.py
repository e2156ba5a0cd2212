"""Distillation losses and LoRA gradients equal TRL's in f32, also packed and on a mesh, and a teacher's top k."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.data.batching.batches import fill_batch
from qlora_jax.data.batching.packing import Batch
from qlora_jax.data.readers.files import Place
from qlora_jax.data.rows import TokenRows, token_rows
from qlora_jax.models.partition import ModelParts, place_parts
from qlora_jax.objectives.distillation import Distillation
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training.step import gradients
from qlora_jax.training.teacher.local import LocalTeacher
from qlora_jax.training.teacher.logprob_cache import LiveTeacher
from tests.io.tiny_models import random_weights, tiny_config, write_folder
from tests.parity.test_trl_policies import TOLERANCE, check_gradients, float32_parts, random_lora, write_start
from tests.training.preference_rows import random_ids, tree

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent / "oracle/trl_distillation.py"
VOCABULARY, TOP_K = 32, 5
CASES: dict[str, dict[str, Any]] = {
    f"gkd {beta}": {"beta": beta, "temperature": 1.0, "top_k": 0, "add_tail": True} for beta in (0.0, 0.1, 0.5, 1.0)
}
CASES |= {
    "gkd at a temperature": {"beta": 0.3, "temperature": 1.7, "top_k": 0, "add_tail": True},
    "top 5": {"beta": 0.0, "temperature": 1.0, "top_k": TOP_K, "add_tail": True},
    "top 5 at a temperature": {"beta": 0.0, "temperature": 0.6, "top_k": TOP_K, "add_tail": True},
    "top 5 without a tail": {"beta": 0.0, "temperature": 1.0, "top_k": TOP_K, "add_tail": False},
    "reverse top 1": {"beta": 1.0, "temperature": 1.0, "top_k": 1, "add_tail": True},
    "jsd top 1": {"beta": 0.4, "temperature": 0.8, "top_k": 1, "add_tail": True},
}  # fmt: skip
# Rows of micro-batches, of packs, and with gaps for eight devices.
FORMS = {
    "padded": [[[0], [1]], [[2], [3]]],
    "packed": [[[1, 0]], [[3, 2]]],
    "mesh": [[[2], [3], [0], [1], [-1], [-1], [-1], [-1]]],
}


def text_rows() -> TokenRows:
    """Four prompts with an answer, of very different lengths."""
    rng = np.random.default_rng(0)
    rows = [tree([*random_ids(rng, 9, VOCABULARY), 4], [random_ids(rng, 12, VOCABULARY)]) for _ in range(4)]
    rows = [row._replace(branches=()) for row in rows]
    return token_rows("rows.jsonl", rows, [Place(index + 1, index) for index in range(len(rows))])


def batch_of(form: str) -> Batch:
    return fill_batch(text_rows(), np.array(FORMS[form]), 64, 0, packed=form == "packed")


def objective_of(case: dict[str, Any]) -> Distillation:
    how = {"beta": case["beta"], "temperature": case["temperature"], "has_tail": case["add_tail"]}
    return Distillation(count_of_tokens=case["top_k"] or VOCABULARY, **how)


def teacher_of(parts: ModelParts, objective: Distillation) -> LocalTeacher:
    count, temperature = objective.count_of_tokens, objective.temperature
    return LocalTeacher(parts=parts, count=count, temperature=temperature, tokens=VOCABULARY)


@pytest.fixture(scope="module")
def trl(tmp_path_factory: pytest.TempPathFactory, oracle) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """The base model, the teacher, which is wider, and TRL's results of all cases."""
    folder, config, wider = tmp_path_factory.mktemp("distill"), tiny_config(), tiny_config(intermediate_size=96)
    base = write_folder(folder / "base", config, random_weights(config), 1)
    teacher = write_folder(folder / "teacher", wider, random_weights(wider, seed=3), 1)
    policy = write_start(folder / "policy", base, random_lora(float32_parts(base), 2))
    rows = text_rows()
    each = [rows.row(index) for index in range(len(rows))]
    found = oracle(
        SCRIPT,
        base=str(base),
        teacher=str(teacher),
        policy=policy,
        rows=[ids.tolist() for ids, _ in each],
        supervised=[supervised.astype(int).tolist() for _, supervised in each],
        cases=CASES,
        top_k=TOP_K,
    )
    return base, teacher, found


def test_the_teachers_likeliest_tokens_are_those_of_transformers(trl):
    _, teacher, found = trl
    batch = batch_of("mesh")
    objective = Distillation(count_of_tokens=TOP_K)
    own = LiveTeacher(teacher_of(float32_parts(teacher), objective)).attach(batch).token_values
    for place, row in enumerate([2, 3, 0, 1]):
        at = np.flatnonzero(batch.weights[0, place])
        np.testing.assert_array_equal(own["teacher_ids"][0, place, at], found["teacher_ids"][row, at])
        np.testing.assert_allclose(own["teacher_logps"][0, place, at, :-1], found["teacher_logps"][row, at], atol=1e-5)
        rest = np.log1p(-np.exp(found["teacher_logps"][row, at].astype(np.float64)).sum(axis=-1))
        np.testing.assert_allclose(own["teacher_logps"][0, place, at, -1], rest, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_trl(trl, name: str, form: str):
    base, teacher, found = trl
    objective = objective_of(CASES[name])
    arrays = LiveTeacher(teacher_of(float32_parts(teacher), objective)).attach(batch_of(form)).arrays()
    parts = float32_parts(base)
    parts, mesh = parts.with_lora(random_lora(parts, 2)), make_mesh(2, 4) if form == "mesh" else None
    if mesh is not None:
        parts, arrays = place_parts(parts, mesh), jax.device_put(arrays, named(mesh, P(None, ROWS)))
    grads, loss = gradients(parts, arrays, None, remat="names", objective=objective, mesh=mesh)
    np.testing.assert_allclose(loss.total / loss.count, found[f"{name}/loss"], rtol=TOLERANCE, atol=1e-7)
    check_gradients(grads, found, name, base, name)
