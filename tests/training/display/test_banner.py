"""The start banner names the implementations that multiply with the frozen weights."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Capabilities, Choice, Implementation
from pallas_kernels.native.library import variant
from pallas_kernels.nf4_matmul import api, reference
from qlora_jax.config import Config, DataArgs, LoraArgs, ModelArgs, OptimArgs
from qlora_jax.config.schema import RouterArgs
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_sharding
from qlora_jax.nn.variables import Frozen
from qlora_jax.training.display.banner import (
    _host_experts,
    _matmuls,
    _router_losses,
    _shown_name,
    _trained,
    rate_rows,
    short_run_warning,
    warm_up_text,
)
from tests.pallas_kernels.nf4_matmul.contract import weight
from tests.training.mesh_models import WHOLE_VOCABULARY, mesh_config, mesh_parts


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(warmup_ratio=0.0), None),
        (dict(warmup_ratio=0.1), "10 of 100 steps; the first has learning rate 0 and changes nothing"),
        (dict(warmup_ratio=0.1, warmup_start="first"), "10 of 100 steps; the first has learning rate 2e-05"),
    ],
)
def test_the_first_step_of_a_warm_up_is_described(settings, text):
    found = warm_up_text(OptimArgs(**settings), 100)
    assert found is None if text is None else found.startswith(text)


@pytest.mark.parametrize(
    ("settings", "steps", "start"),
    [
        (dict(), 1, "the only step will change nothing"),
        (dict(), 2, "step 1 of 2 will change nothing"),
        (dict(warmup_ratio=1.0), 10, "step 1 of 10 will change nothing"),
        (dict(), 11, None),
        (dict(warmup_start="first"), 2, None),
        (dict(warmup_ratio=0.0), 2, None),
    ],
)
def test_a_short_run_whose_first_step_changes_nothing_begins_with_a_warning(settings, steps, start):
    found = short_run_warning(OptimArgs(**settings), steps)
    assert found is None if start is None else found.startswith(start) and "--optim.warmup_start first" in found


def rate_note(objective: str, **optim) -> str | None:
    config = Config(
        model=ModelArgs(path="m"),
        data=DataArgs(train="t"),
        output="o",
        objective=objective,
        optim=OptimArgs(**optim),
    )
    return rate_rows(config, 100).get("learning rate")


@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "cpo", "simpo"])
def test_the_default_learning_rate_is_high_for_preferences(objective):
    assert rate_note(objective) == (
        f"0.0002 is the default of optim.learning_rate, which is high for objective {objective}: usual values are 1e-6 "
        "to 1e-5 (TRL's default is 1e-6)"
    )
    assert rate_note(objective, learning_rate=5e-6) is None


@pytest.mark.parametrize("objective", ["sft", "reward", "classification"])
def test_other_objectives_have_the_default_learning_rate_without_a_note(objective):
    assert rate_note(objective) is None


def session_of(*weights):
    run = SimpleNamespace(
        config=SimpleNamespace(train=SimpleNamespace(micro_batch_size=2)),
        inputs=SimpleNamespace(lengths=(16, 64)),
        step=SimpleNamespace(weights=SimpleNamespace(dtype="bfloat16")),
        mesh=None,
    )
    return SimpleNamespace(run=run, parts=SimpleNamespace(base={str(i): w for i, w in enumerate(weights)}))


def test_the_implementation_and_why_not_the_one_that_the_device_would_rather_run(monkeypatch):
    few = Implementation(reference.forward, reference.backward, Capabilities(rows=(1, 64)))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "few", few)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("few", "reference"))
    products = _matmuls.__wrapped__(session_of(weight((64, 128)), weight((96, 192)), jnp.ones(3)))
    assert products == "reference; not few: takes 1 to 64 rows, not 128"
    assert _matmuls.__wrapped__(session_of(jnp.ones((4, 4)))) == "XLA, dense weights"


def test_the_loops_are_shown_with_their_instruction_set():
    assert [_shown_name(Choice(name, {})) for name in ("cpu", "tiles", "hopper")] == [
        f"C++ ({variant()})",
        "XLA, tiled",
        "hopper",
    ]


def test_experts_are_multiplied_in_tiles():
    session = session_of(weight((64, 128)))
    session.run.inputs.model = SimpleNamespace(experts=SimpleNamespace(per_token=2, count=4))
    session.parts.base["experts"] = jax.tree.map(lambda leaf: leaf[None, None], weight((64, 128)))
    products = _matmuls.__wrapped__(session)
    assert products.startswith("reference") and products.endswith("; experts: loop, 16 rows per tile")


def test_experts_in_host_memory_and_losses_of_routers_have_rows():
    base = nnx.State({str(i): Frozen(jax.device_put(jnp.ones((3, 2**i, 64)), host_sharding())) for i in (3, 4)})
    here = nnx.State({"norm": Frozen(jnp.ones(7))})
    (text,) = _host_experts.__wrapped__(
        SimpleNamespace(parts=SimpleNamespace(base=nnx.merge_state(base, here)))
    ).values()
    assert text == "in host memory, 18.00 KiB; the device holds two layers of them"
    assert not _host_experts.__wrapped__(SimpleNamespace(parts=SimpleNamespace(base=here)))
    assert _router_losses(RouterArgs(aux_loss_coef=0.01, z_loss_coef=1e-3)) == {
        "router losses": "0.01 x load balancing, 0.001 x z-loss"
    }
    assert not _router_losses(RouterArgs())


def test_the_fixed_matrices_of_lora_fa_are_not_counted_as_trained():
    whole, lora = mesh_config(WHOLE_VOCABULARY), LoraArgs(method="lora_fa", rank=16, target_modules=["down_proj"])
    model, parts = model_config(whole), mesh_parts(whole, lora=lora)
    config = Config(model=ModelArgs(path="base"), data=DataArgs(train="rows"), lora=lora, output="run")
    text = _trained.__wrapped__(
        SimpleNamespace(parts=parts, run=SimpleNamespace(config=config, inputs=SimpleNamespace(model=model)))
    )
    b = model.num_layers * 16 * model.embed_dim
    assert text.startswith(f"{b:,} LoRA-FA parameters, {b / (b + model.parameters()):.2%} of all, 0 MB in float32")


def test_a_head_is_not_counted_as_a_projection():
    lora = {name: {"a": jnp.ones(2)} for name in ("model.layers.mlp.down_proj", "score")}
    config = Config(model=ModelArgs(path="base"), data=DataArgs(train="rows"), lora=LoraArgs(rank=8), output="run")
    parts = SimpleNamespace(lora=lora, trained=lora)
    model = SimpleNamespace(parameters=lambda: 96)
    text = _trained.__wrapped__(
        SimpleNamespace(parts=parts, run=SimpleNamespace(config=config, inputs=SimpleNamespace(model=model)))
    )
    assert text == "4 LoRA parameters, 4.00% of all, 0 MB in float32; rank 8 on 1 projections, and a head"
