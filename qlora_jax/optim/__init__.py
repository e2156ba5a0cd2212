"""Optimizers: schedules, the optax chain of a run, 8-bit state, and the pager. Works on pytrees, not on models.

The public optax transformations are `qlora_jax.paged`, `qlora_jax.adamw_8bit` and `qlora_jax.lion_8bit`.
"""

from qlora_jax.optim.optax_chain import make_elementwise as make_elementwise
from qlora_jax.optim.optax_chain import make_optimizer as make_optimizer
from qlora_jax.optim.schedule import make_schedule as make_schedule
