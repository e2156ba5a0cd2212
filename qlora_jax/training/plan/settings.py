"""The settings of `plan`: those of a training run, with data and output optional.

Importing this module does not import jax, because the command sets JAX_PLATFORMS after it reads its settings.
"""

import dataclasses

from pallas_kernels.gpu_specs import CARDS
from qlora_jax.config import Config, DataArgs, ModelArgs
from qlora_jax.config.fields import AT_LEAST_ONE, NOT_EMPTY, setting
from qlora_jax.models.catalog import PUBLISHED


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanModelArgs(ModelArgs):
    """The base model and its weight format."""

    path: str = setting(
        "the base model: a Hugging Face folder, only its config.json, a GGUF file, a name on the Hub (org/name; only "
        "config.json is fetched), or a published model by name: " + ", ".join(PUBLISHED),
        bound=NOT_EMPTY,
        common="a Hugging Face folder, a GGUF file, org/name on the Hub, or a published model such as llama-3-8b",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanDataArgs(DataArgs):
    """Training data, which determines the lengths of batches; without it, every text has data.max_length tokens."""

    train: str | dict[str, float] | None = setting(
        "training data, for the lengths of its batches; null: every text has data.max_length tokens", None
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanArgs(Config):
    """The run to plan; accepts all settings of a training run, so a run's file works as --config."""

    card: str | None = setting(
        f"the card: {', '.join(CARDS)}, or cpu", None, common="the card, such as h100 or rtx4090, or cpu"
    )
    cards: int = setting(
        "the number of such cards that mesh.fsdp=auto and mesh.data=auto may use; not needed if the mesh is set",
        1,
        AT_LEAST_ONE,
        common="the number of such cards",
    )
    memory: str | None = setting(
        "device memory, such as 24GiB, instead of the card's; without card: the card with the nearest size",
        None,
        common="device memory, such as 24GiB; without --card: the card with the nearest size",
    )
    model: PlanModelArgs = setting("the base model")
    data: PlanDataArgs = dataclasses.field(default_factory=PlanDataArgs)
    output: str | None = setting("ignored: a plan writes no files", None)
