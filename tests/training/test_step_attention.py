"""Steps of published models take the attention kernels of NVIDIA cards; no card is needed."""

import re

import pytest

from pallas_kernels import aot
from pallas_kernels.attention import api, mma
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
TILED = 11.751 * 2**30  # bytes of the plan with attention in tiles of XLA


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
    for module in (api, mma):
        monkeypatch.setattr(module, "target_device", lambda: A100)
    function, args, kwargs = spec(text_only(model_config(catalog.PUBLISHED[name])), **how).gradients()
    found = set(re.findall(r"name=(attention_\w+)", str(function.trace(*args, **kwargs).jaxpr)))
    assert found >= KERNELS


@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
@pytest.mark.parametrize("card", [pytest.param(card, marks=EXHAUSTIVE) for card in ("h100", "rtx4090")])
def test_a_step_of_8b_makes_no_square_and_launches_little(card):
    length = 2048
    step = spec(REAL_MODELS["llama-3-8b"], (1, 1, length)).replace(lora=LoraArgs(rank=16))
    function, args, kwargs = step.gradients()
    compiled = aot.compile_for(card, function, *args, **kwargs)
    names = {kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in compiled.kernels}
    assert names >= KERNELS | {"attention_dk_dv"} and not compiled.spilled
    assert not [kind for kind in computed(compiled.text) if shape_of(kind).count(length) > 1]
    assert operations(compiled.text) <= 10_000
    assert compiled.memory.device_total <= TILED


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
