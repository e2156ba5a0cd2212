"""Checks a mesh against the settings of a run and the devices that there are."""

from typing import NamedTuple

from qlora_jax.config.mesh_settings import MeshSize, mesh_sizes
from qlora_jax.config.methods import METHODS
from qlora_jax.config.parse import ConfigError
from qlora_jax.config.schema import Config, TrainArgs


class MeshChoices(NamedTuple):
    """The meshes that a run may use, the first to try first, and the problems of those that it may not."""

    usable: list[MeshSize]
    refused: dict[MeshSize, list[str]]


def mesh_choices(config: Config, devices: int) -> MeshChoices:
    """Returns the meshes that a run may use on this many devices.

    Raises:
      ConfigError: there is none; with all problems of the one that the settings name.
    """
    problems = {size: mesh_problems(config, size, devices) for size in mesh_sizes(config.mesh, devices)}
    usable = [size for size, found in problems.items() if not found]
    if not usable:
        raise ConfigError(next(iter(problems.values())))
    return MeshChoices(usable, {size: found for size, found in problems.items() if found})


def given_mesh_problems(config: Config) -> list[str]:
    """Describes why a run cannot use the mesh that its settings give, whatever devices there are."""
    data, fsdp = config.mesh.data, config.mesh.fsdp
    if isinstance(data, str) or isinstance(fsdp, str):
        return []
    size = MeshSize(data, fsdp)
    return mesh_problems(config, size, size.devices)


def mesh_problems(config: Config, size: MeshSize, devices: int) -> list[str]:
    """Describes why a run cannot use a mesh, one line per setting."""
    problems = [*_device_problems(size, devices), *_micro_batch_problems(config.train, size)]
    if size.fsdp > 1 and config.train.remat == "none":
        problems.append(
            f"train.remat: found 'none' with mesh.fsdp={size.fsdp}, expected names, full or offload, because none "
            "keeps the whole weights of every layer. Set train.remat=names"
        )
    if size.devices > 1 and config.model.experts == "offload":
        problems.append(
            f"model.experts: found 'offload' on a mesh of {size.devices} devices, which does not support it yet. Set "
            "mesh.data=1 and mesh.fsdp=1, or model.experts=device"
        )
    if size.devices > 1:
        problems += [
            f"lora.{name}: found {value!r} on a mesh of {size.devices} devices, which does not support it yet. Set "
            f"mesh.data=1 and mesh.fsdp=1, or lora.{name}={'lora' if name == 'method' else 'default'}"
            for name, value, is_supported in (
                ("method", config.lora.method, METHODS[config.lora.method].on_mesh),
                ("init", config.lora.init, config.lora.init == "default"),
            )
            if not is_supported
        ]
    return problems


def _device_problems(size: MeshSize, devices: int) -> list[str]:
    if size.devices <= devices:
        return []
    found = f"found {size.data} x {size.fsdp} = {size.devices} devices"
    there = "there is one device" if devices == 1 else f"there are {devices} devices"
    return [f"mesh.data, mesh.fsdp: {found}, but {there}. Set sizes whose product is at most {devices}"]


def _micro_batch_problems(train: TrainArgs, size: MeshSize) -> list[str]:
    if train.micro_batch_size % size.devices == 0:
        return []
    found = f"found {train.micro_batch_size}, expected a multiple of {size.devices} (mesh.data {size.data} x mesh.fsdp "
    return [f"train.micro_batch_size: {found}{size.fsdp}). {_micro_batch_fix(train, size.devices)}"]


def _micro_batch_fix(train: TrainArgs, devices: int) -> str:
    """Returns the nearest sizes that divide; with the same rows per step, if there are any."""
    rows = train.micro_batch_size * train.accumulation
    same = [each for each in range(devices, rows + 1, devices) if rows % each == 0]
    if not same:
        more = -(-train.micro_batch_size // devices) * devices
        return f"Set train.micro_batch_size={more}, or a smaller mesh"
    nearest = min(same, key=lambda each: abs(each - train.micro_batch_size))
    return (
        f"Set train.micro_batch_size={nearest} and train.accumulation={rows // nearest}, which train on the same "
        f"{rows} rows per step"
    )
