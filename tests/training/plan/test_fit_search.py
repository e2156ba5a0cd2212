"""Memory plans: answers that follow from what is compiled, and few compilations."""

import pytest

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.training.plan.fit_search import MAX_COMPILES, estimated_range, make_plan
from tests.training.plan.steps import TINY, Compiler, total


def test_what_fits_is_told_with_the_most_that_would():
    limit = total(TINY.resized(4, 768)) + 1
    compiler = Compiler()
    plan = make_plan(TINY, limit, compiler)
    assert plan.fits and plan.change is None and len(compiler.asked) <= MAX_COMPILES
    assert plan.requested.source == "compiled" and plan.longest.config.batch == (2, 4, 768)
    rows = plan.largest.config.batch[1]
    assert total(TINY.resized(rows, 512)) <= limit < total(TINY.resized(rows + 1, 512))
    assert plan.largest.config.batch[0] * rows >= 2 * 4  # as many rows an optimizer step
    assert [need.config.batch[2] for need in plan.shorter] == [256, 128]


def test_sizes_between_compiled_steps_are_interpolated_and_larger_ones_compiled():
    between, beyond = Compiler(), Compiler()
    plan = make_plan(TINY, total(TINY.resized(4, 768)) + 1, between)
    assert plan.largest.config.rows == 4 * 768 and plan.largest.source == "fitted"
    assert between.asked == [((2, 4, 512), "names"), ((2, 4, 704), "names")]  # 704: by the estimate's proportion
    plan = make_plan(TINY, 10**12, beyond)
    assert plan.largest.config.batch == (1, 256, 512) and plan.largest.source == "compiled"
    assert len(beyond.asked) == 3


def test_the_datas_own_lengths_are_rows_of_the_plan():
    plan = make_plan(TINY, 10**12, Compiler(), (64, 192, 448, 512))
    assert [need.config.batch for need in plan.shorter] == [(2, 4, length) for length in (448, 192, 64)]
    assert {need.source for need in plan.shorter} == {"fitted"}
    assert [need.total for need in plan.shorter] == [total(TINY.resized(4, length)) for length in (448, 192, 64)]
    assert not make_plan(TINY, 10**12, Compiler(), (512,)).shorter


def test_nothing_longer_than_the_model_was_made_for():
    plan = make_plan(TINY, 10**12, Compiler())
    assert plan.longest.config.batch[2] == TINY.model.max_positions


@pytest.mark.parametrize(
    ("spare", "options"),
    [
        (lambda: total(TINY.replace(paged=True)), {"optim.paging": "auto"}),
        (lambda: total(TINY.replace(remat="full")), {"train.remat": "full"}),
    ],
    ids=["paging", "remat"],
)
def test_the_nearest_change_is_the_first_that_fits_and_is_compiled(spare, options, monkeypatch):
    monkeypatch.setattr("qlora_jax.training.plan.step_memory.PAGES_IN_FLIGHT", 1000)
    compiler = Compiler()
    plan = make_plan(TINY, spare(), compiler)
    assert not plan.fits and plan.change.options == options
    assert plan.change.requirements.source == "compiled" and plan.change.requirements.total <= plan.limit
    assert len(compiler.asked) <= MAX_COMPILES


def test_a_change_that_the_compiler_refutes_gives_way_to_the_next():
    limit = total(TINY.resized(2, 512)) + 1
    assert total(TINY.replace(remat="full")) <= limit  # interpolated from the other policy
    plan = make_plan(TINY, limit, Compiler(extra=10_000_000))
    assert plan.change.options.keys() == {"train.micro_batch_size", "train.accumulation"}
    rows, accumulated = plan.change.options.values()
    assert plan.change.requirements.config.batch == (accumulated, rows, 512) and rows * accumulated >= 8


def test_what_no_error_of_the_estimate_lets_fit_is_not_compiled():
    asked = TINY.replace(lora=LoraArgs(rank=128), optim=OptimArgs(name="adamw_8bit"), batch=(8, 1, 512), remat="full")
    halved = asked.replace(lora=LoraArgs(rank=128, dtype="bfloat16"))
    limit = total(halved)
    assert estimated_range(asked)[0] > limit
    compiler = Compiler()
    plan = make_plan(asked, limit, compiler)
    assert plan.change.options == {"lora.dtype": "bfloat16"} and plan.change.requirements.source == "compiled"
    assert len(compiler.asked) == 1 and plan.requested.source == "fitted" and not plan.fits


def test_nothing_fits_where_the_weights_alone_do_not():
    compiler = Compiler()
    plan = make_plan(TINY, 1000, compiler)
    assert not plan.fits and plan.change is None and plan.longest is None and plan.largest is None
    assert not compiler.asked


def test_without_a_compiler_every_number_is_marked_an_estimate():
    plan = make_plan(TINY, 10**9, None)
    assert {need.source for need in (plan.requested, *plan.shorter, plan.longest, plan.largest)} == {"estimated"}
