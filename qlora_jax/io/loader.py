"""Fills a model from disk, one tensor at a time: read, quantize, write into the stacked array in place.

Host memory beyond the model itself: the largest tensor in f32 and its codes. There is never a 16-bit copy of a
quantized layer, and never a second stack.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.model_source import ModelSource, TensorEntry, prefetch
from qlora_jax.io.tensor_map import Leaf, Slot, check_tensors, layer_name, slots_of
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.mixed_stack import MixedStack
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant import quantize

SLICE = 1 << 22  # weights per check for non-finite values
QUANTIZATION_FIELDS = ("quant_type", "block_size", "double_quant", "nested_block_size")

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, name of the tensor)
Transform = Callable[[str, np.ndarray], np.ndarray]  # (name of a tensor, the tensor) -> the tensor that is loaded


@runtime_checkable
class Digest(Protocol):
    """A hash object of hashlib."""

    def update(self, data: bytes | np.ndarray, /) -> None:
        """Adds bytes."""

    def hexdigest(self) -> str:
        """The digest in hexadecimal."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its weights, and the fingerprint that identifies its base.

    Attributes:
      fingerprint: SHA-256 over the features, the quantization and every tensor as quantized, in hexadecimal. It does
        not depend on layout, device or compute dtype.
    """

    model: CausalLM
    fingerprint: str


def unchanged(name: str, tensor: np.ndarray) -> np.ndarray:
    """Returns the tensor: the transform of a model that is loaded as it is on disk."""
    return tensor


def load_model(
    source: ModelSource,
    config: ModelConfig,
    weights: WeightFormat,
    progress: Progress | None = None,
    transform: Transform = unchanged,
) -> Loaded:
    """Loads the weights of `source` into the model of `config`, and quantizes its linear layers to `weights`.

    Layers that the files store in 4 bits are loaded unchanged, and their other layers stay dense.

    Args:
      progress: called after each tensor with (bytes of file done, bytes in all, name of the tensor).
      transform: applied to each tensor that is stored in 16 bits or more, before it is quantized. It subtracts the part
        of the weights that adapters start with (PiSSA, LoftQ).

    Raises:
      ValueError: tensors are missing, unexpected or mis-shaped (all are named); the files store codes of another format
        than `weights`; or a tensor is not finite (its name and the first index are given).
    """
    weights = with_dense_layers(weights, source, config)
    model = nnx.eval_shape(lambda: CausalLM(config, weights))
    slots = slots_of(model)
    check_tensors(source, {name: slot.shape for slot in slots for name in slot.names}, config)
    check_stored_quantization(source, slots)
    report = _reporter(source, slots, progress)
    digest = _digest_of_settings(config, weights)
    entries = prefetch([source.tensors[name] for slot in slots for name in slot.names])
    stacks = iter(_zeros([slot.leaf for slot in slots if slot.stacked]))
    leaves = [
        _filled(next(stacks) if slot.stacked else None, _read_slot(source, slot, entries, digest, report, transform))
        for slot in slots
    ]
    filled = [(slot.path, Frozen(leaf)) for slot, leaf in zip(slots, leaves, strict=True)]
    return Loaded(model=nnx.merge(nnx.graphdef(model), nnx.from_flat_state(filled)), fingerprint=digest.hexdigest())


def check_stored_quantization(source: ModelSource, slots: Sequence[Slot]) -> None:
    """Checks that layers which the files store in 4 bits have the format that the model expects.

    Raises:
      ValueError: the format differs; every setting that differs is named.
    """
    expected = [(name, slot.quantization_of(index)) for slot in slots for index, name in enumerate(slot.names)]
    stored = [
        (read, spec) for name, spec in expected if spec is not None and (read := source.tensors[name].read_quantized)
    ]
    if not stored:
        return
    read, spec = stored[0]
    if wrong := _differing_settings(read(), spec):
        raise ValueError(
            f"{source.path}: already quantized, with other settings (found {'; '.join(wrong)}), and weights are never "
            "quantized twice. Set model.quant_type, model.block_size and model.double_quant to those of the files"
        )


def _differing_settings(weight: QTensor, spec: QTensor) -> list[str]:
    pairs = [(name, getattr(weight, name), getattr(spec, name)) for name in QUANTIZATION_FIELDS]
    return [f"{name}={found}, expected {wanted}" for name, found, wanted in pairs if found != wanted]


def _reporter(source: ModelSource, slots: Sequence[Slot], progress: Progress | None) -> Callable[[TensorEntry], None]:
    total = sum(source.tensors[name].nbytes for slot in slots for name in slot.names)
    done = 0

    def report(entry: TensorEntry) -> None:
        nonlocal done
        done += entry.nbytes
        if progress is not None:
            progress(done, total, entry.name)

    return report


def _zeros(specs: Sequence[Leaf]) -> Sequence[Leaf]:
    """Zeros for leaves of ShapeDtypeStructs, made by one compiled call."""
    return jax.jit(lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), specs))()


def _filled(stack: Leaf | None, layers: Iterator[QTensor | jax.Array]) -> Leaf:
    """The stack with all layers written into it, or the only layer if `stack` is None."""
    if stack is None:
        (leaf,) = layers
        return leaf
    for index, layer in enumerate(layers):
        stack = _with_layer(stack, layer, index)
    return stack


def _with_layer(stack: Leaf, layer: QTensor | jax.Array, index: int) -> Leaf:
    if not isinstance(stack, MixedStack):
        return _set_layer(stack, layer, np.int32(index))
    part, index = stack.locate(index)
    return dataclasses.replace(stack, **{part: _set_layer(getattr(stack, part), layer, np.int32(index))})


def _read_slot(
    source: ModelSource,
    slot: Slot,
    entries: Iterator[TensorEntry],
    digest: Digest,
    report: Callable[[TensorEntry], None],
    transform: Transform,
) -> Iterator[QTensor | jax.Array]:
    """Yields each tensor of a slot, quantized or in the leaf's dtype; its tensors are the next of `entries`."""
    for index, name in enumerate(slot.names):
        entry = next(entries)
        if spec := slot.quantization_of(index):
            layer = dataclasses.replace(read_quantized(source, entry, spec, transform), dtype=spec.dtype)
            _update(digest, name, jax.tree.leaves(layer))
        else:
            array = entry.read()
            _check_finite(source, name, array)
            array = transform(name, array)
            _update(digest, name, [array])
            # Copied because the memory belongs to the file; after the cast, so that f32 and two casts never coexist.
            array = array.astype(slot.dtype, copy=False)
            layer = jnp.array(array, copy=True)
            del array  # before the next tensor is read
        yield layer
        report(entry)


