"""Steps of published models take the attention kernels of NVIDIA cards; no card is needed."""

import re

import pytest

from pallas_kernels import aot
from pallas_kernels.attention import api, gpu
from pallas_kernels.devices import Device
from qlora_jax.config import LoraArgs
from qlora_jax.models import catalog
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_only
from qlora_jax.training.step_spec import StepSpec
from tests.marks import EXHAUSTIVE
from tests.training.compiled_text import computed, operations, shape_of
from tests.training.real_models import REAL_MODELS

A100 = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0))
KERNELS = {"attention_forward", "attention_dq"}
# By wgmma, 8 bytes outside of the loop (tests/pallas_kernels/aot/test_mosaic_attention.py).
SPILLED = {card: {"attention_dk_dv_mosaic_gpu_kernel"} for card in ("h100", "h200")}
TILED_GIB = 11.751  # the plan with attention in tiles of XLA


def spec(model, batch=(1, 1, 256), **how):
    return StepSpec(model=model, weights=WeightFormat(platform="gpu"), lora=LoraArgs(rank=4), batch=batch, **how)


# Sinks, windows and experts; wide heads; head dims 96 and 80; soft caps and branches.
FAMILIES = [
    ("gpt-oss-20b", {"packed": True}),
    ("gemma-3-1b", {"packed": True}),
    ("phi-3-mini", {"packed": True}),
    ("pythia-2.8b", {}),
    ("gemma-2-2b", {"packed": True, "branching": True}),
]


@pytest.mark.parametrize(("name", "how"), FAMILIES)
def test_every_feature_of_a_family_takes_the_kernels(monkeypatch, name, how):
    for module in (api, gpu):
        monkeypatch.setattr(module, "target_device", lambda: A100)
    function, args, kwargs = spec(text_only(model_config(catalog.PUBLISHED[name])), **how).gradients()
    found = set(re.findall(r"name=(attention_\w+)", str(function.trace(*args, **kwargs).jaxpr)))
    assert found >= KERNELS


@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
@pytest.mark.parametrize(
    ("card", "name", "most_operations", "most_gib"),
    [
        pytest.param("h100", "llama-3-8b", 4_000, TILED_GIB, marks=EXHAUSTIVE),
        pytest.param("rtx4090", "llama-3-8b", 4_100, TILED_GIB, marks=EXHAUSTIVE),
        pytest.param("h200", "llama-65b", 10_200, 66, marks=EXHAUSTIVE),
    ],
)
def test_a_step_makes_no_square_and_launches_little(card, name, most_operations, most_gib):
    length = 2048
    step = spec(REAL_MODELS[name], (1, 1, length)).replace(lora=LoraArgs(rank=16))
    function, args, kwargs = step.gradients()
    compiled = aot.compile_for(card, function, *args, **kwargs)
    names = {kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in compiled.kernels}
    assert names >= KERNELS | {"attention_dk_dv"}
    assert set(compiled.spilled) <= SPILLED.get(card, set())
    assert not [kind for kind in computed(compiled.text) if shape_of(kind).count(length) > 1]
    assert operations(compiled.text) <= most_operations
    assert compiled.memory.device_total <= most_gib * 2**30


def loops(jaxpr, length):
    """Yields the loops of so many steps in a program, as text."""
    for equation in jaxpr.eqns:
        values = [one for value in equation.params.values() for one in (value if isinstance(value, tuple) else [value])]
        for inner in (getattr(value, "jaxpr", value) for value in values):
            if hasattr(inner, "eqns"):
                is_one = equation.primitive.name == "scan" and equation.params["length"] == length
                yield from [str(inner)] if is_one else loops(inner, length)


@pytest.mark.parametrize(("name", "once"), [("llama-3-8b", True), ("gemma-3-1b", False)])
def test_bounds_are_computed_once_per_step_if_layers_have_equal_windows(monkeypatch, name, once):
    for module in (api, gpu):
        monkeypatch.setattr(module, "target_device", lambda: A100)
    config = REAL_MODELS[name] if name in REAL_MODELS else text_only(model_config(catalog.PUBLISHED[name]))
    function, args, kwargs = spec(config, (1, 1, 640)).gradients()  # beyond Gemma 3's window
    texts = list(loops(function.trace(*args, **kwargs).jaxpr.jaxpr, config.num_layers))
    assert ["name=attention_dq" in text for text in texts] == [False, True]  # forward and backward
    assert ("reduce_min" not in "".join(texts)) == once  # the first key that a block of queries sees


@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
@pytest.mark.parametrize(
    ("card", "length", "most_gib"),
    [pytest.param(*case, marks=EXHAUSTIVE) for case in (("rtx4090", 180_224, 20), ("h100", 819_200, 72))],
)
def test_the_longest_rows_fit(card, length, most_gib):
    """The layers' inputs are in host memory: 256 KiB per token of 32 layers of 4,096 numbers of 16 bits."""
    step = spec(model_config(catalog.PUBLISHED["llama-3.1-8b"]), (1, 1, length), remat="offload")
    function, args, kwargs = step.replace(lora=LoraArgs(rank=16)).gradients()
    memory = aot.compile_for(card, function, *args, **kwargs).memory
    assert memory.device_total < most_gib * 2**30
    assert memory.host.temporaries == length * 256 * 2**10
