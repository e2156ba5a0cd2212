"""The least time of a training step on a card, by part: its FLOP and bytes under the card's roofs. Nothing is measured.

FLOP are those of matrix products, by formula (`cost.flops`). Bytes are those that must cross memory, as if each part
kept what only it uses on the chip (`cost.traffic`); to those come the frozen weights, per product, and the optimizer's
arrays. Exchanges between devices and with host memory are left out. Arrays that stay in the L2 cache between parts do
not cross memory, so a step of few tokens may exceed the roof of the bandwidth.

Dimension key: A micro-batches, B rows, T positions.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

import jax
from jaxtyping import PyTree

from pallas_kernels.devices import Device
from pallas_kernels.gpu_specs import Card
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.nf4_matmul import api as nf4
from pallas_kernels.nf4_matmul.costs import Roofline, dequantized_bytes, expanded_bytes, scale_group
from qlora_jax.models.partition import module_of
from qlora_jax.nn.frozen_weight import ops_of
from qlora_jax.training.cost import memory_use
from qlora_jax.training.cost.flops import flops, method_work
from qlora_jax.training.cost.step_shape import EMBEDDING, HEAD, IN_LAYERS, TABLES, StepShape, is_routed
from qlora_jax.training.cost.traffic import Traffic
from qlora_jax.training.step_spec import StepSpec

PARTS = FROZEN, ADAPTERS, ATTENTION, HEAD_AND_LOSS, REST, OPTIMIZER = (
    *("frozen products", "adapters", "attention"),
    *("head and loss", "norms and the rest", "optimizer"),
)
# Named scopes of the step, which are also the first words of names in `flops`. The method's come first: an adapter on a
# router is an adapter.
SCOPES_OF = {
    HEAD_AND_LOSS: ("new_tokens", "whole_head", "sequence_head", "head"),
    FROZEN: ("router", "shared_gate", "experts", "frozen"),
    ATTENTION: ("attention",),
}
SCOPES: dict[str, str] = {scope: part for part, scopes in SCOPES_OF.items() for scope in scopes}

# Card -> the measured share of the speed at the roofs. No step was measured on a card.
MEASURED_SHARES: Mapping[str, float] = {}

FUSED = {name for table in (nf4.IMPLEMENTATIONS, grouped.IMPLEMENTATIONS) for name, one in table.items() if one.fused}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PartCost:
    """The FLOP and bytes of one part of an optimizer step on one device, and its place under the roofs.

    Attributes:
      bound: the roof that binds the part: `tensor cores`, `bandwidth`, or `f32 units` where these compute the products.
    """

    flops: int
    moved: int
    roofline: Roofline
    bound: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRoofs:
    """The parts of an optimizer step on a card, each at its roof, one after another.

    Attributes:
      tokens: A B T, the positions of all devices.
      peak: FLOP/s of the card's products in `dtype`.
    """

    card: Card
    dtype: str
    peak: float
    tokens: int
    parts: dict[str, PartCost]

    @property
    def seconds(self) -> float:
        """The least time of the step."""
        return sum(part.roofline.seconds for part in self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """The most tokens per second."""
        return self.tokens / self.seconds

    @property
    def measured_share(self) -> float | None:
        """The share of that speed which a step reached on this card; None if none was measured."""
        return MEASURED_SHARES.get(self.card.name)


def step_roofs(setting: StepSpec, card: Card) -> StepRoofs | None:
    """Returns the roofs of a step on a card; None for float32, whose peak depends on the use of TF32."""
    peak = card.peak_flops(setting.weights.dtype)
    if peak is None:
        return None
    units = "tensor cores" if peak == card.peak_flops("float16") else "f32 units"
    work, moved = part_flops(setting.sizes), part_bytes(setting, card)
    parts = {}
    for name in filter(moved.get, PARTS):
        roofline = Roofline.of(work[name], moved[name], peak, card.bandwidth)
        bound = units if roofline.bound == "compute" else "bandwidth"
        parts[name] = PartCost(flops=work[name], moved=moved[name], roofline=roofline, bound=bound)
    return StepRoofs(card=card, dtype=setting.weights.dtype, peak=peak, tokens=math.prod(setting.batch), parts=parts)


def scopes_of(step: StepShape) -> dict[str, str]:
    """Returns the part of each named scope, those of the finetuning method first."""
    return {work.scope: ADAPTERS for work in method_work(step)} | SCOPES


def part_flops(step: StepShape) -> Counter[str]:
    """Returns the FLOP of an optimizer step by part; those of one device."""
    found, scopes = Counter[str](), scopes_of(step)
    for name, work in flops(step).items():
        found[scopes[name.split()[0]]] += work
    return found


def part_bytes(setting: StepSpec, card: Card) -> Counter[str]:
    """Returns the bytes of an optimizer step by part; those of one device."""
    step = setting.sizes
    device = Device(platform="gpu", kind=card.description, compute_capability=card.compute_capability)
    found = activation_traffic(setting)
    found[FROZEN] += step.batch[0] * frozen_weight_bytes(step, device)
    found[HEAD_AND_LOSS] += step.batch[0] * head_weight_bytes(step)
    found[OPTIMIZER] = 3 * memory_use.gradient_bytes(step) + 2 * memory_use.optimizer_bytes(step)
    return found


def activation_traffic(setting: StepSpec) -> Counter[str]:
    """Returns the bytes of an optimizer step without frozen weights by part, of one device's rows on that device."""
    accumulated, rows, length = setting.batch
    weights = dataclasses.replace(setting.weights, experts_on_host=False)
    alone = setting.replace(mesh=None, weights=weights, batch=(accumulated, rows // setting.devices, length))
    function, args, kwargs = alone.gradients()
    frozen = {id(leaf) for leaf in jax.tree.leaves(alone.arrays.parts.base)}
    traffic = Traffic(scopes_of(alone.sizes), REST)
    traffic.program(function.trace(*args, **kwargs).jaxpr.jaxpr, [id(leaf) in frozen for leaf in jax.tree.leaves(args)])
    return traffic.found


def frozen_weight_bytes(step: StepShape, device: Device) -> int:
    """Returns the bytes that products with frozen weights read per micro-batch, whole weights on every device.

    That is a weight as it is stored, per product. If an implementation first dequantizes the weight, or expands its
    constants, it writes and reads the result.
    """
    products, total = memory_use.weight_products(step), 0
    for path, weight in jax.tree_util.tree_flatten_with_path(step.trees.parts.base, is_leaf=_has_kernel)[0]:
        name = module_of(path).removeprefix(IN_LAYERS)
        if name in products and jax.tree_util.DictKey("weight") in path:
            total += products[name] * _weight_bytes(weight, name, step, device) // step.layers(name)
    return total


def _has_kernel(leaf: PyTree) -> bool:
    return ops_of(leaf).choice is not None


def _weight_bytes(weight: PyTree, name: str, step: StepShape, device: Device) -> int:
    """Returns the bytes of one product with each layer of a weight."""
    stored = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(weight))
    choose = ops_of(weight).choice
    if choose is None:
        return stored
    if is_routed(name):
        choice = grouped.choose_implementation(device, "forward", step.weights.dtype, weight, step.tiles[1])
    else:
        choice = choose(device, step.rows, step.weights.dtype, weight)
    fused = choice.name in FUSED
    through = expanded_bytes(weight.shape, scale_group(weight)) if fused else dequantized_bytes(weight.shape)
    return stored + math.prod(weight.stack_shape) * 2 * through


def head_weight_bytes(step: StepShape) -> int:
    """Returns the bytes of the head's frozen table; the gradient of the hidden states comes from the same tiles."""
    name = EMBEDDING if step.model.tie_embeddings else HEAD
    tables = (leaf for kind, leaf in step.trees.frozen(None) if kind == TABLES and leaf.name == name)
    return 0 if step.head is not None else sum(leaf.nbytes for leaf in tables)
