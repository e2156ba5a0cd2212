"""Costs of 4 bits in mixtures of experts, from the measurement to a run with the layers that it chose."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qlora_jax import quantize, train
from qlora_jax.config import LoraArgs, ModelArgs
from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.quantization_cost.measure import quantized_one_by_one
from qlora_jax.evaluation.tasks.rows import rows_task
from qlora_jax.io.hf.fused_experts import name_in_files
from qlora_jax.io.pretrained import load_base, open_base
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.decoder import bytes_of
from qlora_jax.models.partition import combine, partition
from qlora_jax.models.precision import full_names, layer_bytes
from tests.e2e.project import TEMPLATE, byte_tokenizer_json, write_rows
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder
from tests.models.mixtures import NARROW, random_mixture

TOKENS = dict(vocab_size=258, max_position_embeddings=256, bos_token_id=256, eos_token_id=257)
EXPERTS = ("gate_proj", "up_proj", "down_proj")
WEIGHTS = WeightFormat(dtype="bfloat16")


def _write_mixture(folder: Path, name: str) -> Path:
    config = FAMILIES[name][1] | TOKENS
    tensors = {name_in_files(config, tensor): 3 * values for tensor, values in random_tensors(config).items()}
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>", "chat_template": TEMPLATE}
    files = {"tokenizer.json": byte_tokenizer_json(), "tokenizer_config.json": json.dumps(special)}
    return write_folder(folder, config, tensors, **files)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["mixtral", "gptoss"])
def test_experts_are_ranked_chosen_and_trained_with(tmp_path: Path, capsys, name: str) -> None:
    model, rows = _write_mixture(tmp_path / "model", name), write_rows(tmp_path / "rows.jsonl", 12)
    features = open_base(ModelArgs(path=str(model))).features
    small, large = layer_bytes("mlp.experts.down_proj", features, WEIGHTS)
    budget = bytes_of(features, WEIGHTS) + 2 * (large - small)
    words = [
        "--model",
        str(model),
        "--measure",
        str(rows),
        "--budget",
        f"{budget}B",
        "--output",
        str(tmp_path / "costs"),
    ]
    quantize.main(words)
    assert "all of them are in 4 bits, or in 16" in capsys.readouterr().out
    found = json.loads((tmp_path / "costs/layer_costs.json").read_text())
    ranked = [layer["layer"] for layer in found["layers"]]
    assert {f"model.layers.{layer}.mlp.experts.{part}" for layer in (0, 1) for part in EXPERTS} < {*ranked}
    assert len(ranked) == 14
    chosen, losses = found["chosen"], found["loss per token"]
    assert any(".experts." in entry for entry in chosen["keep_16bit"])
    assert 0 < chosen["added_bytes"] <= 2 * (large - small)
    # 16 bits need not be better than 4 for a random model on random rows, but the chosen layers are those that help.
    assert losses["chosen"] < losses["4 bits"] and chosen["interval"][1] < 0
    run = ["--config", str(tmp_path / "costs/keep_16bit.yaml"), "--data.train", str(rows), "--output"]
    run += [str(tmp_path / "run"), "--train.steps", "8", "--train.micro_batch_size", "2", "--train.accumulation", "1"]
    run += ["--data.max_length", "128", "--lora.rank", "4", "--optim.learning_rate", "1e-2"]
    config = train.COMMAND.read(run)[0]
    # The settings that were written make the model whose loss was reported.
    args = dataclasses.replace(config.model, compute_dtype="float32")
    opened = open_base(args)
    scored = rows_task(str(rows), opened.tokenizer, max_rows=None, max_positions=256).rows
    base = partition(load_base(opened, args))
    assert score_rows(base, scored).mean_nll == pytest.approx(losses["chosen"], abs=1e-6)
    train.main(run)
    trained = _losses(tmp_path / "run")
    assert len(trained) == 8 and np.mean(trained[-3:]) < np.mean(trained[:3])


def _losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_one_layer_of_experts_is_in_memory_twice() -> None:
    config = NARROW | dict(model_type="qwen3_moe", num_experts=8, head_dim=16)
    parts = random_mixture(config, LoraArgs(target_modules=["q_proj"]))
    features = combine(parts).config
    stacks = combine(parts).model.layers.mlp.experts
    layer = max(getattr(stacks, part).weight.get_value()[0].nbytes for part in EXPERTS)
    del stacks

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    before, places = live(), []
    for place, _ in quantized_one_by_one(parts, WEIGHTS):
        assert live() - before < 2 * layer, place  # a stack has three layers
        places.append(place)
    assert places == [*full_names(features)]
