"""Fills a model from disk, one tensor at a time: read, quantize, put into the stacked array in place.

Host memory beyond the model itself: the largest tensor in f32 and its codes. There is never a 16-bit copy of a
quantized layer, and never a second stack.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.model_source import ModelSource, TensorEntry, reading_ahead
from qlora_jax.io.tensor_map import Slot, check_inventory, layer_name, slots_of
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.mixed_stack import MixedStack
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant import quantize

SLICE = 1 << 22  # weights that are looked at in one go
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its weights, and what tells its base from any other.

    Attributes:
      fingerprint: SHA-256 over the features, the quantization and every tensor as quantized, in hexadecimal. It does
        not depend on layout, device or compute dtype.
    """

    model: CausalLM
    fingerprint: str


Rest = Callable[[str, np.ndarray], np.ndarray]  # (name of a tensor, the tensor) -> what of it is held


def whole(name: str, tensor: np.ndarray) -> np.ndarray:
    """The tensor."""
    return tensor


def load_model(
    source: ModelSource,
    config: ModelConfig,
    weights: WeightFormat,
    progress: Progress | None = None,
    rest: Rest = whole,
) -> Loaded:
    """The model of `config` with the weights of `source`, linear layers quantized as `weights` says.

    Where files hold layers in 4 bits already, those are taken as they are, and the others stay dense.

    Args:
      progress: called with (bytes of file done, bytes in all, name of the tensor) after each tensor.
      rest: what is held of tensors that the files hold in 16 bits or more; adapters have what is not.

    Raises:
      ValueError: tensors missing, unexpected or mis-shaped, all at once; codes on disk of another kind than `weights`
        says; or a tensor that is not finite, by name and index.
    """
    weights = as_held(weights, source, config)
    model = nnx.eval_shape(lambda: CausalLM(config, weights))
    slots = slots_of(model)
    check_inventory(source, {name: slot.shape for slot in slots for name in slot.names}, config)
    check_held(source, slots)
    report = _reporter(source, slots, progress)
    digest = _digest_of_settings(config, weights)
    entries = reading_ahead([source.tensors[name] for slot in slots for name in slot.names])
    stacks = iter(_empty([slot.leaf for slot in slots if slot.stacked]))
    leaves = [
        _filled(next(stacks) if slot.stacked else None, _converted(source, slot, entries, digest, report, rest))
        for slot in slots
    ]
    filled = [(slot.path, Frozen(leaf)) for slot, leaf in zip(slots, leaves, strict=True)]
    return Loaded(model=nnx.merge(nnx.graphdef(model), nnx.from_flat_state(filled)), fingerprint=digest.hexdigest())


HELD_BY = ("quant_type", "block_size", "double_quant", "nested_block_size")


def check_held(source: ModelSource, slots: list[Slot]) -> None:
    """Passes a source whose layers are not quantized yet, or are as the model wants them."""
    wanted = [(name, slot.quantized_as(index)) for slot in slots for index, name in enumerate(slot.names)]
    held = [(read, wants) for name, wants in wanted if wants is not None and (read := source.tensors[name].held)]
    if not held:
        return
    read, wants = held[0]
    has = read()
    pairs = [(name, getattr(has, name), getattr(wants, name)) for name in HELD_BY]
    if wrong := [f"{name}={there}, asked for is {asked}" for name, there, asked in pairs if there != asked]:
        raise ValueError(
            f"{source.path} is quantized already, with {'; '.join(wrong)}: nothing is quantized twice; set "
            "model.quant_type, model.block_size and model.double_quant to what the files hold"
        )


def _reporter(source: ModelSource, slots: list[Slot], progress: Progress | None) -> Callable[[TensorEntry], None]:
    total = sum(source.tensors[name].nbytes for slot in slots for name in slot.names)
    done = 0

    def report(entry: TensorEntry) -> None:
        nonlocal done
        done += entry.nbytes
        if progress is not None:
            progress(done, total, entry.name)

    return report


def _empty(specs: Any) -> Any:
    """Zeros for a tree of ShapeDtypeStructs, made by one compiled call."""
    return jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), specs))()


def _filled(stack: Any, layers: Iterator[QTensor | jax.Array]) -> Any:
    """The stack with all layers put into it, or the one layer where there is no stack."""
    if stack is None:
        (leaf,) = layers
        return leaf
    for index, layer in enumerate(layers):
        stack = _placed(stack, layer, index)
    return stack