def read_quantized(source: ModelSource, entry: TensorEntry, spec: QTensor, transform: Transform = unchanged) -> QTensor:
    """The weight in codes: unchanged if the file stores codes, otherwise transformed and quantized as in `spec`.

    Raises:
      ValueError: the weight is not finite, or the file stores it in another format than `spec`.
    """
    if entry.read_quantized is not None:
        weight = entry.read_quantized()
        if wrong := _differing_settings(weight, spec):
            raise ValueError(
                f"{source.path}: {entry.name} is quantized with other settings than the model's other weights (found "
                f"{'; '.join(wrong)}). Use an undamaged file"
            )
        return weight
    array = entry.read()
    if transform is not unchanged:
        _check_finite(source, entry.name, array)
        array = transform(entry.name, array)
    try:
        return quantize(
            array,
            quant_type=spec.quant_type,
            block_size=spec.block_size,
            double_quant=spec.double_quant,
            nested_block_size=spec.nested_block_size,
        )
    except ValueError:  # the quantizer detects non-finite values, but does not know the tensor's name
        _check_finite(source, entry.name, array)
        raise


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer[Stack: (jax.Array, QTensor)](
    stack: Stack, layer: QTensor | jax.Array, index: jax.Array | np.int32
) -> Stack:
    """The stack with one layer set, in the memory of the donated stack."""
    if isinstance(stack, QTensor):
        assert isinstance(layer, QTensor)
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


def _digest_of_settings(config: ModelConfig, weights: WeightFormat) -> Digest:
    # `dense` is left out because the tensors themselves show which layers are dense.
    left_out = ("platform", "dtype", "dense")
    quantization = {key: value for key, value in dataclasses.asdict(weights).items() if key not in left_out}
    settings = {"config": config.fingerprint_features(), "weights": quantization}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode())


def _update(digest: Digest, name: str, leaves: Sequence[jax.Array | np.ndarray]) -> None:
    digest.update(name.encode())
    for leaf in leaves:
        array = np.ascontiguousarray(leaf)
        digest.update(f"{array.dtype.name}{array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8))


def with_dense_layers(weights: WeightFormat, source: ModelSource, config: ModelConfig) -> WeightFormat:
    """`weights` with the layers that stay dense because the files quantize only the others.

    If the files quantize no layer, every layer is quantized to `weights`.
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
    entries = [source.tensors.get(each) for each in names]  # `check_tensors` reports a missing one
    return tuple(layer for layer, entry in enumerate(entries) if entry is not None and entry.read_quantized is None)
