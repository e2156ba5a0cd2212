"""The device and the model that `plan` plans for."""

import dataclasses
from pathlib import Path

from pallas_kernels.devices import FUSED_FROM
from pallas_kernels.gpu_specs import CARDS, Card, find_card
from qlora_jax.config import ConfigError, ModelArgs
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.io.hf.gpt_oss_experts import MXFP4, is_mxfp4
from qlora_jax.io.hf.hub import fetch_config, hub_name_of
from qlora_jax.io.hf.reader import read_config
from qlora_jax.io.loading.stored_codes import with_dense_layers
from qlora_jax.io.open_model import open_model
from qlora_jax.models.catalog import PUBLISHED, nearest
from qlora_jax.models.config import DENSE, STORED, ModelConfig, WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.models.precision import weight_format
from qlora_jax.training.optimizer_state import physical_memory
from qlora_jax.untrusted_json import JsonObject

CPU = "cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanTarget:
    """The device of a plan.

    Attributes:
      card: the GPU; None for the CPU.
      memory_bytes: its memory, or the memory that the user gave.
    """

    card: Card | None
    memory_bytes: int

    @property
    def device(self) -> tuple[str, tuple[int, int] | None]:
        """JAX's platform, and the compute capability of a card."""
        return (CPU, None) if self.card is None else ("gpu", self.card.compute_capability)


def plan_target(card: str | None, memory: str | None) -> PlanTarget:
    """Returns the device of a plan from the settings `card` and `memory`.

    Raises:
      ConfigError: neither setting is given, the card is unknown, or the memory is not a size.
    """
    if card is None and memory is None:
        raise ConfigError([f"card, memory: neither is given. Set --card to one of {', '.join(CARDS)}, cpu."])
    size = None if memory is None else _size(memory)
    if card == CPU:
        return PlanTarget(card=None, memory_bytes=size or physical_memory())
    if card is None:
        assert size is not None
        # A plan for a size of memory assumes a card with fused kernels.
        with_kernels = (each for each in CARDS.values() if each.compute_capability >= FUSED_FROM)
        nearest_card = min(with_kernels, key=lambda each: abs(each.memory_bytes - size))
        return PlanTarget(card=nearest_card, memory_bytes=size)
    found = find_card(card)
    return PlanTarget(card=found, memory_bytes=size or found.memory_bytes)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError([f"memory: {error}"]) from error


def planned_weights(
    args: ModelArgs, features: ModelConfig, platform: str, capability: tuple[int, int] | None = None
) -> WeightFormat:
    """Returns the format of the base on a device; the codes of a file are those that it has. See `compute_dtype`.

    Without files, only the codes of gpt-oss are known: MXFP4 of its experts.

    Raises:
      ValueError: `stored` codes of another model without its files, or as `weight_format` and `with_dense_layers`.
    """
    weights, place = weight_format(args, features, platform, capability), Path(args.path).expanduser()
    if weights.quant_type != STORED:
        return weights
    if place.exists() and place.suffix != ".json":
        return with_dense_layers(weights, open_model(place), features)
    config, _ = model_description(args.path)
    if not is_mxfp4(config, config.get("quantization_config") or {}):
        raise ValueError(
            f"model.quant_type: found 'stored', whose codes are those of the files (found model.path={args.path}, "
            "expected a folder, a GGUF file, or a config of gpt-oss with experts in MXFP4). Give the files, or set "
            "model.quant_type=nf4"
        )
    formats = [(name, DENSE) for name in features.linear_shapes()]
    formats += [(name, MXFP4) for name in features.expert_shapes()]
    stored = tuple((name, (of_layer,) * len(features.layers_with(name))) for name, of_layer in formats)
    return dataclasses.replace(weights, stored=stored)


def model_features(path: str) -> ModelConfig:
    """Returns the configuration of a model that `model_description` finds.

    Raises:
      ValueError: as `model_description`, or the model is not supported.
    """
    return model_config(*model_description(path))


def model_description(path: str) -> tuple[JsonObject, str]:
    """Returns (config, its name) of a folder, a config.json, a GGUF file, a published model, or a Hub name.

    Only config.json is fetched from the Hub.

    Raises:
      ValueError: the path is none of these.
    """
    place = Path(path).expanduser()
    if place.suffix == ".json" and place.is_file():
        return read_config(place), str(place)
    if (place / "config.json").is_file():
        return model_description(str(place / "config.json"))
    if place.exists():
        source = open_model(place)
        return source.config, source.config_name
    if path in PUBLISHED:
        return PUBLISHED[path], path
    on_hub = hub_name_of(path)
    if on_hub is not None:
        return model_description(str(fetch_config(on_hub)))
    hint = f" Did you mean {near}?" if (near := nearest(path)) else ""
    raise ValueError(
        f"{path}: not a file, a folder, a Hub name (org/name) or a published model ({', '.join(PUBLISHED)}).{hint}"
    )
