"""A run tells its memory plan before it loads anything, and what to change where the device is too small."""

import io
from pathlib import Path

import jax
import pytest
from rich.console import Console

from qlora_jax.training import run
from qlora_jax.training.plan import run_plan
from qlora_jax.training.plan.step_memory import CPU_PROGRAMS
from tests.e2e.project import project


def start(config, *, oversized=False) -> str:
    """Returns the output of a run."""
    out = io.StringIO()
    run.train(config, Path(config.output), resume=False, oversized=oversized, console=Console(file=out, width=200))
    return out.getvalue()


def device_of(size: int, monkeypatch) -> None:
    monkeypatch.setattr(run_plan, "device_bytes", lambda memory: (size, "a small device"))


def test_the_plan_comes_first(tmp_path):
    printed = start(project(tmp_path, train=dict(steps=1)))
    assert printed.index("memory plan") < printed.index("QLoRA finetuning")
    assert "2 x 128 tokens" in printed and "saved activations" in printed


@pytest.mark.slow
def test_a_run_that_does_not_fit_is_refused_with_the_nearest_fix_before_it_loads(tmp_path, monkeypatch):
    config = project(tmp_path, layers=8, train=dict(steps=1, remat="none", micro_batch_size=8))
    monkeypatch.setattr(run, "prepare", lambda *_: pytest.fail("loaded"))
    device_of(30_000_000 + CPU_PROGRAMS, monkeypatch)
    with pytest.raises(ValueError, match=r"(?s)DOES NOT FIT.*--train\.\w+") as refused:
        start(config)
    assert "--oversized starts it anyway" in str(refused.value)
    assert not Path(config.output).exists()


def test_activations_in_host_memory_are_refused_on_a_cpu(tmp_path):
    with pytest.raises(ValueError, match=r"remat=offload: a CPU's arrays are in host memory already.*remat=full"):
        start(project(tmp_path, train=dict(steps=1, remat="offload")))


@pytest.mark.slow
def test_it_starts_where_it_is_told_to(tmp_path, monkeypatch):
    device_of(1000, monkeypatch)
    assert "QLoRA finetuning" in start(project(tmp_path, train=dict(steps=1)), oversized=True)


@pytest.mark.slow
def test_a_device_that_runs_out_of_memory_is_told_with_the_plan(tmp_path, monkeypatch):
    def exhausted(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 12 bytes.")

    monkeypatch.setattr(run, "run_steps", exhausted)
    with pytest.raises(ValueError) as told:
        start(project(tmp_path, train=dict(steps=1)))
    for part in ("ran out of memory: RESOURCE_EXHAUSTED", "breakdown: weights", "longest rows that fit"):
        assert part in str(told.value)


def test_other_errors_of_the_device_stay_what_they_are(tmp_path, monkeypatch):
    def broken(*_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(run, "run_steps", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        start(project(tmp_path, train=dict(steps=1)))
