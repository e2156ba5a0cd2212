"""Adapters that start with a part of the weights (PiSSA, LoftQ), and the base without that part.

RUN/initial.safetensors stores the initial adapter. With it, the base is rebuilt from the model's files, and the trained
adapter can be exported as a change of the original model.

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from qlora_jax.atomic_files import write_bytes
from qlora_jax.config import LoraArgs
from qlora_jax.io.loading.loader import Transform
from qlora_jax.io.loading.tensor_map import layer_name
from qlora_jax.io.run_folder.digests import ArrayDigest, array_digest, changes, tree_digests
from qlora_jax.line_digests import warn_without_digests
from qlora_jax.metadata import decode_json
from qlora_jax.model_source import ModelSource
from qlora_jax.models.add_adapters import Factors, our_names
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.ranks import ranks_and_scalings
from qlora_jax.models.target_layers import target_layers
from qlora_jax.nn.linear import named_key
from qlora_jax.quant import dequantize, pissa_loftq, quantize

FILE = "initial.safetensors"
FACTORS, SUBTRACTED = "factors", "taken"  # the first parts of names in the file
LEAVES = ("lora_a", "lora_b")  # the last parts
DIGESTS = "digests"  # the key of the tensors' digests in the file's metadata
COPY_IT = "Copy the file from where the run was trained, or from a backup"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitialAdapter:
    """Initial A and B by our names: {"model.layers.mlp.up_proj": {"lora_a": [L, K, R], "lora_b": [L, R, N]}}.

    Attributes:
      factors: the initial values of A and B.
      subtracted: the A and B whose scaled product was subtracted from the base; empty if the base is unchanged.
    """

    factors: Factors
    subtracted: Factors


@dataclasses.dataclass(frozen=True)
class AdaptedTensor:
    """A tensor that gets an adapter: our name of its projection, the adapter's row in its stack, rank and scaling.

    Attributes:
      rows: the number of rows of the stack, one per layer with an adapter.
    """

    name: str
    row: int
    rows: int
    rank: int
    scaling: float


def adapted_tensors(config: ModelConfig, spec: LoraArgs) -> dict[str, AdaptedTensor]:
    """The tensors that get an adapter, by Hugging Face's name."""
    ours = our_names(config)
    found, layers_of = ranks_and_scalings(config, spec), target_layers(config, spec)
    return {
        f"{layer_name(name, layer)}.weight": AdaptedTensor(ours[name], row, len(layers_of[name]), rank, scaling)
        for name, (rank, scaling) in found.items()
        for row, layer in enumerate(layers_of[name])
    }


def check_decomposable(source: ModelSource, spec: LoraArgs) -> None:
    """Checks that a model's weights can be decomposed, if `spec` requires it.

    Raises:
      ValueError: the weights are already quantized.
    """
    if spec.init != "default" and any(entry.read_quantized for entry in source.tensors.values()):
        raise ValueError(
            f"lora.init={spec.init}: {source.path} is already quantized, so the original weights are not known. Give "
            "the 16-bit model, or set lora.init=default"
        )


class WeightDecomposer:
    """A transform for `load_model` that splits weights into an adapter and a rest, and collects the adapter.

    Args:
      config: the model.
      weights: the format that the rest is quantized to; LoftQ minimizes its error.
      spec: the adapter's settings.
      key: the random key of the randomized SVD.
    """

    def __init__(self, config: ModelConfig, weights: WeightFormat, spec: LoraArgs, key: jax.Array):
        self._tensors, self._spec, self._key = adapted_tensors(config, spec), spec, key
        self._split = pissa_loftq.pissa
        if spec.init == "loftq":
            round_trip = functools.partial(_round_trip, weights=weights)
            self._split = functools.partial(pissa_loftq.loftq, iterations=spec.loftq_iterations, round_trip=round_trip)
        self._factors: dict[str, dict[str, np.ndarray]] = {}
        self._subtracted: dict[str, dict[str, np.ndarray]] = {}

    def __call__(self, name: str, weight: np.ndarray) -> np.ndarray:
        """Returns the rest of a tensor; the tensor itself if it gets no adapter."""
        if name not in self._tensors:
            return weight
        tensor, spec = self._tensors[name], self._spec
        key = named_key(self._key, name)
        how = pissa_loftq.Decomposition(tensor.rank, tensor.scaling, spec.svd_niter, spec.dtype, key)
        split = self._split(weight.astype(np.float32), how)
        self._store(self._factors, tensor, split.initial)
        if split.subtracted is not None and split.subtracted is not split.initial:
            self._store(self._subtracted, tensor, split.subtracted)
        return split.residual

    def _store(
        self, stacks: dict[str, dict[str, np.ndarray]], tensor: AdaptedTensor, factors: pissa_loftq.Factors
    ) -> None:
        for leaf, values in factors._asdict().items():
            shape = (tensor.rows, *values.shape)
            stack = stacks.setdefault(tensor.name, {}).setdefault(leaf, np.zeros(shape, np.float32))
            stack[tensor.row] = values

    def initial_adapter(self) -> InitialAdapter:
        """The adapter of all tensors; complete after they have been loaded."""
        pissa = self._spec.init == "pissa"
        return InitialAdapter(factors=self._factors, subtracted=self._factors if pissa else self._subtracted)


def _round_trip(weight: np.ndarray, weights: WeightFormat) -> jax.Array:
    """The f32 weight after it is quantized and dequantized."""
    settings = {name: getattr(weights, name) for name in ("block_size", "double_quant", "nested_block_size")}
    return dequantize(quantize(weight, quant_type=str(weights.quant_type), **settings), np.float32)


