"""LoRA-FA: updates of B against peft's optimizer, in pages and on a mesh, and what a step leaves out."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.methods.method import method_of
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import lora_specs, place_parts, split_leaves
from qlora_jax.sharding import ROWS, make_mesh, named, place
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.cost.memory_use import activation_bytes
from qlora_jax.training.cost.step_shape import StepShape
from qlora_jax.training.optimizer_state import CorrectedStateManager, make_state_manager
from qlora_jax.training.step import gradients
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_batch, mesh_config, mesh_parts
from tests.training.test_step import relative

ORACLE = Path(__file__).parent.parent / "oracle/lorafa.py"
CONFIG = mesh_config(WHOLE_VOCABULARY)
FA = LoraArgs(method="lora_fa", rank=16, alpha=24.0, target_modules=["q_proj", "down_proj"])
SHAPE = (1, 4, 32)
# PEFT adds eps to sqrt(v), optax to sqrt(v / (1 - beta2^t)): a smaller eps makes them equal.
OPTIM = OptimArgs(learning_rate=1e-2, eps=1e-20, warmup_ratio=0.0, max_grad_norm=0.0)


def compiled(lora: LoraArgs = FA, mesh=None) -> CompiledGradients:
    """The gradients of a run's shapes, not compiled yet."""
    weights = WeightFormat(dtype="float32")
    return CompiledGradients(StepSpec(model=model_config(CONFIG), weights=weights, lora=lora, batch=SHAPE, mesh=mesh))


def manager_of(args: OptimArgs, mesh=None) -> CorrectedStateManager:
    of_run, correction = compiled(mesh=mesh), method_of("lora_fa").correction(model_config(CONFIG), FA)
    assert correction is not None
    return CorrectedStateManager(make_state_manager(args, 10, of_run, None), correction, of_run)


def grads_of(step: int, lora: dict, mesh=None) -> dict:
    """Random gradients of the trained leaves, on a mesh as a step leaves them."""
    rng = np.random.default_rng(step)
    trained, _ = split_leaves(lora, ("lora_a",))
    made = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 10.0 ** -(step % 4), leaf.shape), leaf.dtype), trained)
    return made if mesh is None else place(made, lora_specs(made, mesh), mesh)


def go(args: OptimArgs, steps: int = 6, mesh=None, room: int = 0) -> list[dict]:
    """LoRA parameters after every step."""
    parts = mesh_parts(CONFIG, lora=FA)
    lora = parts.lora if mesh is None else place_parts(parts, mesh).lora
    manager = manager_of(args, mesh)
    state, after = manager.init(lora), []
    for step in range(steps):
        grads = grads_of(step, parts.lora, mesh)
        lora, state, norm, _ = manager.update(lora, state, grads, room)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(grads))  # not held next to the corrected ones
        exact = np.sqrt(
            sum(np.sum(np.square(leaf, dtype="f8")) for leaf in jax.tree.leaves(grads_of(step, parts.lora)))
        )
        assert float(norm) == pytest.approx(exact, rel=1e-6)
        after.append(jax.tree.map(np.array, lora))
    return after


def _by_peft_names(tree: dict) -> dict[str, np.ndarray]:
    """Returns {"q_proj0.lora_A": [R, K]}: layers of a stack as modules."""
    return {
        f"{name.rpartition('.')[2]}{layer}.{leaf[:-1]}{leaf[-1].upper()}": np.ascontiguousarray(values.T)
        for name, leaves in tree.items()
        for leaf, stack in leaves.items()
        for layer, values in enumerate(np.asarray(stack))
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("max_grad_norm", "in_f32", "off", "tolerance"),
    [
        # Sums over the rank cancel in some elements; Adam divides what is left by itself.
        pytest.param(0.0, True, np.max, 1e-3, marks=EXHAUSTIVE),
        (0.3, True, np.max, 1e-3),
        # With products in bf16, PEFT moves such elements the other way.
        pytest.param(0.0, False, np.mean, 2e-2, marks=EXHAUSTIVE),
    ],
)
def test_updates_equal_those_of_peft(oracle, max_grad_norm, in_f32, off, tolerance):
    """Parameters after each step, in learning rates."""
    args, steps = dataclasses.replace(OPTIM, max_grad_norm=max_grad_norm), 6
    start = mesh_parts(CONFIG, lora=FA).lora
    sent = {f"{name}_start": values for name, values in _by_peft_names(start).items()}
    each = [_by_peft_names(grads_of(step, start)) for step in range(steps)]
    sent |= {f"{name}_gradients": np.stack([grads[name] for grads in each]) for name in each[0]}
    settings = dataclasses.asdict(args) | {"steps": steps, "rank": 16, "alpha": 24, "use_rslora": False}
    names = list(_by_peft_names(start))
    found = oracle(ORACLE, settings=settings, names=names, in_f32=in_f32, **sent)
    assert len(found) == len(names) / 2
    for step, lora in enumerate(go(args, steps)):
        ours = _by_peft_names(lora)
        for name, theirs in found.items():
            distance = off(np.abs(ours[name] - theirs[step])) / args.learning_rate
            assert distance < tolerance, (name, step, distance)
        for name in ours.keys() - found.keys():
            np.testing.assert_array_equal(ours[name], sent[f"{name}_start"])


