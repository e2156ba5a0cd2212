"""Equal numbers of trainable parameters, and equal times."""

import dataclasses

import gguf
import jax
import pytest

from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs
from qlora_jax.io.pretrained import load_base, open_pretrained, weight_settings
from qlora_jax.methods.attach import attach_method
from qlora_jax.models.partition import partition
from qlora_jax.studies.comparison.budget import matching_rank, steps_within, trainable_parameters
from tests.e2e.project import write_model
from tests.io.tiny_models import random_weights, tiny_config, write_gguf

# Llama 7B: sums of (in + out) over a layer's projections, times layers.
PER_RANK = 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))


def config(**lora):
    method = lora.get("method", "lora")
    model = ModelArgs(path="llama-7b", quant_type="none" if method == "full" else "nf4")
    return Config(model=model, lora=LoraArgs(**lora), data=DataArgs(train="rows"), output="run")


def test_the_number_of_a_published_model():
    assert trainable_parameters(config(rank=64)) == 64 * PER_RANK == 159_907_840  # as the QLoRA paper's Guanaco 7B
    assert trainable_parameters(config(method="ia3")) == 32 * (2 * 4096 + 11008)
    assert trainable_parameters(config(method="full")) == 6_738_415_616


def test_the_number_does_not_depend_on_the_format_of_the_base(tmp_path):
    shape = tiny_config()
    path = str(write_gguf(tmp_path / "model.gguf", shape, random_weights(shape), gguf.GGMLQuantizationType.Q4_0))
    counts = [
        trainable_parameters(dataclasses.replace(config(rank=3), model=ModelArgs(path=path, quant_type=quant_type)))
        for quant_type in ("none", "nf4", "stored")
    ]
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.slow
@pytest.mark.exhaustive  # tests/training/cost compares the same formula with compiled steps
def test_the_number_is_that_of_the_adapters_in_memory(tmp_path):
    path = str(write_model(tmp_path / "model"))
    for lora in (LoraArgs(rank=3), LoraArgs(method="dora", rank=2, target_modules=["q_proj"]), LoraArgs(method="ia3")):
        opened = open_pretrained(model=path)
        model = load_base(opened, weight_settings(opened, "nf4", "float32"))
        attach_method(model, lora, jax.random.key(0))
        held = sum(leaf.size for leaf in jax.tree.leaves(partition(model).lora))
        plain = dataclasses.replace(config(), model=ModelArgs(path=path), lora=lora)
        assert trainable_parameters(plain) == held


@pytest.mark.parametrize("target", [PER_RANK, 7 * PER_RANK, 64 * PER_RANK, 64 * PER_RANK + PER_RANK // 3])
def test_the_rank_is_the_nearest(target):
    rank = matching_rank(config(), target, 0.01)
    others = [abs(each * PER_RANK - target) for each in range(1, 200)]
    assert abs(rank * PER_RANK - target) == min(others)


def test_a_number_that_no_rank_gives_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=f"rank 2 has {2 * PER_RANK:,}, rank 3 has {3 * PER_RANK:,}, further off"):
        matching_rank(config(), int(2.5 * PER_RANK), 0.1)
    assert matching_rank(config(), int(2.5 * PER_RANK), 0.25) in (2, 3)


def test_a_method_without_rank_has_to_match_by_itself():
    own = trainable_parameters(config(method="ia3"))
    assert matching_rank(config(method="ia3"), own + 5, 0.01) is None
    with pytest.raises(ValueError, match=f"this method has {own:,}, further off than budget.tolerance 0.01"):
        matching_rank(config(method="ia3"), 2 * own, 0.01)


def test_steps_within_a_time():
    assert steps_within(10, 3) == 3 and steps_within(3, 3) == 1
    with pytest.raises(ValueError, match=r"budget\.seconds: found 2, but one step takes 3 s"):
        steps_within(2, 3)
