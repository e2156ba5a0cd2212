"""Losses of routers: transformers' values and gradients, for any micro-batches, packing and mesh; and their metrics."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.config.schema import RouterArgs
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import combine, place_parts
from qlora_jax.nn.router import SIGMOID, Routing
from qlora_jax.objectives.router_losses import (
    FILLED,
    RoutedOutputs,
    load_balancing_parts,
    routed,
    unrouted,
    z_parts,
)
from qlora_jax.objectives.sft import SUPERVISED
from qlora_jax.sharding import ROWS, make_mesh, named
from qlora_jax.training.metrics.step_metrics import router_metrics
from qlora_jax.training.step import gradients
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE, SLOW
from tests.models.mixtures import SIZES, arrays_of, random_mixture

ORACLE = Path(__file__).parents[1] / "oracle/router_losses.py"
CONFIG = SIZES | dict(model_type="mixtral", num_local_experts=5, num_hidden_layers=2, hidden_size=32, head_dim=8)
LORA = LoraArgs(rank=4, alpha=8.0, target_modules=["q_proj", "o_proj"], target_parameters=["mlp.gate"])
AUX, Z = 0.3, 0.02
ROUTER = RouterArgs(aux_loss_coef=AUX, z_loss_coef=Z)
DENSE = WeightFormat(quant_type=None, dtype="float32")
EXPERTS = model_config(CONFIG).experts
LENGTHS = np.array([16, 9, 12, 5])


def batch_of(shape: tuple[int, int], lengths: np.ndarray = LENGTHS) -> dict[str, jax.Array]:
    """Returns four rows of these lengths as micro-batches; the answers are about half of each row."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, CONFIG["vocab_size"], (4, 17), dtype=np.int32)
    position = np.arange(16)[None]
    real = position < lengths[:, None]
    weights = (real & (position >= lengths[:, None] // 2)).astype(np.float32)
    arrays = {"inputs": np.where(real, tokens[:, :-1], 0), "targets": np.where(real, tokens[:, 1:], 0)}
    arrays |= {"weights": weights, FILLED: lengths[:, None].astype(np.int32)}
    return {name: jnp.asarray(array.reshape(*shape, *array.shape[1:])) for name, array in arrays.items()}


def objective(router: RouterArgs = ROUTER):
    return routed(SUPERVISED, model_config(CONFIG), router)


def relative(found, expected) -> float:
    return float(np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max())


@pytest.mark.slow
def test_losses_and_gradients_are_those_of_transformers(oracle):
    parts, batch = random_mixture(CONFIG, LORA), batch_of((2, 2))
    arrays = arrays_of(parts, model_config(CONFIG))
    flat = {name: np.asarray(array).reshape(4, 16) for name, array in batch.items() if name != FILLED}
    labels = np.where(flat["weights"] > 0, flat["targets"], -100)
    mask = (np.arange(16)[None] < LENGTHS[:, None]).astype(np.int64)
    given = dict(tokens=flat["inputs"], mask=mask, labels=labels, config=CONFIG, aux_coef=AUX, z_coef=Z)
    expected = oracle(ORACLE, **given, **{f"model/{name}": array for name, array in arrays.items()})
    grads, loss = gradients(parts, batch, None, remat="names", objective=objective())
    metrics = router_metrics(loss.outputs, EXPERTS)
    assert metrics["router_aux_loss"] == pytest.approx(float(expected["balance"]), rel=1e-5)
    assert metrics["router_z_loss"] == pytest.approx(float(expected["z"]), rel=1e-5)
    whole = expected["nll"] + AUX * expected["balance"] + Z * expected["z"]
    assert float(loss.total / loss.count) == pytest.approx(float(whole), rel=1e-5)
    for name, leaves in grads.items():
        a, b = (np.asarray(parts.lora[name][leaf]) for leaf in ("lora_a", "lora_b"))
        theirs = [expected[f"gradient/{_theirs(name, layer)}.weight"] for layer in range(2)]
        for layer, dw_NK in enumerate(theirs):
            assert relative(leaves["lora_a"][layer], 2.0 * dw_NK.T @ b[layer].T) < 1e-4, name
            assert relative(leaves["lora_b"][layer], 2.0 * a[layer].T @ dw_NK.T) < 1e-4, name


def _theirs(name: str, layer: int) -> str:
    return model_config(CONFIG).hugging_face_name(name.replace(".layers.", f".layers.{layer}."))


@pytest.fixture(scope="module")
def one_batch():
    """The parts of a mixture, and the gradients and losses of its four rows in one micro-batch."""
    parts = random_mixture(CONFIG, LORA)
    return parts, *gradients(parts, batch_of((1, 4)), None, remat="names", objective=objective())


@pytest.mark.parametrize(
    "name",
    [pytest.param("micro-batches", marks=SLOW), *(pytest.param(each, marks=EXHAUSTIVE) for each in ("packed", "mesh"))],
)
def test_micro_batches_and_packing_and_a_mesh_change_rounding_alone(one_batch, name):
    parts, expected, loss = one_batch
    assert loss.outputs.routing.counts_BSE.shape == (1, 4, 2, 5)
    mesh, batch = None, batch_of((4, 1)) if name == "micro-batches" else _packed(batch_of((1, 4)))
    if name == "mesh":
        mesh = make_mesh(2, 1)
        batch = jax.device_put(batch_of((2, 2)), named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
        parts = place_parts(parts, mesh)
    grads, other = gradients(parts, batch, None, remat="names", objective=objective(), mesh=mesh)
    assert float(other.total / other.count) == pytest.approx(float(loss.total / loss.count), rel=1e-5)
    assert max(jax.tree.leaves(jax.tree.map(relative, grads, expected))) < 2e-5
    found, wanted = router_metrics(other.outputs, EXPERTS), router_metrics(loss.outputs, EXPERTS)
    assert found["router_max_load_by_layer"] == wanted["router_max_load_by_layer"]


def _packed(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Packs rows 0 and 3, and rows 1 and 2, into rows of 24 positions."""
    found = {name: np.zeros((1, 2, 24), np.asarray(array).dtype) for name, array in batch.items() if name != FILLED}
    found["segments"] = np.full((1, 2, 24), 2, np.int32)
    filled = np.zeros((1, 2), np.int32)
    for pack, rows in enumerate(((0, 3), (1, 2))):
        for segment, row in enumerate(rows):
            start, end = filled[0, pack], filled[0, pack] + LENGTHS[row]
            for name in ("inputs", "targets", "weights"):
                found[name][0, pack, start:end] = np.asarray(batch[name])[0, row, : LENGTHS[row]]
            found["segments"][0, pack, start:end] = segment
            filled[0, pack] = end
    return {name: jnp.asarray(array) for name, array in (found | {FILLED: filled[..., None]}).items()}


def test_closed_forms_of_even_and_collapsed_routing():
    """Two rows of 3 and 5 tokens, 2 layers, 4 experts, 1 per token."""
    tokens_B = np.array([3.0, 5.0], np.float32)

    def routing(shares_E: np.ndarray) -> Routing:
        of_rows = jnp.asarray(tokens_B[:, None, None] * np.tile(shares_E, (2, 1)), jnp.float32)
        z_BS = jnp.asarray(np.tile(4.0 * tokens_B[:, None], (1, 2)), jnp.float32)
        return Routing(counts_BSE=of_rows, probs_BSE=of_rows, z_BS=z_BS, tokens_B=jnp.asarray(tokens_B))

    even, collapsed = routing(np.full(4, 0.25)), routing(np.eye(4)[2])
    total = jnp.asarray(8.0)
    assert load_balancing_parts(even, total).sum() == pytest.approx(1.0)
    assert load_balancing_parts(collapsed, total).sum() == pytest.approx(4.0)
    assert z_parts(even, total).sum() == pytest.approx(4.0)
    assert EXPERTS is not None
    of_sigmoid = dataclasses.replace(EXPERTS, score=SIGMOID)
    for found, load, entropy, dead in ((even, 1.0, 1.0, 0.0), (collapsed, 4.0, 0.0, 6.0)):
        metrics = router_metrics(RoutedOutputs(outputs=jnp.zeros(2), routing=found), EXPERTS)
        assert (metrics["router_max_load"], metrics["router_dead_experts"]) == (load, dead)
        assert metrics["router_entropy"] == pytest.approx(entropy, abs=1e-12)
        assert metrics["router_aux_loss"] == pytest.approx(load) and metrics["router_z_loss"] == pytest.approx(4.0)
        assert "router_aux_loss" not in router_metrics(RoutedOutputs(outputs=jnp.zeros(2), routing=found), of_sigmoid)
        assert unrouted(RoutedOutputs(outputs=tokens_B, routing=found)) is tokens_B
    assert router_metrics(jnp.zeros(2), None) == {}


def test_losses_that_a_model_does_not_have_are_errors():
    dense = dataclasses.replace(model_config(CONFIG), experts=None)
    assert routed(SUPERVISED, dense, RouterArgs()) is SUPERVISED
    with pytest.raises(ValueError, match=r"router\.z_loss_coef: found 0\.1, but the model has no experts"):
        routed(SUPERVISED, dense, RouterArgs(z_loss_coef=0.1))
    experts = model_config(CONFIG).experts
    assert experts is not None
    sigmoid = dataclasses.replace(model_config(CONFIG), experts=dataclasses.replace(experts, score="sigmoid"))
    with pytest.raises(
        ValueError, match=r"router\.aux_loss_coef: found 0\.3, but the model's routers score experts by"
    ):
        routed(SUPERVISED, sigmoid, ROUTER)
    assert objective(RouterArgs()).is_coupled is False and objective().is_coupled is True


@pytest.mark.parametrize(
    ("lora", "learns"),
    [
        pytest.param(dict(target_modules=["q_proj"]), True, marks=EXHAUSTIVE),
        pytest.param(dict(target_modules=["layers.1.self_attn.o_proj"]), True, marks=EXHAUSTIVE),
        pytest.param(dict(target_modules=[], target_parameters=["mlp.gate"]), True, marks=EXHAUSTIVE),
        # Layer 0 is before layer 1.
        pytest.param(dict(target_modules=[], target_parameters=["mlp.experts.down_proj"]), True, marks=EXHAUSTIVE),
        pytest.param(dict(target_modules=[], target_parameters=["layers.1.mlp.experts.down_proj"]), False, marks=SLOW),
        pytest.param(
            dict(target_modules=["layers.0.self_attn.v_proj"], modules_to_save=["lm_head"]), True, marks=EXHAUSTIVE
        ),
    ],
)
def test_losses_without_a_gradient_are_errors(lora, learns):
    """The gradient itself says which parameters are before a router."""
    spec = LoraArgs(rank=2, **lora)

    def build():
        return StepSpec(model=model_config(CONFIG), weights=DENSE, lora=spec, batch=(1, 1, 8), router=ROUTER)

    parts = random_mixture(CONFIG, dataclasses.replace(spec, modules_to_save=[]))

    def balance(lora):
        ones = jnp.ones((1, 8), jnp.float32)
        _, routing = combine(parts.with_lora(lora)).hidden_with_routing(jnp.arange(8, dtype=jnp.int32)[None], ones)
        return jnp.sum(routing.z_BS)

    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(jax.jit(jax.grad(balance))(parts.lora))) == learns
    if learns:
        assert FILLED in build().batch_arrays()
        return
    with pytest.raises(ValueError, match=r"router\.aux_loss_coef, router\.z_loss_coef: no trained parameter is before"):
        build().gradients()
