"""The factor of the loss in float16, whose smallest numbers would swallow gradients; the rule is torch's GradScaler's.

Gradients are those of factor x loss, divided by the factor in f32. A step whose gradients overflow changes nothing but
the factor.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

GROWTH_INTERVAL = 2000  # steps
LOSS_SCALE, SKIPPED = "loss_scale", "skipped"  # keys of a step's record: its factor, and 1 if it changed nothing
LEAST = 1.0  # a gradient that overflows at this factor overflows because the run diverges


@dataclasses.dataclass(frozen=True)
class LossScale:
    """The state of the factor.

    Attributes:
      factor: of the next step's loss.
      finite_steps: steps since it last changed.
      skipped: steps whose gradients overflowed, of all steps so far.
    """

    factor: float = 65536.0
    finite_steps: int = 0
    skipped: int = 0

    def after(self, finite: bool) -> "LossScale":
        """Returns the state after a step: half the factor if gradients overflowed, twice after 2,000 that did not."""
        if not finite:
            return LossScale(self.factor / 2, 0, self.skipped + 1)
        if self.finite_steps + 1 == GROWTH_INTERVAL:
            return LossScale(self.factor * 2, 0, self.skipped)
        return dataclasses.replace(self, finite_steps=self.finite_steps + 1)


@jax.jit
def all_finite(grads: PyTree) -> Bool[Array, ""]:
    """Returns True if no gradient overflowed."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)]).all()
