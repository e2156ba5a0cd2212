"""Steps to plan, and a compiler of which the tests know the answers."""

import dataclasses

from qlora_jax.config import LoraArgs, OptimArgs
from qlora_jax.models.catalog import PUBLISHED
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.partition import host_paths
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.memory_use import activation_bytes, offloaded_activation_bytes
from qlora_jax.training.plan.step_memory import Temporaries, compiled_requirements
from qlora_jax.training.step_spec import StepSpec
from tests.io.tiny_models import tiny_config

GIB = 2**30
TINY = StepSpec(
    model=model_config(tiny_config(num_hidden_layers=6, max_position_embeddings=1024)),
    weights=WeightFormat(dtype="float32"),
    lora=LoraArgs(rank=4),
    optim=OptimArgs(),
    batch=(2, 4, 512),
    remat="names",
)


def real(name: str, batch: tuple[int, int, int], rank: int = 64, **changes) -> StepSpec:
    """A published model's step on a card."""
    setting = StepSpec(
        model=model_config(PUBLISHED[name]),
        weights=WeightFormat(platform="gpu"),
        lora=LoraArgs(rank=rank),
        optim=OptimArgs(),
        batch=batch,
        remat="full",
    )
    return dataclasses.replace(setting, **changes)


class Compiler:
    """Pretends to compile: saved activations plus scratch that is linear in the tokens; records its calls.

    Args:
      config: the planned step.
      extra: bytes that the policy `full` takes in addition.
    """

    def __init__(self, config: StepSpec = TINY, extra: int = 0):
        self.asked, self._config, self._extra = [], config, extra

    def __call__(self, step: StepSpec) -> Temporaries:
        accumulated, rows, length = step.batch
        self.asked.append(((accumulated, rows, length), step.remat))
        weights = dataclasses.replace(self._config.weights, experts_on_host=bool(host_paths(step.arrays.parts)))
        config = self._config.replace(batch=(accumulated, rows, length), remat=step.remat, weights=weights)
        shape = config.sizes
        saved = sum(activation_bytes(shape).values())
        surprise = self._extra if step.remat == "full" else 0
        return Temporaries(
            gradients=saved + 1_000_000 + 4_000 * rows * length + surprise,
            update=0,
            host=sum(offloaded_activation_bytes(shape).values()),
            host_arguments=sum(memory_use.offloaded_expert_bytes(shape).values()),
        )


def total(setting: StepSpec) -> int:
    """The bytes of a step of TINY's model that `Compiler` compiles."""
    return compiled_requirements(setting, Compiler()).total
