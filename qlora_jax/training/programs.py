"""The compiled programs of a run, one for each shape of batch."""

from typing import Any

import jax
import numpy as np

from qlora_jax import runtime
from qlora_jax.models.partition import Lora
from qlora_jax.training.session import Session
from qlora_jax.training.step import StepLoss, gradients


class Gradients:
    """`training.step.gradients` for one session, compiled when a shape of batch is first seen.

    The compiler's memory is given back before the program runs for the first time, so that the two never add up.
    """

    def __init__(self, session: Session):
        self._session = session
        self._compiled: dict[tuple[int, ...], Any] = {}

    def __len__(self) -> int:
        """How many programs were compiled."""
        return len(self._compiled)

    def __call__(self, lora: Lora, batch: dict[str, np.ndarray], key: jax.Array | None) -> tuple[Lora, StepLoss]:
        """(gradients, losses) of a step's batch."""
        session, shape = self._session, batch["inputs"].shape
        if shape not in self._compiled:
            remat = session.config.train.remat
            lowered = gradients.lower(session.graphdef, lora, session.base, batch, key, remat=remat)
            self._compiled[shape] = lowered.compile()
            runtime.give_memory_back()
        return self._compiled[shape](lora, session.base, batch, key)
