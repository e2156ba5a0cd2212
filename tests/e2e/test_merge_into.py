"""Whole runs with `lora.merge_into`: training and decoding compute with the same codes, and runs resume to the bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qlora_jax as q
from qlora_jax.config import LoraArgs
from qlora_jax.export import main as export
from qlora_jax.io.pretrained import apply_adapter, load_base, open_pretrained
from qlora_jax.methods.merge_into import without_rounding
from qlora_jax.models.partition import combine, prepare_for_decoding
from qlora_jax.training.display.banner import start_banner
from tests.e2e.project import project
from tests.e2e.test_paging import assert_same_runs
from tests.e2e.test_preferences import pairs_project
from tests.e2e.tiny_runs import first_batch, numbers, run, session_of, stop_and_resume
from tests.marks import first_slow

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
CASES = {
    "q4_0": dict(lora=dict(merge_into="q4_0")),
    "nf4": dict(lora=dict(merge_into="nf4")),
    "q8_0 on a dense base": dict(lora=dict(merge_into="q8_0"), model=dict(quant_type="none")),
    "lora_fa": dict(lora=dict(merge_into="q4_0", method="lora_fa")),
    "dora in bf16": dict(lora=dict(merge_into="q4_0", method="dora"), model=dict(compute_dtype="bfloat16")),
    "ia3": dict(lora=dict(merge_into="q8_0", method="ia3", rank=16), optim=dict(learning_rate=1e-1)),
    "oft": dict(lora=dict(merge_into="q4_0", method="oft", rank=16, oft_block_size=8)),
    "vera": dict(lora=dict(merge_into="q4_0", method="vera", rank=32), optim=dict(learning_rate=1e-1)),
    "two of seven projections": dict(lora=dict(merge_into="q4_0", target_modules=["q_proj", "down_proj"])),
}


def merged_project(folder, case, sizes=SIZES):
    return project(folder, base=sizes, **{**case, "lora": dict(dropout=0.0) | case["lora"]})


@pytest.fixture(scope="module", params=first_slow([*CASES]))
def finished(request, tmp_path_factory):
    """A run of 10 steps, uninterrupted."""
    config = merged_project(tmp_path_factory.mktemp("finished"), CASES[request.param])
    assert run(config)
    return config


def opened_parts(config):
    opened = open_pretrained(run=config.output)
    return apply_adapter(load_base(opened, opened.args), opened.run)


def logits(parts):
    tokens = jnp.asarray(np.arange(24, dtype=np.int32)[None])
    return np.asarray(jax.jit(lambda parts: combine(parts).head.logits(combine(parts).hidden(tokens)))(parts), "f4")


def test_the_loss_falls(finished):
    losses = [record["eval_loss"] for record in numbers(finished) if "eval_loss" in record]
    assert losses[-1] < 0.9 * losses[0]


def test_a_resumed_run_equals_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    config = dataclasses.replace(finished, output=str(tmp_path / "run"))
    stop_and_resume(config, 4, monkeypatch)
    assert_same_runs(config, finished)


def test_decoding_has_the_codes_that_training_computed_with(finished):
    """Decoding is a plain model in codes; its logits are equal to the bit where its products are of the same form."""
    parts = opened_parts(finished)
    codes = prepare_for_decoding(parts)
    assert not codes.lora and parts.lora
    found, expected = logits(codes), logits(parts)
    tolerance = 1e-5 if finished.model.compute_dtype == "float32" else 2e-2
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_reference_of_preferences_is_the_rounded_base(tmp_path):
    """At the start the model is its reference, to the bit: the log-ratios are those of equal weights."""
    config = pairs_project(tmp_path, lora=dict(merge_into="q4_0"))
    assert run(config)
    first = next(record for record in numbers(config) if "eval_loss" in record)
    assert first["eval_loss"] == pytest.approx(np.log(2)) and first["eval_rewards_margin"] == 0
    last = [record for record in numbers(config) if "eval_loss" in record][-1]
    assert last["eval_loss"] < first["eval_loss"]


@pytest.mark.slow
def test_rounding_may_begin_after_a_share_of_the_steps(tmp_path, monkeypatch):
    """The switch needs no other program; a run resumed before it is equal to the bit, and evaluation always rounds."""
    config = merged_project(tmp_path, dict(lora=dict(merge_into="q4_0", merge_from=0.5)))
    session = session_of(config)
    assert session.run.first_rounded == 5
    merged = start_banner(session)[1]["merged"]
    assert merged == "products are with base and adapter merged and rounded to q4_0, as exported, from step 6 on"
    _, arrays = first_batch(session)
    rounded = float(session.run.gradients(session.parts, arrays, None)[1].total)
    programs = len(session.run.gradients)
    assert rounded != float(session.run.gradients(without_rounding(session.parts), arrays, None)[1].total)
    assert len(session.run.gradients) == programs
    assert run(config)
    whole = dataclasses.replace(config, output=str(tmp_path / "whole"), lora=LoraArgs(rank=4, merge_into="q4_0"))
    assert run(whole)
    first, expected = (next(each for each in numbers(one) if "eval_loss" in each) for one in (config, whole))
    assert first == expected
    first, other = (next(each for each in numbers(one) if "loss" in each) for one in (config, whole))
    assert first["loss"] != other["loss"]
    resumed = dataclasses.replace(config, output=str(tmp_path / "resumed"))
    stop_and_resume(resumed, 4, monkeypatch)
    assert_same_runs(resumed, config)


@pytest.mark.slow
def test_a_checkpoint_from_before_the_first_rounded_step_is_not_exported(tmp_path, monkeypatch):
    config = merged_project(tmp_path, dict(lora=dict(merge_into="nf4", merge_from=0.5), train=dict(keep=9)))
    assert run(config)
    for step in (3, 9):
        arguments = [
            "--run",
            config.output,
            "--format",
            "hf",
            "--step",
            str(step),
            "--output",
            str(tmp_path / f"{step}"),
        ]
        if step == 9:
            export(arguments)
            continue
        with pytest.raises(ValueError, match=r"no step up to run, step 3 computed with rounded weights, because"):
            export(arguments)
        with pytest.raises(ValueError, match=r"computed with rounded weights, because lora\.merge_from=0\.5"):
            q.merge(q.load(config.output, step=3)[0], tmp_path / "merged")


def test_a_reference_is_rounded_in_all_steps(tmp_path):
    config = pairs_project(tmp_path, lora=dict(merge_into="q4_0", merge_from=0.5))
    with pytest.raises(
        ValueError, match=r"lora.merge_from: found 0.5 with objective=dpo, whose reference or sampler has rounded"
    ):
        run(config)
