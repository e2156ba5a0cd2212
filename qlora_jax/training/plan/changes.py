"""Changes of a step that need less memory on the device, in the order in which a plan tries them.

Dimension key: A micro-batches, B rows, T positions.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qlora_jax.config.methods import uses
from qlora_jax.data.batching.packing import UNIT
from qlora_jax.models.partition import partly_dense
from qlora_jax.sharding import FSDP, AnyMesh, axis_size
from qlora_jax.training.plan.requirements import Requirements, StepConfig

MOST_ROWS = 256  # the largest micro-batch that is searched for

PAGE = "page the optimizer state to host memory"
OFFLOAD_EXPERTS = "keep the routed experts in host memory"
LEANER = {
    "full": "recompute activations in the backward pass",
    "offload": "recompute activations, and offload the layers' inputs to host memory",
}  # policies of train.remat with less memory on the device, in order

Options = dict[str, str | int]
Measure = Callable[[StepConfig], Requirements]


class Change(NamedTuple):
    """A change of the configuration, its options, and the requirements with it."""

    description: str
    options: Mapping[str, str | int]
    requirements: Requirements


def changes(config: StepConfig, limit: int, measure: Measure) -> Iterator[Change]:
    """Yields single changes, those with the least effect on the run first, then pairs that change no result.

    The order is: same numbers, same optimizer step, lower precision, another optimizer step.
    """
    rows, length = config.batch[1:]
    if not config.paged:
        yield Change(PAGE, {"optim.paging": "auto"}, measure(config.replace(paged=True)))
    for remat in _smaller_remat_policies(config):
        yield Change(LEANER[remat], {"train.remat": remat}, measure(config.replace(remat=remat)))
    fewer = [each for each in row_counts(config) if each.batch[1] < rows]
    if count := count_fitting(fewer, limit, measure):
        smaller = fewer[count - 1]
        yield Change("smaller micro-batches with more accumulation", _batch_options(smaller), measure(smaller))
    yield from _offloaded_experts(config, measure)
    yield from _lower_precision(config, measure)
    lengths = [each for each in all_lengths(config) if each.batch[2] < length]
    if shorter := count_fitting(lengths, limit, measure):
        need = measure(lengths[shorter - 1])
        yield Change("shorter rows", {"data.max_length": _max_length(need.config)}, need)
    for remat in () if config.paged else _smaller_remat_policies(config):
        options: Options = {"optim.paging": "auto", "train.remat": remat}
        both = config.replace(paged=True, remat=remat)
        yield Change(f"both {PAGE} and {LEANER[remat]}", options, measure(both))
    yield from _offloaded_and_leaner(config, measure)


def more_devices(config: StepConfig, larger: Sequence[AnyMesh], measure: Measure) -> Iterator[Change]:
    """Yields the step on larger meshes, with at least one row per device and as many rows per optimizer step."""
    for mesh in larger:
        on_device = dataclasses.replace(config.weights, experts_on_host=False)  # offloading works on one device
        on_mesh = config.replace(
            mesh=mesh, remat="names" if config.remat == "none" else config.remat, weights=on_device
        )
        options: Options = {"mesh.fsdp": axis_size(mesh, FSDP)}
        if config.weights.experts_on_host:
            options["model.experts"] = "device"
        if on_mesh.remat != config.remat:
            options["train.remat"] = on_mesh.remat
        if config.batch[1] % on_mesh.devices:
            on_mesh = on_mesh.resized(-(-config.batch[1] // on_mesh.devices) * on_mesh.devices, config.batch[2])
            options |= _batch_options(on_mesh)
        yield Change(f"{on_mesh.devices} devices", options, measure(on_mesh))


def all_lengths(config: StepConfig) -> list[StepConfig]:
    """Returns the step at every batch length, up to the model's maximum."""
    return [config.resized(config.batch[1], n) for n in range(UNIT, config.model.max_positions + 1, UNIT)]


def row_counts(config: StepConfig) -> list[StepConfig]:
    """Returns the step with every number of rows that the devices can share evenly."""
    counts = range(config.devices, MOST_ROWS + 1, config.devices)
    return [config.resized(rows, config.batch[2]) for rows in counts]


def count_fitting(configs: list[StepConfig], limit: int, measure: Measure) -> int:
    """Returns how many of increasing steps fit, by bisection."""
    low, high = 0, len(configs)
    while low < high:
        middle = (low + high) // 2
        if measure(configs[middle]).total <= limit:
            low = middle + 1
        else:
            high = middle
    return low


def _max_length(config: StepConfig) -> int:
    """Returns the largest limit per sequence such that a full row fits the batch's length."""
    return config.batch[2] // max(1, config.objective.sequences_per_row)


def _batch_options(config: StepConfig) -> Options:
    accumulated, rows, _ = config.batch
    return {"train.micro_batch_size": rows, "train.accumulation": accumulated}


def _offloaded_experts(config: StepConfig, measure: Measure) -> Iterator[Change]:
    """Yields the step with its experts in host memory, if a card can fetch them from there."""
    if can_offload_experts(config):
        offloaded, options = _with_offloaded_experts(config)
        yield Change(OFFLOAD_EXPERTS, options, measure(offloaded))


def _offloaded_and_leaner(config: StepConfig, measure: Measure) -> Iterator[Change]:
    for remat in _smaller_remat_policies(config) if can_offload_experts(config) else ():
        offloaded, options = _with_offloaded_experts(config.replace(remat=remat))
        both = {"train.remat": remat, **options}
        yield Change(f"both {OFFLOAD_EXPERTS} and {LEANER[remat]}", both, measure(offloaded))


def can_offload_experts(config: StepConfig) -> bool:
    """Returns True if `model.experts` can become `offload`: routed experts, none partly in 16 bits, on one card."""
    if config.weights.platform == "cpu" or config.mesh is not None or config.model.experts is None:
        return False
    return not config.weights.experts_on_host and not partly_dense(config.weights, config.model)


def _with_offloaded_experts(config: StepConfig) -> tuple[StepConfig, Options]:
    """Returns the step, and its options; the policy `none` would keep what was fetched, so it becomes `names`."""
    weights = dataclasses.replace(config.weights, experts_on_host=True)
    options: Options = {"model.experts": "offload"}
    if config.remat == "none":
        return config.replace(weights=weights, remat="names"), options | {"train.remat": "names"}
    return config.replace(weights=weights), options


def _lower_precision(config: StepConfig, measure: Measure) -> Iterator[Change]:
    """Yields optimizer state in 8 bits, then adapters in bf16."""
    name = config.optim.name.replace("_32bit", "_8bit")
    if name != config.optim.name:
        eight_bit = config.replace(optim=dataclasses.replace(config.optim, name=name))
        yield Change("store the optimizer state in 8 bits", {"optim.name": name}, measure(eight_bit))
    if config.lora.dtype != "bfloat16" and uses(config.lora.method, "dtype"):
        halved = config.replace(lora=dataclasses.replace(config.lora, dtype="bfloat16"))
        yield Change("store adapters in bfloat16", {"lora.dtype": "bfloat16"}, measure(halved))


def _smaller_remat_policies(config: StepConfig) -> Iterator[str]:
    """Yields remat policies with less memory on the device, in order; a CPU cannot offload."""
    policies = [remat for remat in LEANER if remat != "offload" or config.weights.platform != "cpu"]
    yield from policies[policies.index(config.remat) + 1 :] if config.remat in policies else policies
