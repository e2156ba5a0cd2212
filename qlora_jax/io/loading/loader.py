"""Fills a model from disk, one tensor at a time: read, quantize, write into the stacked array in place.

Host memory beyond the model itself: the largest quantized layer in f32 and its codes. There is never a 16-bit copy of a
quantized layer, and never a second stack. Experts are read one by one, so blocks and the constants of double
quantization are those of each expert's weight alone.

On a mesh, each process reads the rows of its devices and quantizes only them. Blocks lie within rows, so their codes
are those of the whole weight. The constants of double quantization depend on all rows: processes exchange the f32 block
constants, a sixteenth of a byte per weight, and each of them double-quantizes those of the whole weight.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from pallas_kernels.formats.ggml_tensor import SPLIT_K, GgmlTensor, finite_scales, to_split_k
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.loading.base_fingerprint import BaseDigest, new_digest
from qlora_jax.io.loading.mesh_weights import (
    STRIP,
    MeshPlaces,
    PlacedArray,
    PlacedWeight,
    ProcessRows,
    all_rows,
    joined,
    read_own,
)
from qlora_jax.io.loading.stacks import empty_stacks, filled, filled_on_host
from qlora_jax.io.loading.stored_codes import with_dense_layers
from qlora_jax.io.tensor_map import Leaf, Slot, check_tensors, slots_of
from qlora_jax.model_source import ModelSource, TensorEntry, aligned_empty, prefetch
from qlora_jax.models.config import STORED, ModelConfig, WeightFormat
from qlora_jax.models.decoder import CausalLM
from qlora_jax.models.partition import check_fetchable, is_on_host
from qlora_jax.nn.frozen_weight import Part
from qlora_jax.nn.variables import Frozen
from qlora_jax.quant import QuantSettings, double_quantize, quantize
from qlora_jax.quant.nvfp4 import nvfp4_blocks_of

SLICE = 1 << 22  # weights that are read, or checked for non-finite values, at once
QUANTIZATION_FIELDS = ("quant_type", "block_size", "double_quant", "nested_block_size")
CONSTANTS = ("absmax", "absmax_codes", "nested_absmax", "nested_offset")  # the leaves of a QTensor beside its codes

Progress = Callable[[int, int, str], None]  # (bytes done, bytes in all, name of the tensor)
Transform = Callable[[str, np.ndarray], np.ndarray]  # (name of a tensor, the tensor) -> the tensor that is loaded


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its weights, and the fingerprint that identifies its base.

    Attributes:
      fingerprint: see qlora_jax.io.loading.base_fingerprint.
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
    *,
    mesh: Mesh | None = None,
    whole_tables: bool = False,
    fingerprint: str | None = None,
) -> Loaded:
    """Loads the weights of `source` into the model of `config`, and quantizes its linear layers to `weights`.

    Layers that the files store in 4 bits are loaded unchanged, and their other layers stay dense.

    Args:
      progress: called after each tensor with (bytes of file done, bytes in all, name of the tensor).
      transform: applied to each tensor that is stored in 16 bits or more, before it is quantized. It subtracts the part
        of the weights that adapters start with (PiSSA, LoftQ).
      mesh: devices that share the model, as `parts_specs` says; None for the default device.
      whole_tables: True keeps embedding and head whole on every device of the mesh, because rows of them train.
      fingerprint: saved fingerprint to compare with; it also selects the format of the new one.

    Raises:
      ValueError: tensors are missing, unexpected or mis-shaped (all are named); the files store codes of another format
        than `weights`; or a tensor is not finite (its name and the first index are given).
    """
    weights = with_dense_layers(weights, source, config)
    check_fetchable(weights, config)
    model = nnx.eval_shape(lambda: CausalLM(config, weights))
    slots = slots_of(model)
    check_tensors(source, {name: slot.shape for slot in slots for name in slot.names}, config)
    check_stored_quantization(source, slots)
    places = None if mesh is None else MeshPlaces(model, mesh, whole_tables=whole_tables)
    reader = _Reader(
        source=source,
        transform=transform,
        digest=new_digest(_settings(config, weights), fingerprint),
        report=_reporter(source, slots, progress),
        places=places,
    )
    tensors = [(slot, index) for slot in slots for index in range(len(slot.names))]
    rows = [reader.rows(slot, index).ranges for slot, index in tensors]
    entries = prefetch([source.tensors[slot.names[index]] for slot, index in tensors], rows)
    stacks = iter(empty_stacks([slot for slot in slots if slot.stacked and not is_on_host(slot.path, weights)], places))
    leaves: list[Leaf] = []
    for slot in slots:
        layers = reader.layers(slot, entries)
        if is_on_host(slot.path, weights):
            leaves.append(filled_on_host(slot, layers))
        elif slot.stacked:
            leaves.append(filled(slot, next(stacks), layers))
        else:
            leaves.extend(layers)  # its only weight
    state = [(slot.path, Frozen(leaf)) for slot, leaf in zip(slots, leaves, strict=True)]
    loaded = nnx.merge(nnx.graphdef(model), nnx.from_flat_state(state))
    return Loaded(model=loaded, fingerprint=reader.digest.fingerprint())


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


def _differing_settings(weight: QTensor, spec: QTensor | GgmlTensor) -> list[str]:
    if isinstance(spec, GgmlTensor):
        return [f"quant_type={weight.quant_type}, expected {spec.ggml_type}"]
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Reader:
    """Reads the tensors of one source in order.

    Attributes:
      digest: collects every tensor.
      report: called after each tensor.
      places: where tensors go on a mesh; None for the default device.
    """

    source: ModelSource
    transform: Transform
    digest: BaseDigest
    report: Callable[[TensorEntry], None]
    places: MeshPlaces | None

    def rows(self, slot: Slot, index: int) -> ProcessRows:
        """Returns the rows of one tensor that this process reads; a transform needs all of them."""
        if self.places is None or self.transform is not unchanged:
            return all_rows(slot.shape[0])
        return self.places.of(slot, index).rows

    def layers(self, slot: Slot, entries: Iterator[TensorEntry]) -> Iterator[Part]:
        """Yields each tensor of a slot, quantized or in the leaf's dtype; its tensors are the next of `entries`."""
        for index in range(len(slot.names)):
            entry = next(entries)
            yield self._layer(slot, index, entry)
            self.report(entry)

    def _layer(self, slot: Slot, index: int, entry: TensorEntry) -> Part:
        place = None if self.places is None else self.places.of(slot, index)
        spec = slot.quantization_of(index)
        self.digest.name(entry.name)
        return READERS.get(type(spec), _Reader._dense)(self, slot, index, entry, spec, place)

    def _quantized(
        self, slot: Slot, index: int, entry: TensorEntry, spec: QTensor, place: PlacedWeight | PlacedArray | None
    ) -> QTensor:
        if place is None:
            layer = dataclasses.replace(read_quantized(self.source, entry, spec, self.transform), dtype=spec.dtype)
            for leaf in jax.tree.leaves(layer):
                self.digest.add_whole(np.asarray(leaf))
            return layer
        assert isinstance(place, PlacedWeight)
        rows = self.rows(slot, index)
        codes, constants = read_quantized_rows(self.source, entry, spec, rows, self.transform)
        self.digest.add(codes, rows)
        for leaf in constants.values():
            self.digest.add_whole(leaf)
        return place.put(codes, rows, constants)

    def _blocks(
        self, slot: Slot, index: int, entry: TensorEntry, spec: GgmlTensor, place: PlacedWeight | PlacedArray | None
    ) -> GgmlTensor:
        """The weight in blocks, the file's own or made here; the type of the blocks is part of the fingerprint."""
        rows, read = self.rows(slot, index), functools.partial(_stored_blocks, self.source, entry)
        if entry.file_type != spec.ggml_type:
            whole = self.transform(entry.name, read_finite(self.source, entry))
            read = functools.partial(_rows_of, nvfp4_blocks_of(whole, spec.ggml_type))
        own = read_own(read, rows)
        self.digest.name(spec.ggml_type)
        self.digest.add(own, rows)
        own = to_split_k(own, spec.ggml_type) if spec.layout == SPLIT_K else own
        codes = place.put(own, rows) if isinstance(place, PlacedArray) else jnp.array(own, copy=True)
        return dataclasses.replace(spec, codes=codes)

    def _dense(
        self, slot: Slot, index: int, entry: TensorEntry, spec: None, place: PlacedWeight | PlacedArray | None
    ) -> jax.Array:
        rows = self.rows(slot, index)
        own = aligned_empty((sum(end - first for first, end in rows.ranges), *entry.shape[1:]), slot.dtype)
        self.digest.add_pieces(self._pieces(entry, rows, own), rows)
        return place.put(own, rows) if isinstance(place, PlacedArray) else jnp.asarray(own)

    def _pieces(self, entry: TensorEntry, rows: ProcessRows, own: np.ndarray) -> Iterator[np.ndarray]:
        """Yields rows as the file has them, and writes each piece into `own`, so that no tensor is in memory twice."""
        whole = self.transform is not unchanged or len(entry.shape) < 2
        step = entry.rows if whole else max(1, SLICE // math.prod(entry.shape[1:]) // STRIP) * STRIP
        done = 0
        for first, end in rows.ranges:
            for start in range(first, max(end, first + 1), step):
                piece = self.transform(entry.name, _finite_rows(self.source, entry, start, min(start + step, end)))
                own[done : done + len(piece)] = piece
                done += len(piece)
                yield piece


# The type of a packed weight -> how it is read. Others are dense.
READERS: dict[type, Callable[..., Part]] = {QTensor: _Reader._quantized, GgmlTensor: _Reader._blocks}


def read_quantized(source: ModelSource, entry: TensorEntry, spec: QTensor, transform: Transform = unchanged) -> QTensor:
    """The weight in codes: unchanged if the file stores codes, otherwise transformed and quantized as in `spec`.

    Raises:
      ValueError: the weight is not finite, or the file stores it in another format than `spec`.
    """
    if entry.read_quantized is not None:
        return _stored(source, entry, spec)
    return _quantized(source, entry, (0, entry.rows), _settings_of(spec), transform)


def read_quantized_rows(
    source: ModelSource, entry: TensorEntry, spec: QTensor, rows: ProcessRows, transform: Transform = unchanged
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Some rows of a weight in codes, and the constants of the whole weight, to the bit those of `read_quantized`.

    All processes call this together.

    Returns:
      (codes of `rows`, concatenated; the weight's other leaves, in block order).
    """
    if entry.read_quantized is not None:
        stored = _stored(source, entry, spec)
        constants = {name: np.asarray(leaf) for name in CONSTANTS if (leaf := getattr(stored, name)) is not None}
        codes = np.asarray(stored.codes)
        return codes if rows.read_by_all else read_own(lambda first, end: codes[first:end], rows), constants
    settings = _settings_of(spec)
    alone = dataclasses.replace(settings, double_quant=False)
    made = [_quantized(source, entry, each, alone, transform) for each in rows.ranges]
    codes, absmax = (joined([np.asarray(getattr(each, name)) for each in made]) for name in ("codes", "absmax"))
    return codes, double_quantize(rows.of_all(absmax), settings)


def _stored(source: ModelSource, entry: TensorEntry, spec: QTensor) -> QTensor:
    assert entry.read_quantized is not None
    weight = entry.read_quantized()
    if wrong := _differing_settings(weight, spec):
        raise ValueError(
            f"{source.path}: {entry.name} is quantized with other settings than the model's other weights (found "
            f"{'; '.join(wrong)}). Use an undamaged file"
        )
    return weight


def _quantized(
    source: ModelSource, entry: TensorEntry, rows: tuple[int, int], settings: QuantSettings, transform: Transform
) -> QTensor:
    array = entry.read_rows(*rows)
    if transform is not unchanged:
        _check_finite(source, entry.name, array)
        array = transform(entry.name, array)
    try:
        return quantize(array, **dataclasses.asdict(settings))
    except ValueError:  # the quantizer detects non-finite values, but does not know the tensor's name
        _check_finite(source, entry.name, array, rows[0])
        raise


def _settings_of(spec: QTensor) -> QuantSettings:
    return QuantSettings(**{name: getattr(spec, name) for name in QUANTIZATION_FIELDS})


def _rows_of(array: np.ndarray, first: int, end: int) -> np.ndarray:
    return array[first:end]


def _stored_blocks(source: ModelSource, entry: TensorEntry, first: int, end: int) -> np.ndarray:
    assert entry.read_stored is not None
    weight = entry.read_stored(first, end)
    if not finite_scales(weight.codes, weight.ggml_type):
        raise ValueError(
            f"{source.path}: scales of {entry.name} are not finite ({weight.ggml_type}): the file is damaged, or was "
            "saved by a run that diverged. Use an undamaged file"
        )
    return weight.codes


def read_finite(source: ModelSource, entry: TensorEntry) -> np.ndarray:
    """Returns a tensor; raises ValueError if it is not finite."""
    return _finite_rows(source, entry, 0, entry.rows)


def _finite_rows(source: ModelSource, entry: TensorEntry, first: int, end: int) -> np.ndarray:
    array = entry.read_rows(first, end)
    _check_finite(source, entry.name, array, first)
    return array


def _check_finite(source: ModelSource, name: str, array: np.ndarray, first_row: int = 0) -> None:
    flat = array.reshape(-1)
    if all(np.isfinite(flat[start : start + SLICE]).all() for start in range(0, flat.size, SLICE)):
        return
    bad = np.argwhere(~np.isfinite(array))
    place = [int(bad[0][0]) + first_row, *bad[0][1:].tolist()]
    raise ValueError(
        f"{source.path}: {len(bad)} of {array.size} elements of {name} are not finite, the first is "
        f"{array[tuple(bad[0])]} at {place}: the file is damaged, or was saved by a run that diverged"
    )


def _settings(config: ModelConfig, weights: WeightFormat) -> bytes:
    # `dense` and `stored` are left out because the tensors themselves show the format of each layer.
    left_out = ("platform", "dtype", "dense", "stored", "experts_on_host")
    quantization = {key: value for key, value in dataclasses.asdict(weights).items() if key not in left_out}
    if weights.quant_type == STORED:
        quantization = {"quant_type": STORED}
    settings = {"config": config.fingerprint_features(), "weights": quantization}
    return json.dumps(settings, sort_keys=True).encode()
