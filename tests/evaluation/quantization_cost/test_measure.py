"""Costs of layers in 4 bits: against models that are loaded with this layer alone in 4 bits."""

import dataclasses
import json

import numpy as np
import pytest

from qlora_jax import quantize, train
from qlora_jax.api.quantization_cost import measure_quantization
from qlora_jax.config import ConfigError
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.quantization_cost.choose import Choice
from qlora_jax.evaluation.quantization_cost.files import Measured, check_choice
from qlora_jax.evaluation.quantization_cost.measure import increase_intervals
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.io.pretrained import load_base, open_base
from qlora_jax.measures.metrics import RowScores
from qlora_jax.measures.statistics import paired_bootstrap
from qlora_jax.models.decoder import bytes_of
from qlora_jax.models.partition import partition
from qlora_jax.models.precision import weight_format
from tests.e2e.project import write_model, write_rows
from tests.e2e.test_reasoning_chats import write_chats, write_tokenizer

BUDGET = "220KiB"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 2 layers, rows, and the files that the command writes."""
    folder = tmp_path_factory.mktemp("costs")
    write_model(folder / "model")
    write_rows(folder / "rows.jsonl", 12)
    words = ["--model", str(folder / "model"), "--measure", str(folder / "rows.jsonl"), "--budget", BUDGET]
    quantize.main([*words, "--output", str(folder / "costs")])
    return folder


@pytest.mark.slow
def test_costs_are_those_of_models_with_one_layer_in_4_bits(folder):
    found = json.loads((folder / "costs/layer_costs.json").read_text())
    increases = [layer["increase"] for layer in found["layers"]]
    assert len(increases) == 14 and increases == sorted(increases, reverse=True)
    assert all(low < layer["increase"] < high for layer in found["layers"] for low, high in [layer["interval"]])
    config = train.COMMAND.read(
        ["--config", str(folder / "costs/keep_16bit.yaml"), "--data.train", "rows.jsonl", "--output", "run"]
    )[0]
    args = dataclasses.replace(config.model, compute_dtype="float32")
    opened = open_base(args)
    rows = rows_task(str(folder / "rows.jsonl"), opened.tokenizer, max_rows=None, max_positions=256).rows

    def loss(**changes) -> float:
        return score_rows(partition(load_base(opened, dataclasses.replace(args, **changes))), rows).mean_nll

    dense = loss(quant_type="none", keep_16bit=[])
    everything = [layer["layer"] for layer in found["layers"]]
    for layer in (found["layers"][0], found["layers"][-1]):
        others = [name for name in everything if name != layer["layer"]]
        assert loss(keep_16bit=others) - dense == pytest.approx(layer["increase"], abs=2e-6)
    # The settings that were written make the model whose loss was reported, and it is within the budget.
    assert loss() == pytest.approx(found["loss per token"]["chosen"], abs=1e-7)
    assert found["loss per token"]["16 bits"] == pytest.approx(dense, abs=1e-7)
    chosen = found["chosen"]
    assert args.keep_16bit == chosen["keep_16bit"] != []
    stored = dataclasses.replace(weight_format(args, opened.features), dtype="bfloat16")
    assert bytes_of(opened.features, stored) == found["base_bytes"] + chosen["added_bytes"] <= 220 * 1024
    # The check of the choice: its loss is not above that of all layers in 4 bits.
    assert chosen["change"] == pytest.approx(
        found["loss per token"]["chosen"] - found["loss per token"]["4 bits"], abs=1e-12
    )
    assert chosen["change"] < 0 and chosen["interval"][1] < 0


def test_intervals_are_those_of_each_pair():
    rng = np.random.default_rng(0)
    base, tokens = rng.uniform(5, 50, 20), rng.integers(3, 30, 20)
    others = base[:, None] + rng.normal(0.1, 0.5, (20, 3))
    found = increase_intervals(base, others, tokens)
    for column in range(3):
        assert tuple(found[:, column]) == pytest.approx(paired_bootstrap(base, others[:, column], tokens), abs=1e-12)


def test_a_choice_that_raises_the_loss_is_an_error():
    def scores(nll: float) -> RowScores:
        no = np.zeros(4, bool)
        return RowScores(nll=nll + np.arange(4.0), tokens=np.full(4, 10), exact=no, begins=no)

    choice = Choice(costs=(), saved=0.1, gap=0.0, added_bytes=0)
    measured = Measured(title="rows", costs=(), dense=scores(1.0), quantized=scores(2.0), base_bytes=1, choice=choice)
    check_choice(dataclasses.replace(measured, kept=scores(1.5)))
    with pytest.raises(ValueError, match=r"the loss is higher \(found \+0\.10000 \[\+0\.10000, \+0\.10000\]"):
        check_choice(dataclasses.replace(measured, kept=scores(3.0)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--budget 1GiB", "budget: found '1GiB' without measure"),
        ("--measure r --quant_type none", "quant_type: found 'none' with measure"),
        ("--measure r --budget much", "budget: found 'much'"),
        ("--measure r --keep_16bit [v_proj]", r"keep_16bit: found \['v_proj'\] with measure"),
        ("--quant_type none --keep_16bit [v_proj]", r"keep_16bit: found \['v_proj'\] with quant_type=none"),
    ],
)
def test_settings_that_contradict_each_other(words, message):
    with pytest.raises(ConfigError, match=message):
        quantize.COMMAND.read(["--model", "m", "--output", "o", *words.split()])


@pytest.mark.slow
def test_files_that_cannot_be_measured(folder, tmp_path):
    rows = str(folder / "rows.jsonl")
    with pytest.raises(ValueError, match=r"budget: found 1\.00 KiB, but the base with all layers in 4 bits has"):
        measure_quantization(str(folder / "model"), rows, budget="1KiB")
    quantize.main(["--model", str(folder / "model"), "--output", str(tmp_path / "nf4")])
    with pytest.raises(ValueError, match="already in 4 bits, so the loss in 16 bits cannot be measured"):
        measure_quantization(str(tmp_path / "nf4"), rows)


@pytest.mark.slow
def test_intervals_resample_rows_although_a_row_has_several_texts(tmp_path):
    model = write_model(tmp_path / "model", vocab_size=260)
    write_tokenizer(model)
    found = measure_quantization(str(model), write_chats(tmp_path / "chats.jsonl", (3, 1, 2)))
    assert found.title.endswith("3 rows in 6 texts") and len(found.dense.nll) == len(found.quantized.nll) == 3
    assert all(low < cost.increase < high for cost in found.costs for low, high in [cost.interval])
