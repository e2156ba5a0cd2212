"""Full finetuning: every weight changes; resuming and paging do not change the results."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from qlora_jax.io.export.merged import export_merged
from qlora_jax.io.export.peft import export_peft
from qlora_jax.io.pretrained import apply_adapter, load_base, open_finetuned, open_pretrained
from qlora_jax.models.partition import combine, prepare_for_decoding
from tests.e2e.project import project
from tests.e2e.test_paging import assert_same_runs, paging_numbers, with_paging
from tests.e2e.tiny_runs import numbers, run, stop_and_resume

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 10 steps over a model with biases, uninterrupted."""
    config = project(
        tmp_path_factory.mktemp("finished"),
        base=dict(attention_bias=True, mlp_bias=True),
        model=dict(quant_type="none"),
        lora=dict(method="full", rank=16, dropout=0.0),
    )
    assert run(config)
    return config


def _export(config, output: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    export_merged(open_finetuned(config.output), output, "hf", dtype=dtype)
    return load_file(output / "model.safetensors")


def test_the_loss_falls_and_every_tensor_moves(finished, tmp_path):
    losses = [record["eval_loss"] for record in numbers(finished) if "eval_loss" in record]
    assert losses[-1] < 0.8 * losses[0]
    before, after = load_file(Path(finished.model.path) / "model.safetensors"), _export(finished, tmp_path / "hf")
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    stop_and_resume(config, 4, monkeypatch)
    assert_same_runs(config, finished)


def test_pages_change_no_bit(finished, tmp_path):
    config = with_paging(finished, tmp_path / "run", paging="on", paging_budget="500KiB")
    run(config)
    assert_same_runs(config, finished)
    assert any(moved for moved, *_ in paging_numbers(config)[1:])


def test_what_was_learned_is_there_when_it_is_opened_exported_and_decoded(finished, tmp_path):
    tokens = jnp.asarray(np.arange(24, dtype=np.int32)[None])
    _export(finished, tmp_path / "hf")
    of_run = open_pretrained(run=finished.output)
    assert of_run.run is not None
    parts = apply_adapter(load_base(of_run, of_run.args), of_run.run)
    exported = open_pretrained(model=str(tmp_path / "hf"))
    args = dataclasses.replace(exported.args, quant_type="none", compute_dtype="float32")
    expected, merged, decoded = (
        np.asarray(jax.jit(lambda model=model: model.hidden(tokens))())
        for model in (combine(parts), load_base(exported, args), combine(prepare_for_decoding(parts)))
    )
    np.testing.assert_allclose(merged, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(decoded, expected, atol=1e-5 * np.abs(expected).max())


def test_a_model_written_in_the_dtype_of_training_computes_the_same_to_the_bit(tmp_path):
    config = project(
        tmp_path / "project",
        model=dict(quant_type="none", compute_dtype="bfloat16"),
        lora=dict(method="full", rank=16, dropout=0.0),
        train=dict(steps=3),
    )
    assert run(config)
    _export(config, tmp_path / "hf", "bfloat16")
    tokens = jnp.asarray(np.arange(24, dtype=np.int32)[None])
    of_run = open_pretrained(run=config.output)
    assert of_run.run is not None
    exported = open_pretrained(model=str(tmp_path / "hf"))
    args = dataclasses.replace(exported.args, quant_type="none", compute_dtype="bfloat16")
    trained, written = (
        jax.jit(lambda model=model: model.head.logits(model.hidden(tokens)))()
        for model in (combine(apply_adapter(load_base(of_run, of_run.args), of_run.run)), load_base(exported, args))
    )
    np.testing.assert_array_equal(written, trained)


def test_there_is_no_adapter_to_export(finished, tmp_path):
    with pytest.raises(ValueError, match=r"all of the model was trained .* --format hf"):
        export_peft(open_finetuned(finished.output), tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
