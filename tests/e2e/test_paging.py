"""Whole runs with optimizer state in pages: the same bits, whatever the budget, and from each other's checkpoints."""

import dataclasses
import functools
import io
import itertools
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from qlora_jax.io.run_folder.checkpoint import Checkpoints
from qlora_jax.optim.page_pool import PagingError
from qlora_jax.training import loop
from qlora_jax.training.metrics.metrics_file import read_metrics
from qlora_jax.training.optimizer_state import make_state_manager
from qlora_jax.training.run import train
from tests.e2e.project import project
from tests.e2e.tiny_runs import Records, arrays_at, numbers, session_of
from tests.marks import first_always, some_in_ci
from tests.optim.memory_pressure import SimulatedMemory

STEPS = 10


def with_paging(config, folder, steps=None, **optim):
    """The same run in another folder, paged otherwise."""
    return dataclasses.replace(
        config,
        output=str(folder),
        optim=dataclasses.replace(config.optim, **{"paging": "off", "paging_budget": None, **optim}),
        train=dataclasses.replace(config.train, steps=steps or config.train.steps),
    )


def run(config, resume=False):
    out = io.StringIO()
    assert train(
        config, Path(config.output), resume=resume, oversized=False, console=Console(file=out, width=200)
    ).finished
    return out.getvalue()


def paging_numbers(config):
    keys = ("paged_in_bytes", "paged_out_bytes", "resident_bytes")
    records = read_metrics(Path(config.output) / "metrics.jsonl")
    return [tuple(record[key] for key in keys) for record in records if "paged_in_bytes" in record]


