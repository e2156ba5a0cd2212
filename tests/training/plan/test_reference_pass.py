"""The reference pass in a plan: its share of the run's operations, and its memory."""

import pytest

from pallas_kernels import aot
from qlora_jax.config import DataArgs, TrainArgs
from qlora_jax.data.dataset import load_dataset
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer
from qlora_jax.io.open_model import open_model
from qlora_jax.objectives.dpo import DPO
from qlora_jax.objectives.objective import read_by_outputs
from qlora_jax.training.plan.reference_pass import reference_of_step
from qlora_jax.training.plan.step_memory import estimated_requirements
from qlora_jax.training.step import compared_outputs, evaluation_outputs
from qlora_jax.training.step_spec import abstract_batch
from tests.e2e.project import write_model, write_rows
from tests.training.plan.steps import TINY, real

PAIRS = TINY.replace(objective=DPO(), branching=True, batch=(1, 16, 256))


def test_a_forward_pass_is_a_half_of_a_step_with_frozen_weights():
    """Frozen products run forward and for dx, so the pass over a long model is half of an epoch, less attention's."""
    asked = real("llama-3-8b", (1, 1, 1024), objective=DPO(), branching=True)
    found = reference_of_step(asked, None, TrainArgs(epochs=3.0))
    assert 0.45 < found.work.epochs < 0.5 and found.share == found.work.epochs / (3 + found.work.epochs)
    assert f"FLOP of {found.work.epochs:.2f} epochs, {found.share:.0%} of the run's; about" in str(found)
    assert reference_of_step(asked, None, TrainArgs(steps=10)).share is None
    assert reference_of_step(asked.replace(objective=TINY.objective), None, TrainArgs()) is None


def test_the_pass_has_at_most_eight_rows_and_no_gradients():
    found, step = reference_of_step(PAIRS, None, TrainArgs()), estimated_requirements(PAIRS)
    few = estimated_requirements(PAIRS.replace(batch=(1, 8, 256))).device
    alone = sum(few.values()) - few["gradients"] - few["saved activations"]
    assert found.device == alone < step.total
    compared = reference_of_step(PAIRS.replace(compared=True), None, TrainArgs())
    assert compared.device == alone + 2 * few["trained"]  # one of them in host memory, which a CPU shares


@pytest.mark.slow
def test_its_estimated_scratch_is_near_that_of_its_compiled_programs():
    config = PAIRS.replace(batch=(1, 8, 256))
    arrays = read_by_outputs(abstract_batch(config.batch, config.objective, branching=True), config.objective)
    batch = {name: type(array)(array.shape[1:], array.dtype) for name, array in arrays.items()}
    resident = estimated_requirements(config).device
    estimated = reference_of_step(config, None, TrainArgs()).device - sum(resident.values())
    estimated += resident["gradients"] + resident["saved activations"] + resident["scratch"]
    the_pass = evaluation_outputs.lower(config.arrays.parts, batch, objective=config.objective, mesh=None)
    comparison = compared_outputs.lower((config.arrays.parts, config.arrays.parts), batch)
    alone, both = (
        aot.read_memory(one.compile().memory_analysis()).device.temporaries for one in (the_pass, comparison)
    )
    assert 1 / 3 < alone / estimated <= both / estimated < 3


@pytest.mark.slow
def test_known_rows_are_counted(tmp_path):
    rows, model = write_rows(tmp_path / "rows.jsonl"), write_model(tmp_path / "model")
    tokenizer = load_tokenizer(open_model(model).tokenizer)
    data = DataArgs(train=str(rows), max_length=250)
    report = load_dataset(data, tokenizer, seed=0, micro_batch_size=2, accumulation=1).report
    found = reference_of_step(PAIRS, report, TrainArgs(steps=10))
    assert (found.work.rows, found.work.tokens) == (report.train.kept, report.train.tokens)
    assert 1 / 3 < found.work.epochs < 1 / 2
    assert found.share == found.work.epochs / (found.work.epochs + 10 / report.steps_per_epoch)
    assert str(found).startswith(f"{report.train.kept:,} rows, {report.train.tokens:,} tokens, ")