@pytest.mark.parametrize("name", ["adamw_32bit", pytest.param("lion_8bit", marks=pytest.mark.slow)])
def test_pages_change_no_bit(name):
    args = dataclasses.replace(OPTIM, name=name, max_grad_norm=0.3)
    paged = dataclasses.replace(args, paging="on", paging_budget="64KiB")
    for plain, in_pages in zip(go(args, 3), go(paged, 3, room=1 << 16), strict=True):
        jax.tree.map(np.testing.assert_array_equal, plain, in_pages)


@pytest.mark.slow
def test_a_mesh_changes_parameters_by_rounding_alone():
    """B is cut along its rank, over which the correction sums."""
    for plain, on_mesh in zip(go(OPTIM, 3), go(OPTIM, 3, mesh=make_mesh(1, 4)), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * OPTIM.learning_rate), plain, on_mesh)


@pytest.mark.slow
def test_gradients_of_b_are_those_of_lora_and_a_has_none():
    batch = mesh_batch(CONFIG, SHAPE)
    fixed, plain = (mesh_parts(CONFIG, lora=dataclasses.replace(FA, method=m)) for m in ("lora_fa", "lora"))
    grads, loss = gradients(fixed, batch, None, remat="names")
    expected, expected_loss = gradients(plain.with_lora(fixed.lora), batch, None, remat="names")
    assert float(loss.total) == float(expected_loss.total)
    assert {leaf for leaves in grads.values() for leaf in leaves} == {"lora_b"}
    for name, leaves in grads.items():
        scale = np.abs(expected[name]["lora_b"]).max()
        np.testing.assert_allclose(leaves["lora_b"], expected[name]["lora_b"], atol=1e-6 * scale)


@pytest.mark.slow
def test_gradients_on_a_mesh_equal_one_device():
    parts, batch, mesh = mesh_parts(CONFIG, lora=FA), mesh_batch(CONFIG, SHAPE), make_mesh(2, 2)
    expected, _ = gradients(parts, batch, None, remat="names")
    spread = jax.device_put(batch, named(mesh, jax.sharding.PartitionSpec(None, ROWS)))
    found, _ = gradients(place_parts(parts, mesh), spread, None, remat="names", mesh=mesh)
    assert max(jax.tree.leaves(jax.tree.map(relative, found, expected))) < 2e-6


@pytest.mark.slow
def test_the_state_and_the_saved_activations_are_those_of_b():
    state = jax.eval_shape(manager_of(OPTIM).init, mesh_parts(CONFIG, lora=FA).lora)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert moments and all(shape[1] == FA.rank for shape in moments)

    def saved(method: str) -> tuple[int, int]:
        """Bytes of (temporaries of the compiled step, saved activations by formula), without recomputation."""
        lora = dataclasses.replace(FA, method=method)
        weights, shape = WeightFormat(dtype="float32"), (1, 4, 128)
        step = StepSpec(model=model_config(CONFIG), weights=weights, lora=lora, batch=shape, remat="none")
        program = step.gradients()
        memory = program.function.lower(*program.args, **program.kwargs).compile().memory_analysis()
        assert memory is not None
        counted = StepShape(model=model_config(CONFIG), weights=weights, lora=lora, batch=shape, remat="none")
        return memory.temp_size_in_bytes, sum(activation_bytes(counted).values())

    (measured, counted), (measured_lora, counted_lora) = saved("lora_fa"), saved("lora")
    assert counted_lora - counted > 0.1 * counted_lora
    assert measured_lora - measured > 0.8 * (counted_lora - counted)