def assert_same_runs(config, expected):
    assert numbers(config) == numbers(expected)
    for paged, plain in zip(arrays_at(config, STEPS), arrays_at(expected, STEPS), strict=True):
        np.testing.assert_array_equal(paged, plain)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of 10 steps with its state on the device."""
    config = project(tmp_path_factory.mktemp("plain"), layers=4, optim=dict(schedule="constant"))
    assert "paging" in run(config).split("not used")[1]
    assert paging_numbers(config) == []
    return config


def test_a_declared_budget_moves_p_minus_c_pages_and_changes_no_bit(plain, tmp_path):
    config = with_paging(plain, tmp_path / "run", paging="on", paging_budget="70KiB")
    text = run(config)
    assert_same_runs(config, plain)
    (*_, resident), *later = paging_numbers(config)
    page, budget = resident // 2, 70 * 1024
    assert 2 * page <= budget < 3 * page
    assert set(later) == {(2 * page, 2 * page, 2 * page)}
    assert "at most 70.00 KiB on the device; the rest in pinned host memory" in text
    assert "optimizer paging" not in text.split("not used")[1].splitlines()[0]
    assert "resident, " in text.split("step 2/10")[1].splitlines()[0]


def test_auto_leaves_all_on_a_device_with_room_and_says_what_it_assumes(plain, tmp_path):
    config = with_paging(plain, tmp_path / "run", paging="auto")
    text = run(config)
    assert_same_runs(config, plain)
    first, *later = paging_numbers(config)
    assert first == (first[2], 0, first[2])
    assert set(later) == {(0, 0, first[2])}
    assert "(the machine's memory, because this backend reports no limit)" in text


MODES = [
    dict(),
    dict(paging="on", paging_budget="70KiB"),
    dict(paging="on", paging_budget="1GiB"),
    dict(paging="auto"),
]


@pytest.mark.parametrize(("before", "after"), first_always([(0, 1), (1, 0), (1, 2), (2, 1), (1, 3)]))
def test_a_run_goes_on_with_another_budget_or_mode(plain, tmp_path, before, after, monkeypatch):
    config = with_paging(plain, tmp_path / "run", **MODES[before])
    monkeypatch.setattr("qlora_jax.training.run.run_steps", functools.partial(steps_until, 4))
    assert not train(
        config, Path(config.output), resume=False, oversized=False, console=Console(file=io.StringIO())
    ).finished
    monkeypatch.undo()
    config = with_paging(plain, tmp_path / "run", **MODES[after])
    run(config, resume=True)
    assert_same_runs(config, plain)


@pytest.mark.parametrize(
    ("before", "dtype"),
    some_in_ci(
        [("adamw_8bit", "float32"), ("paged_adamw_8bit", "float32"), ("adamw_8bit", "bfloat16")], lambda i: i == 0
    ),
)
def test_an_8_bit_run_goes_on_paged_or_not_to_the_bit(tmp_path, before, dtype, monkeypatch):
    size = dict(lora=dict(rank=64, dtype=dtype), optim=dict(name="adamw_8bit", schedule="constant"))
    whole = project(tmp_path / "whole", layers=4, **size)
    run(whole)
    paged = dict(paging="on", paging_budget="320KiB")
    config = with_paging(whole, tmp_path / "run", name=before, **(paged if before.startswith("paged") else {}))
    monkeypatch.setattr("qlora_jax.training.run.run_steps", functools.partial(steps_until, 4))
    assert not train(
        config, Path(config.output), resume=False, oversized=False, console=Console(file=io.StringIO())
    ).finished
    monkeypatch.undo()
    after = with_paging(whole, tmp_path / "run", **({} if before.startswith("paged") else paged))
    run(after, resume=True)
    assert_same_runs(after, whole)
    kinds = [leaf.dtype.name for leaf in arrays_at(whole, STEPS)]
    assert (
        kinds.count("uint8") > 4
        and ("bfloat16" in kinds) == (dtype == "bfloat16")
        and paging_numbers(after if "paged" not in before else config)
    )


def steps_until(last, session, progress, checkpoints, reporter, stop, before_step):
    """run_steps, stopped by a signal after a step."""
    steps = []

    def before():
        steps.append(None)
        before_step()

    return loop.run_steps(session, progress, checkpoints, reporter, lambda: len(steps) >= last, before)


def simulated_session(config, **changes):
    """A session whose pages live on a simulated device."""
    session = session_of(dataclasses.replace(config, optim=dataclasses.replace(config.optim, paging="auto")))
    memory = SimulatedMemory(jax.devices()[0], "pinned_host", **changes)
    updates = make_state_manager(session.run.config.optim, session.run.total_steps, session.run.gradients, memory)
    return dataclasses.replace(session, state_manager=updates), memory


def test_a_long_batch_sends_away_what_it_needs_and_nothing_else_moves(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_jax.training.optimizer_state.PAGE_BYTES", 1)  # a page a layer
    session = session_of(plain)
    long, short = max(session.run.inputs.dataset.buckets), min(session.run.inputs.dataset.buckets)
    shapes = {length: (2, 2, length) for length in (short, long)}
    needs = {length: need(session.run.gradients.compiled(shape)) for length, shape in shapes.items()}
    assert needs[long] > needs[short]
    state = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(session.parts.lora))  # m and v
    # Room for all pages beside a short batch, and so for fewer beside a long one.
    session, _ = simulated_session(plain, total_bytes=int((needs[short] + state) / 0.97) + 1024)
    records = Records()
    with Checkpoints(tmp_path, 2) as checkpoints:
        loop.run_steps(session, loop.initial_state(session), checkpoints, records, lambda: False)
    steps = [record for record in records if "loss" in record]
    assert {record["length"] for record in steps} == {long, short}
    for before, record in itertools.pairwise(steps):
        assert (record["paged_out_bytes"] > 0) == (record["length"] == long), (before, record)
        assert record["paged_out_bytes"] == record["paged_in_bytes"]
        assert record["resident_bytes"] == state
    for found, expected in zip(arrays_at_folder(tmp_path), arrays_at(plain, STEPS), strict=True):
        np.testing.assert_array_equal(found, expected)


def need(program) -> int:
    analysis = program.memory_analysis()
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def arrays_at_folder(folder):
    saved = folder / "checkpoints" / str(STEPS)
    return jax.tree.leaves([ocp.StandardCheckpointer().restore(saved / item) for item in ("lora", "optimizer")])


def test_a_page_without_a_place_stops_the_run_at_its_checkpoint(plain, tmp_path):
    session, memory = simulated_session(plain, total_bytes=10**9, others=[0, 10**9])
    records = Records()
    with Checkpoints(tmp_path, 2) as checkpoints:
        progress = loop.run_steps(
            session, loop.initial_state(session), checkpoints, records, lambda: sum("loss" in r for r in records) == 2
        )
        memory.advance()
        with pytest.raises(PagingError, match="the device has no room for it"):
            loop.run_steps(session, progress, checkpoints, Records(), lambda: False)
        assert checkpoints.latest_step() == 2


@pytest.mark.parametrize(
    ("budget", "words"),
    [("1KiB", "at least .* bytes, one page"), ("900000GiB", "at most .* bytes, the device's memory")],
)
def test_a_budget_that_can_not_be_is_told_before_the_model_is_loaded(plain, tmp_path, budget, words, monkeypatch):
    monkeypatch.setattr("qlora_jax.training.session.load_model", None)
    config = with_paging(plain, tmp_path / "run", paging="on", paging_budget=budget)
    with pytest.raises(ValueError, match=f"optim.paging_budget: found .* bytes, expected {words}"):
        session_of(config)