def _placed(stack: Any, layer: QTensor | jax.Array, index: int) -> Any:
    if not isinstance(stack, MixedStack):
        return _put(stack, layer, np.int32(index))
    part, place = stack.locate(index)
    return dataclasses.replace(stack, **{part: _put(getattr(stack, part), layer, np.int32(place))})


def _converted(
    source: ModelSource,
    slot: Slot,
    entries: Iterator[TensorEntry],
    digest: Any,
    report: Callable[[TensorEntry], None],
    rest: Rest,
) -> Iterator[QTensor | jax.Array]:
    """Each tensor of a slot, which are the next of `entries`, as it is held: quantized, or in the dtype of the leaf."""
    for index, name in enumerate(slot.names):
        entry = next(entries)
        if wants := slot.quantized_as(index):
            layer = dataclasses.replace(quantized(source, entry, wants, rest), dtype=wants.dtype)
            _update(digest, name, jax.tree.leaves(layer))
        else:
            array = entry.read()
            _check_finite(source, name, array)
            array = rest(name, array)
            _update(digest, name, [array])
            # A copy, since the memory is the file's, and after the cast: f32 and two casts are never there at once.
            array = array.astype(slot.dtype, copy=False)
            layer = jnp.array(array, copy=True)
            del array  # before the next one is read
        yield layer
        report(entry)


def quantized(source: ModelSource, entry: TensorEntry, spec: QTensor, rest: Rest = whole) -> QTensor:
    """The weight in codes: as the file holds it, or quantized."""
    if entry.held is not None:
        return entry.held()
    array = entry.read()
    if rest is not whole:
        _check_finite(source, entry.name, array)
        array = rest(entry.name, array)
    try:
        return quantize(
            array,
            quant_type=spec.quant_type,
            block_size=spec.block_size,
            double_quant=spec.double_quant,
            nested_block_size=spec.nested_block_size,
        )
    except ValueError:  # the quantizer looks for what is not finite as it goes, but does not know the tensor's name
        _check_finite(source, entry.name, array)
        raise


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Any, layer: Any, index: Any) -> Any:
    """The stack with one layer set, in the memory of the stack given."""
    if isinstance(stack, QTensor):
        layer = repack(layer, stack.layout)
    return jax.tree.map(lambda all_, one: jax.lax.dynamic_update_index_in_dim(all_, one, index, 0), stack, layer)


def _check_finite(source: ModelSource, name: str, array: np.ndarray) -> None:
    flat = array.reshape(-1)
    if all(np.isfinite(flat[start : start + SLICE]).all() for start in range(0, flat.size, SLICE)):
        return
    bad = np.argwhere(~np.isfinite(array))
    raise ValueError(
        f"{source.path}: {len(bad)} of {array.size} elements of {name} are not finite, the first is "
        f"{array[tuple(bad[0])]} at {bad[0].tolist()}: the file is damaged, or was saved by a run that diverged"
    )


def _digest_of_settings(config: ModelConfig, weights: WeightFormat) -> Any:
    # Which layers are dense shows in the tensors themselves.
    left_out = ("platform", "dtype", "dense")
    held = {key: value for key, value in dataclasses.asdict(weights).items() if key not in left_out}
    settings = {"config": config.fingerprint_features(), "weights": held}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode())


def _update(digest: Any, name: str, leaves: list[Any]) -> None:
    digest.update(name.encode())
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))


def as_held(weights: WeightFormat, source: ModelSource, config: ModelConfig) -> WeightFormat:
    """`weights`, and which layers stay dense, since the files leave them in 16 bit and quantize others.

    Where the files quantize none, every layer is quantized as `weights` says.
    """
    if weights.quant_type is None:
        return weights
    dense = {name: _dense_layers(name, source, config) for name in config.linear_shapes()}
    if all(len(layers) == config.num_layers for layers in dense.values()):
        return weights
    return dataclasses.replace(weights, dense=tuple((name, layers) for name, layers in dense.items() if layers))


def _dense_layers(name: str, source: ModelSource, config: ModelConfig) -> tuple[int, ...]:
    names = [
        config.hugging_face_name(layer_name(f"model.layers.{name}.weight", layer)) for layer in range(config.num_layers)
    ]
    entries = [source.tensors.get(each) for each in names]  # what is missing is told by the loader
    return tuple(layer for layer, entry in enumerate(entries) if entry is not None and entry.held is None)
