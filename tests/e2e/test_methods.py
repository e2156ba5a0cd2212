"""Whole runs of each method: the loss falls, stopping and pages change nothing, and what was learned is handed on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import methods
from qlora_jax.export import main as export
from qlora_jax.io.export.methods import refusal
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained
from qlora_jax.models.partition import combine, prepare_for_decoding
from tests.e2e.project import project
from tests.e2e.test_paging import assert_same_runs, paging_numbers, with_paging
from tests.e2e.tiny_runs import arrays_at, first_losses_before_and_after, numbers, run, stop_and_resume
from tests.marks import some_in_ci

# (IA)^3's vectors start at 1 and learn more slowly: its learning rate is larger, as its authors' was (3e-3, LoRA 1e-4).
METHODS = {
    "dora": dict(lora=dict(method="dora")),
    "dora in bf16": dict(lora=dict(method="dora", dtype="bfloat16"), model=dict(compute_dtype="bfloat16")),
    "pissa": dict(lora=dict(init="pissa", svd_niter=4)),
    "loftq": dict(lora=dict(init="loftq", loftq_iterations=2), model=dict(double_quant=False)),
    "dora of pissa": dict(lora=dict(method="dora", init="pissa")),
    "oft": dict(lora=dict(method="oft", oft_block_size=8, rank=16, dropout=0.0)),
    "oft, exact, shared, in bf16": dict(
        lora=dict(method="oft", oft_blocks=4, block_share=True, use_cayley_neumann=False, rank=16, dropout=0.0)
        | dict(dtype="bfloat16"),
        model=dict(compute_dtype="bfloat16"),
    ),
    "vera": dict(lora=dict(method="vera", rank=32), optim=dict(learning_rate=1e-1)),
    "ia3": dict(lora=dict(method="ia3", rank=16, dropout=0.0), optim=dict(learning_rate=1e-1)),
    "ln_tuning": dict(lora=dict(method="ln_tuning", rank=16, dropout=0.0), optim=dict(learning_rate=1e-1)),
    "bitfit": dict(
        lora=dict(method="bitfit", rank=16, dropout=0.0),
        optim=dict(learning_rate=1e-1),
        base=dict(attention_bias=True, mlp_bias=True),
    ),
    "houlsby": dict(lora=dict(method="houlsby", dropout=0.0)),
    "pfeiffer in bf16": dict(
        lora=dict(method="pfeiffer", dropout=0.0, dtype="bfloat16"), model=dict(compute_dtype="bfloat16")
    ),
}
# A trained leaf of each method, and the budget that holds a part of the optimizer state.
LEAVES = {
    "ia3": ("model.layers.self_attn.k_proj", "vector"),
    "dora": ("model.layers.self_attn.k_proj", "magnitude"),
    "lora": ("model.layers.self_attn.k_proj", "lora_b"),
    "oft": ("model.layers.self_attn.k_proj", "oft_r"),
    "vera": ("model.layers.self_attn.k_proj", "lambda_b"),
    "ln_tuning": ("model.layers.input_layernorm", "gain"),
    "bitfit": ("model.layers.self_attn.k_proj", "bias"),
    "houlsby": ("model.layers.self_attn", "up_bias"),
    "pfeiffer": ("model.layers.mlp", "up_bias"),
}
BUDGETS = {
    "ia3": "4KiB",
    "vera": "12KiB",
    "oft": "40KiB",
    "ln_tuning": "2KiB",
    "bitfit": "12KiB",
    "houlsby": "20KiB",
    "pfeiffer": "10KiB",
}


IN_CI = ("dora", "pissa", "ia3")  # a way to adapt of each kind; the others are theirs with another setting


@pytest.fixture(scope="module", params=some_in_ci([(m,) for m in METHODS], lambda i: list(METHODS)[i] in IN_CI))
def finished(request, tmp_path_factory):
    """A run of 10 steps, uninterrupted."""
    config = project(tmp_path_factory.mktemp("finished"), layers=4, **METHODS[request.param])
    assert run(config)
    return config


def test_the_loss_falls(finished):
    losses = [record["eval_loss"] for record in numbers(finished) if "eval_loss" in record]
    assert losses[-1] < 0.9 * losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    stop_and_resume(config, 4, monkeypatch)
    assert_same_runs(config, finished)


def test_pages_change_no_bit(finished, tmp_path):
    """Vectors and matrices are paged together."""
    budget = BUDGETS.get(finished.lora.method, "70KiB")
    config = with_paging(finished, tmp_path / "run", paging="on", paging_budget=budget)
    run(config)
    assert_same_runs(config, finished)
    assert any(moved for moved, *_ in paging_numbers(config)[1:])


def test_8_bit_state(finished, tmp_path):
    """Small leaves, such as vectors, stay in 32 bits; a paged run is bit-identical."""
    whole = with_paging(finished, tmp_path / "whole", name="adamw_8bit")
    run(whole)
    paged = with_paging(finished, tmp_path / "paged", name="adamw_8bit", paging="on", paging_budget="1MiB")
    run(paged)
    assert_same_runs(paged, whole)
    losses = [record["eval_loss"] for record in numbers(whole) if "eval_loss" in record]
    assert losses[-1] < 0.9 * losses[0]


def test_what_was_learned_is_there_when_it_is_opened(finished):
    opened = open_pretrained(run=finished.output)
    assert opened.run is not None and opened.run.lora_args == finished.lora
    parts = apply_adapter(load_base(opened, opened.args), opened.run)
    saved = {str(leaf.shape): leaf for leaf in arrays_at(finished, 10)}
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in saved.values())
    module, name = LEAVES[finished.lora.method]
    leaf = parts.lora[module][name]
    assert leaf.dtype == np.float32 and np.std(leaf) > 1e-3


def test_training_goes_on_from_the_exported_adapter(finished, tmp_path):
    if refusal(finished.lora.method, "peft"):
        pytest.skip(f"PEFT has no form of {finished.lora.method}")
    fresh, more = first_losses_before_and_after(finished, tmp_path)
    assert more < 0.95 * fresh


def test_formats_that_cannot_hold_it_are_refused(finished, tmp_path):
    for form in methods.METHODS[finished.lora.method].refused_exports:
        with pytest.raises(ValueError, match=f"--format {form}: it cannot hold lora.method={finished.lora.method}, "):
            export(["--run", finished.output, "--format", form, "--output", str(tmp_path / form)])
        assert not (tmp_path / form).exists()


def test_decoding_is_what_was_trained(finished):
    """Values computed once for many tokens, and the dtype of matrices, change nothing else."""
    opened = open_pretrained(run=finished.output)
    assert opened.run is not None
    parts = apply_adapter(load_base(opened, opened.args), opened.run)
    tokens = jnp.asarray(np.arange(24, dtype=np.int32)[None])
    found, expected = (
        np.asarray(jax.jit(lambda parts: combine(parts).hidden(tokens))(each), "f4")
        for each in (prepare_for_decoding(parts), parts)
    )
    tolerance = 1e-5 if finished.model.compute_dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())
