"""Losses, log-probabilities and LoRA gradients of every objective equal TRL's trainers in f32, packed and not."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, PreferenceArgs
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.writer import in_peft_format, write_adapter
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import Lora, ModelParts, partition
from qlora_jax.objectives.make_objective import make_objective
from qlora_jax.objectives.objective import Objective
from qlora_jax.objectives.sequences import SequenceLogps
from qlora_jax.training.step import compared_outputs, evaluation_outputs, gradients
from tests.io.tiny_models import random_weights, tiny_config, tokenizer_json, write_folder
from tests.marks import EXHAUSTIVE
from tests.training.preference_rows import batch_of, labelled_rows, pair_rows, random_labelled, random_pairs

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parent.parent / "oracle/trl_objectives.py"
LORA = LoraArgs(rank=4, alpha=8.0, target_modules=["q_proj", "v_proj", "down_proj"])
TOLERANCE = 1e-5
PAIRS, LABELLED = random_pairs(6, vocabulary=32), random_labelled(6, vocabulary=32)

# name: (objective, its settings; TRL's trainer, its settings)
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "dpo": ("dpo", {"beta": 0.3}, "dpo", {"beta": 0.3}),
    "hinge": ("dpo", {"loss_type": "hinge"}, "dpo", {"loss_type": ["hinge"]}),
    "ipo": ("dpo", {"loss_type": "ipo"}, "dpo", {"loss_type": ["ipo"]}),
    "robust": (
        *("dpo", {"loss_type": "robust", "label_smoothing": 0.2}),
        *("dpo", {"loss_type": ["robust"], "label_smoothing": 0.2}),
    ),
    "kto": ("kto", {"undesirable_weight": 1.5}, "kto", {"undesirable_weight": 1.5}),
    "apo": (
        *("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.5}),
        *("kto", {"loss_type": "apo_zero_unpaired", "beta": 0.5}),
    ),
    "orpo": ("orpo", {"beta": 0.4}, "orpo", {"beta": 0.4}),
    "cpo": ("cpo", {"label_smoothing": 0.1}, "cpo", {"label_smoothing": 0.1}),
    "cpo hinge": ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.5}, "cpo", {"loss_type": "hinge", "cpo_alpha": 0.5}),
    "cpo ipo": ("cpo", {"loss_type": "ipo"}, "cpo", {"loss_type": "ipo"}),
    "simpo": (
        *("simpo", {"beta": 2.0, "simpo_gamma": 1.0}),
        *("cpo", {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    ),
    "simpo with cross-entropy": (
        *("simpo", {"cpo_alpha": 1.0, "label_smoothing": 0.1}),
        *("cpo", {"loss_type": "simpo", "label_smoothing": 0.1}),
    ),
}  # fmt: skip
# Micro-batches of rows, by their indices, and of packs with gaps.
FORMS = {
    "padded": [[[4], [1]], [[2], [3]], [[0], [5]]],
    "one micro-batch": [[[4], [1], [2], [3], [0], [5]]],
    "packed": [[[4, 1], [2, -1]], [[3, 0], [5, -1]]],
}


def _objective(name: str) -> Objective:
    objective, settings, _, _ = CASES[name]
    given = {"model": ModelArgs(path="m"), "data": DataArgs(train="t"), "output": "o"}
    return make_objective(Config(objective=objective, preference=PreferenceArgs(**settings), **given))  # pyright: ignore


@functools.cache
def _parts(folder: Path) -> ModelParts:
    source = open_model(folder)
    model = load_model(source, model_config(source.config), WeightFormat(quant_type=None, dtype="float32")).model
    attach_method(model, LORA, jax.random.key(0))
    return partition(model)


def _random_lora(parts: ModelParts, seed: int) -> Lora:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.15, leaf.shape), leaf.dtype), parts.lora)


def _in_peft_format(folder: Path, lora: Lora):
    features = model_config(open_model(folder).config)
    named = {features.hugging_face_name(name): jax.tree.map(np.asarray, leaves) for name, leaves in lora.items()}
    return in_peft_format(named, LORA, features, str(folder))


def _write_adapter(folder: Path, base: Path, lora: Lora) -> str:
    config, tensors = _in_peft_format(base, lora)
    folder.mkdir()
    write_adapter(folder, tensors, config)
    return str(folder)


def _batch(form: str, objective: Objective, reference: np.ndarray | None) -> dict[str, np.ndarray]:
    """All rows in a form of FORMS."""
    if objective.row_kind == "pair":
        rows = pair_rows(PAIRS, reference)
    else:
        rows = labelled_rows(LABELLED, reference, kl=objective.kl_pairs)
    sequences = objective.sequences_per_row
    return batch_of(rows, FORMS[form], 64, packed=form == "packed", sequences=sequences).arrays()


def _sequences(kind: str) -> dict[str, jax.Array]:
    """The batch of all rows, each with two sequences."""
    rows = pair_rows(PAIRS) if kind == "pair" else labelled_rows(LABELLED)
    batch = batch_of(rows, [[[index] for index in range(6)]], 64, packed=False, sequences=2).arrays()
    return {name: jnp.asarray(array[0]) for name, array in batch.items()}


@functools.cache
def _reference_logps(folder: Path, kind: str) -> np.ndarray:
    """log p of the sequences [rows, 2] under the reference."""
    parts = _parts(folder).with_lora(_random_lora(_parts(folder), 1))
    objective = _objective("dpo" if kind == "pair" else "kto")
    return np.asarray(evaluation_outputs(parts, _sequences(kind), objective=objective).logps_BS)


def _check_logps(outputs: SequenceLogps, found: dict[str, np.ndarray], name: str, form: str) -> None:
    """Compares log p of each row's sequences; TRL's CPO and ORPO return means per token where their loss reads them."""
    objective, _, trainer, settings = CASES[name]
    rows, each = np.array(FORMS[form]), _objective(name).sequences_per_row  # [A, B, R]; the other slots are empty
    slots, shape = rows.shape[-1] * each, (*rows.shape, each)
    logps, tokens = (np.asarray(sums)[..., :slots].reshape(shape) for sums in (outputs.logps_BS, outputs.tokens_BS))
    if objective == "orpo" or (trainer == "cpo" and settings.get("loss_type") in ("ipo", "simpo")):
        logps = logps / np.maximum(tokens, 1)
    expected = found[f"{name}/logps" if trainer in ("cpo", "orpo") else f"{trainer}/policy"][rows, :each]
    there = rows >= 0
    assert set(rows[there]) == set(range(6)) and np.abs(expected).min() > 0.1
    np.testing.assert_allclose(logps[there], expected[there], rtol=TOLERANCE, err_msg=f"{name}, {form}")


def _check(found: dict[str, np.ndarray], name: str, form: str, base: Path) -> None:
    objective = _objective(name)
    reference = _reference_logps(base, objective.row_kind)
    parts = _parts(base).with_lora(_random_lora(_parts(base), 2))
    grads, loss = gradients(parts, _batch(form, objective, reference), None, remat="names", objective=objective)
    where = f"{name}, {form}"
    _check_logps(loss.outputs, found, name, form)
    np.testing.assert_allclose(loss.total / loss.count, found[f"{name}/loss"], rtol=TOLERANCE, err_msg=where)
    ours = _in_peft_format(base, grads)[1]
    theirs = {key.partition("/grad/")[2]: value for key, value in found.items() if key.startswith(f"{name}/grad/")}
    assert ours.keys() == theirs.keys()
    largest = max(np.abs(value).max() for value in theirs.values())
    assert largest > 1e-3, where
    for key, value in theirs.items():
        np.testing.assert_allclose(ours[key], value, atol=TOLERANCE * largest, err_msg=f"{where}: {key}")


@pytest.mark.parametrize(
    "chosen",
    [
        [("dpo", "packed"), ("kto", "packed"), ("kto", "one micro-batch"), ("orpo", "packed")],
        pytest.param([(name, form) for name in CASES for form in FORMS], marks=EXHAUSTIVE),
    ],
    ids=["some", "all"],
)
def test_objectives_equal_trl(tmp_path: Path, oracle, chosen: list[tuple[str, str]]) -> None:
    config = tiny_config()
    files = {"tokenizer.json": tokenizer_json()}
    base = write_folder(tmp_path / "base", config, random_weights(config), 1, **files)
    start, policy = _random_lora(_parts(base), 1), _random_lora(_parts(base), 2)
    found = oracle(
        SCRIPT,
        base=str(base),
        tokenizer=str(base / "tokenizer.json"),
        start=_write_adapter(tmp_path / "start", base, start),
        policy=_write_adapter(tmp_path / "policy", base, policy),
        pairs=[pair._asdict() for pair in PAIRS],
        labelled=[row._asdict() for row in LABELLED],
        cases={name: CASES[name][2:] for name in dict.fromkeys(["dpo", "kto", *(name for name, _ in chosen)])},
    )
    for name, kind in (("dpo", "pair"), ("kto", "labelled")):
        both = _parts(base).with_lora(policy), _parts(base).with_lora(start)
        compared = compared_outputs(both, _sequences(kind))
        ours = {"reference": _reference_logps(base, kind), "policy": compared.logps_BS, "divergence": compared.kl_BS}
        np.testing.assert_allclose(compared.reference_BS, found[f"{name}/reference"], rtol=TOLERANCE)
        for part, values in ours.items():
            np.testing.assert_allclose(values, found[f"{name}/{part}"], rtol=TOLERANCE, err_msg=f"{name}/{part}")
    for name, form in chosen:
        _check(found, name, form, base)
