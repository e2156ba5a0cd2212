"""One device's share of bytes on a mesh, and the bytes that devices exchange, by formula and as compiled."""

import math

import jax
import pytest
from jax.sharding import NamedSharding

from pallas_kernels import aot
from pallas_kernels.aot.collectives import read_collectives, totals
from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.sharding import absent_mesh, make_mesh
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.communication import exchanges, gathered_weights, layer_bytes
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import TO_READ
from tests.training.mesh_models import CUT_VOCABULARY, WHOLE_VOCABULARY, mesh_config
from tests.training.real_models import REAL_MODELS

MESHES = [(1, 8), (2, 4), (8, 1), (1, 3)]
needs_compiler = pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))


def own_bytes(tree) -> int:
    """One device's bytes of shapes with shardings."""
    leaves = jax.tree.leaves(tree)
    assert all(isinstance(leaf.sharding, NamedSharding) for leaf in leaves)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def check_shares(config: StepSpec) -> None:
    step, counted = config, config.sizes
    assert sum(memory_use.frozen_bytes(counted).values()) == own_bytes(step.arrays.parts.base)
    assert memory_use.lora_bytes(counted) == own_bytes(step.arrays.parts.lora)
    assert memory_use.optimizer_bytes(counted) == own_bytes(step.arrays.state)
    assert memory_use.batch_bytes(counted) == own_bytes(step.batch_arrays())


def real_step(name: str, sizes, *, optim: str = "adamw_32bit", rank: int = 16, **changes) -> StepSpec:
    mesh = absent_mesh(*sizes)
    settings = dict(weights=WeightFormat(platform="gpu"), lora=LoraArgs(rank=rank), optim=OptimArgs(name=optim))
    settings |= dict(batch=(2, 24, 128), remat="full", mesh=mesh) | changes
    return StepSpec(model=REAL_MODELS[name], **settings)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3-8b"])
def test_formulas_give_one_devices_parts_of_the_real_leaves(name, sizes):
    check_shares(real_step(name, sizes))


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": "adamw_8bit", "rank": 4},
        {"optim": "lion_8bit"},
        {"new_ids": (7, 9)},
        {"packed": True},
        {"weights": WeightFormat(platform="cpu")},
        {"weights": WeightFormat(platform="gpu", double_quant=False)},
        {"weights": WeightFormat(platform="gpu", dense=(("mlp.up_proj", (0, 3)),))},
    ],
    ids=[
        "8-bit AdamW",
        "8-bit Lion",
        "new tokens",
        "packed rows",
        "a CPU's layout",
        "f32 constants",
        "some layers dense",
    ],
)
def test_formulas_give_one_devices_parts_with_other_settings(changes):
    check_shares(real_step("smollm2-135m", (1, 4), **changes))


def test_a_device_has_an_eighth_of_what_is_cut():
    whole, eighth = (real_step("llama-3-8b", (1, n)).sizes for n in (1, 8))
    share = memory_use.frozen_bytes(whole)["codes"] / memory_use.frozen_bytes(eighth)["codes"]
    assert share == 8 and memory_use.frozen_bytes(eighth)["vectors"] == memory_use.frozen_bytes(whole)["vectors"]
    assert not exchanges(whole)


def test_layers_before_the_first_adapter_are_gathered_once():
    lora = LoraArgs(rank=16, layers_to_transform="28-29")
    every, last = (real_step("smollm2-135m", (1, 3), **changes).sizes for changes in ({}, {"lora": lora}))
    weights, less = (exchanges(step)["weights"].nbytes for step in (every, last))
    assert every.model.num_layers == 30 and less * 2 * 30 == weights * (30 + 2)


def test_a_layers_bytes_do_not_depend_on_the_number_of_layers_with_adapters():
    lora = LoraArgs(rank=16, layers_to_transform="29")
    every, last = (real_step("smollm2-135m", (1, 3), **changes).sizes for changes in ({}, {"lora": lora}))
    assert layer_bytes(last) == layer_bytes(every) > sum(leaf.nbytes for leaf in gathered_weights(every)) // 30


def tiny(vocabulary: int, sizes, **changes) -> StepSpec:
    settings = dict(weights=WeightFormat(dtype="float32"), lora=LoraArgs(rank=16), optim=OptimArgs(), remat="names")
    settings |= dict(model=model_config(mesh_config(vocabulary)), batch=(2, 8, 64), mesh=make_mesh(*sizes))
    return StepSpec(**settings | changes)


def compiled_text(step: StepSpec) -> str:
    program = step.gradients()
    return program.function.lower(*program.args, **program.kwargs).compile(TO_READ).as_text()


def check_exchanges(config: StepSpec, text: str) -> None:
    """The formula's bytes are those of the compiled program, but for sums of few numbers.

    XLA may gather adapters in the dtype of their products, so f32 adapters may cross as bf16.
    """
    found, said = totals(read_collectives(text)), exchanges(config.sizes)
    assert not [one for one in read_collectives(text) if one.rematerialized]
    counted = config.sizes
    packed = sum(leaf.nbytes for leaf in gathered_weights(counted) if leaf.itemsize == 1)
    layers = counted.model.num_layers
    gathered = packed * (layers + counted.backward_layers) // layers  # forward, and again by the backward pass
    assert found["all-gather", "u8"].nbytes == counted.batch[0] * gathered  # and no other unsigned bytes
    for operation in ("all-gather", "reduce-scatter", "all-reduce"):
        compiled = sum(total.received for (name, _), total in found.items() if name == operation)
        formula = sum(one.received for one in said.values() if one.operation == operation)
        few = 16 * counted.batch[0] * counted.rows * config.devices  # numbers per token, 4 bytes each
        in_bf16 = said["adapters"].received // 2 if operation == "all-gather" and counted.itemsize == 2 else 0
        assert formula - in_bf16 <= compiled <= formula + few, (operation, formula, compiled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vocabulary", "sizes"),
    [
        (CUT_VOCABULARY, (2, 4)),
        pytest.param(CUT_VOCABULARY, (1, 8), marks=EXHAUSTIVE),
        pytest.param(WHOLE_VOCABULARY, (1, 8), marks=EXHAUSTIVE),
        pytest.param(WHOLE_VOCABULARY, (8, 1), marks=EXHAUSTIVE),
    ],
)
def test_the_compiled_step_exchanges_what_the_formula_says(vocabulary, sizes):
    config = tiny(vocabulary, sizes)
    text = compiled_text(config)
    if sizes[1] > 1:
        check_exchanges(config, text)
    else:
        assert {kind for kind, _ in totals(read_collectives(text))} <= {"all-reduce", "all-gather"}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_compiled_step_gathers_layers_before_the_first_adapter_once():
    model, lora = mesh_config(CUT_VOCABULARY, num_hidden_layers=4), LoraArgs(rank=16, layers_to_transform="2-3")
    config = tiny(CUT_VOCABULARY, (1, 8), model=model_config(model), lora=lora)
    check_exchanges(config, compiled_text(config))
