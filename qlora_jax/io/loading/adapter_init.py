"""Adapters that start with a part of the weights (PiSSA, LoftQ), and the base without that part.

RUN/initial.safetensors stores the initial adapter (io/initial_file.py).

Dimension key: L layers, K in, R rank, N out.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import numpy as np

from qlora_jax.config import LoraArgs
from qlora_jax.io.initial_file import COPY_IT, FACTORS, FILE, SUBTRACTED, InitialAdapter
from qlora_jax.io.loading.loader import Transform
from qlora_jax.methods.method import our_names
from qlora_jax.methods.targets import ranks_and_scalings, target_layers
from qlora_jax.model_source import ModelSource
from qlora_jax.models.config import ModelConfig, WeightFormat
from qlora_jax.models.tensor_names import layer_name
from qlora_jax.nn.random_keys import named_key
from qlora_jax.quant import dequantize, pissa_loftq, quantize


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
