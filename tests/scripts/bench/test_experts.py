"""The benchmark of experts: both models have the same active parameters, and their steps take turns."""

import types
from typing import Any

import pytest

from pallas_kernels.aot.memory import read_memory
from pallas_kernels.nf4_matmul.costs import dequantized_bytes
from qlora_jax.config import LoraArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.training.cost.memory_use import activation_bytes
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.step_spec import StepSpec
from scripts.bench import experts as bench
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import TO_READ


def test_both_models_have_the_same_active_parameters_but_for_the_routers():
    models = bench.configs(experts=8, per_token=2, layers=3)
    routers = 3 * 8 * bench.WIDTHS["hidden_size"]
    assert models["mixture"].active_parameters() == models["dense"].parameters() + routers


def test_steps_take_turns_and_the_speed_is_that_of_pairs():
    order = []

    class Model:
        memory = types.SimpleNamespace(arguments=2**20, temporaries=2**21)

        def __init__(self, name, seconds):
            self.name, self.step, self.seconds = name, seconds, []

        def run(self, batch):
            order.append((batch, self.name))
            self.seconds.append(self.step if batch else 100.0)  # the first is slow

    models: Any = {"mixture": Model("mixture", 4.0), "dense": Model("dense", 3.0)}
    batches: Any = [0, 1, 2]
    found = bench.measure(models, batches)
    assert [name for _, name in order] == ["dense", "mixture", "mixture", "dense", "dense", "mixture"]
    assert found["speed"] == 0.75 and found["interval"] == (0.75, 0.75)
    assert found["dense"] == {"step_s": 3.0, "arguments_mib": pytest.approx(1), "temporaries_mib": pytest.approx(2)}


@pytest.mark.parametrize("layers", [pytest.param(layers, marks=EXHAUSTIVE) for layers in (2, 30)])
def test_a_mixture_takes_the_temporaries_of_the_dense_model_and_one_expert(layers):
    """Besides: the logits of its routers, and tiles that are not full in the gradients of one layer."""
    batch, lora, weights = (1, 4, 512), LoraArgs(rank=16, target_modules=bench.ATTENTION), WeightFormat()
    shapes, temporaries = {}, {}
    for name, model in bench.configs(experts=8, per_token=2, layers=layers).items():
        program = StepSpec(model=model, weights=weights, lora=lora, batch=batch, remat="names").gradients()
        compiled = program.function.lower(*program.args, **program.kwargs).compile(TO_READ)
        temporaries[name] = read_memory(compiled.memory_analysis()).device.temporaries
        shapes[name] = StepShape(model=model, weights=weights, lora=lora, batch=batch, remat="names")
    saved = {name: activation_bytes(shape) for name, shape in shapes.items()}
    logits = saved["mixture"]["router_logits and shared_expert_out"]
    assert sum(saved["mixture"].values()) == sum(saved["dense"].values()) + logits
    padding = shapes["mixture"].slots - shapes["mixture"].pairs
    of_tiles = 3 * padding * bench.MLP * shapes["mixture"].itemsize
    expert = dequantized_bytes((bench.MLP, bench.WIDTHS["hidden_size"]))
    assert temporaries["mixture"] <= temporaries["dense"] + logits + of_tiles + expert