def subtract_initial(initial: InitialAdapter, config: ModelConfig, spec: LoraArgs) -> Transform:
    """A transform for `load_model` that gives bit-identical rests to those of `WeightDecomposer`.

    Raises:
      ValueError: the initial adapter does not fit the model.
    """
    tensors = adapted_tensors(config, spec)
    _check_fits(initial, config, tensors)

    def rest(name: str, weight: np.ndarray) -> np.ndarray:
        tensor = tensors.get(name)
        if tensor is None or tensor.name not in initial.subtracted:
            return weight
        stacks = initial.subtracted[tensor.name]
        a_KR, b_RN = (np.asarray(stacks[leaf][tensor.row]) for leaf in ("lora_a", "lora_b"))
        return pissa_loftq.residual(weight.astype(np.float32), pissa_loftq.Factors(a_KR, b_RN), tensor.scaling)

    return rest


def write_initial(run: Path, initial: InitialAdapter) -> None:
    """Writes RUN/initial.safetensors with the digests of its tensors, completely or not at all."""
    tensors = {
        f"{kind}/{name}/{leaf}": values
        for kind, factors in ((FACTORS, initial.factors), (SUBTRACTED, initial.subtracted))
        for name, leaves in factors.items()
        for leaf, values in leaves.items()
        if kind == FACTORS or factors is not initial.factors
    }
    write_tensors(run / FILE, tensors)


def write_tensors(path: Path, tensors: Mapping[str, jax.Array | np.ndarray]) -> None:
    """Writes a safetensors file with the digests of its tensors, completely or not at all."""
    found = {name: np.ascontiguousarray(np.asarray(values)) for name, values in tensors.items()}
    digests = {name: array_digest(values) for name, values in found.items()}
    write_bytes(path, save(found, {DIGESTS: json.dumps(digests)}))


def read_initial(run: Path, spec: LoraArgs) -> InitialAdapter | None:
    """Reads the initial adapter of a run; None if the run's adapters did not start with a part of the weights.

    Raises:
      ValueError: the file is missing or damaged.
    """
    if spec.init == "default":
        return None
    path = run / FILE
    if not path.is_file():
        raise ValueError(
            f"{path}: missing, and the base of a run with lora.init={spec.init} cannot be rebuilt without it. {COPY_IT}"
        )
    tensors = read_tensors(path)
    found = {FACTORS: _tree(path, tensors, FACTORS), SUBTRACTED: _tree(path, tensors, SUBTRACTED)}
    subtracted = found[FACTORS] if spec.init == "pissa" else found[SUBTRACTED]
    return InitialAdapter(factors=found[FACTORS], subtracted=subtracted)


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Reads a file of `write_tensors` in a run's folder.

    Raises:
      ValueError: the file is damaged.
    """
    tensors, digests = _read_file(path)
    if digests is None:
        warn_without_digests(path.parent)
    elif differences := changes(tree_digests(tensors), digests):
        raise ValueError("\n  ".join([f"{path}: damaged, these tensors are not as saved. {COPY_IT}:", *differences]))
    return tensors


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, ArrayDigest] | None]:
    """Reads (the tensors, their digests); None for a file from before there were digests.

    Raises:
      ValueError: it is not a safetensors file, or is cut off.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        digests = decode_json(metadata[DIGESTS], dict[str, ArrayDigest], DIGESTS) if DIGESTS in metadata else None
    except (SafetensorError, TypeError, ValueError) as error:  # TypeError: of a dtype that NumPy does not have
        raise ValueError(f"{path}: damaged: {error}. {COPY_IT}") from error
    return tensors, digests


def _tree(path: Path, tensors: Mapping[str, np.ndarray], kind: str) -> Factors:
    """Returns the A and B of one kind by our names."""
    tree: dict[str, dict[str, np.ndarray]] = {}
    for key, values in tensors.items():
        start, _, rest = key.partition("/")
        name, _, leaf = rest.rpartition("/")
        if start not in (FACTORS, SUBTRACTED) or leaf not in LEAVES:
            raise ValueError(f"{path}: damaged: {key!r} is not the name of an initial tensor. {COPY_IT}")
        if start == kind:
            tree.setdefault(name, {})[leaf] = values
    return tree


def _check_fits(initial: InitialAdapter, config: ModelConfig, tensors: Mapping[str, AdaptedTensor]) -> None:
    """Checks that an initial adapter has the projections and shapes of a model's adapters.

    Raises:
      ValueError: it does not; names each projection that differs.
    """
    expected = {}
    for tensor in tensors.values():
        (n, k), _ = config.linear_shapes()[tensor.name.removeprefix("model.layers.")]
        layers, rank = tensor.rows, tensor.rank
        expected[tensor.name] = {"lora_a": (layers, k, rank), "lora_b": (layers, rank, n)}
    lines = []
    for kind, factors in ((FACTORS, initial.factors), (SUBTRACTED, initial.subtracted)):
        found = {name: {leaf: np.shape(values) for leaf, values in leaves.items()} for name, leaves in factors.items()}
        names = expected.keys() | found.keys() if kind == FACTORS else found.keys()
        lines += [
            f"  {kind}/{name}: found {found.get(name)}, expected {expected.get(name)}"
            for name in sorted(names)
            if found.get(name) != expected.get(name)
        ]
    if lines:
        raise ValueError("\n".join([f"{FILE}: does not fit the model. {COPY_IT}:", *lines]))
