"""The optimizer of a run: schedules and the optax chain. Knows pytrees and numbers, nothing of models."""

from qlora_jax.optim.optax_chain import make_elementwise as make_elementwise
from qlora_jax.optim.optax_chain import make_optimizer as make_optimizer
from qlora_jax.optim.schedule import make_schedule as make_schedule
