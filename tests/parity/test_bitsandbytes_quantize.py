"""Thousands of weights through bitsandbytes itself and through both quantizers, in one process of the oracle.

Equal to the bit: codes, absmax, and all double-quantized constants. Under jit, where compiling is what takes the time,
the double-quantized settings alone.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.formats.dequantize import dequantize_numpy
from pallas_kernels.formats.layouts import repack
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.tables import MIDPOINTS
from qlora_jax import quant
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from tests.io.gguf_families import FAMILIES, random_tensors
from tests.io.tiny_models import write_folder

SCRIPT = Path(__file__).resolve().parent.parent / "oracle/bnb_quantize.py"
COUNT = 30  # weights in a group

Weights = np.ndarray  # f32 [COUNT, *shape]


def powers(rng: np.random.Generator, low: float, high: float, rank: int = 2) -> np.ndarray:
    """A scale for each weight, its logarithm even between the bounds."""
    return 10.0 ** rng.uniform(low, high, (COUNT, *[1] * rank))


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal((COUNT, *shape))


def bounded(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return np.clip(0.3 * normal(rng, *shape), -1, 1)


def random_scales(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return normal(rng, 16, 256) * powers(rng, -4, 2)


def long_rows(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return normal(rng, 2, 8192)


def many_blocks(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    """More than one nested block, the last one partial."""
    return normal(rng, 37, 512) * powers(rng, -2, 0)


def zero_blocks(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    """About a third of the blocks are zeros; in the first weight all are."""
    blocks = normal(rng, 8, 4, 64) * (rng.random((COUNT, 8, 4, 1)) > 0.3)
    blocks[0] = 0
    return blocks.reshape(COUNT, 8, 256)


def around_midpoints(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    """Values on the midpoints of the table and one ulp to either side, in blocks of absmax 1 and -1."""
    on = rng.choice(MIDPOINTS[quant_type], (COUNT, 8, 128))
    towards = on + rng.integers(-1, 2, on.shape).astype(np.float32)
    values = np.nextafter(on, towards)
    values[:, :, 0], values[:, :, 64] = 1, -1
    return values


def exact_ties(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    """Scaled by powers of two, the midpoints stay midpoints."""
    return around_midpoints(rng, quant_type) * 2.0 ** rng.integers(-20, 20, (COUNT, 1, 1))


def near_ties(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return around_midpoints(rng, quant_type) * powers(rng, -3, 3)


def tiny(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return bounded(rng, 8, 128) * powers(rng, -36, -29)


def subnormal(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return bounded(rng, 8, 128) * powers(rng, -46, -36)


def huge(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return bounded(rng, 8, 128) * powers(rng, 30, 36)


def subnormal_among_normal(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    weights = bounded(rng, 8, 128)
    small = 10.0 ** rng.uniform(-46, -36, weights.shape)
    return np.where(rng.random(weights.shape) < 0.3, small * weights, weights) * powers(rng, -2, 6)


def vector(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    return normal(rng, 333)


def partial_rows(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    """Rows that end within a block; 100 % 16 != 0, for which the oracle's CPU kernel is correct."""
    return normal(rng, 7, 100)


def odd_counts(rng: np.random.Generator, quant_type: str) -> np.ndarray:
    weights = normal(rng, 3, 5, 7)
    weights[0] = 0
    return weights


# (weights, block size, dtype); every row is tried with both tables, double-quantized or not.
GROUPS: list[tuple[Callable[[np.random.Generator, str], np.ndarray], int, str]] = [
    (random_scales, 32, "float32"),
    (random_scales, 64, "float32"),
    (random_scales, 64, "float16"),
    (random_scales, 64, "bfloat16"),
    (random_scales, 256, "float32"),
    (long_rows, 4096, "float32"),
    (long_rows, 2048, "bfloat16"),
    (many_blocks, 64, "float32"),
    (zero_blocks, 64, "float32"),
    (exact_ties, 64, "float32"),
    (near_ties, 64, "float32"),
    (tiny, 64, "float32"),
    (subnormal, 64, "float32"),
    (huge, 64, "float32"),
    (subnormal_among_normal, 64, "float32"),
    (vector, 64, "float32"),
    (partial_rows, 64, "float32"),
    (odd_counts, 32, "bfloat16"),
]
# XLA on CPUs flushes subnormal products, so dequantization under jit is compared for the others.
FLUSHED_BY_XLA = (tiny, subnormal, odd_counts)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def bits(array: np.ndarray) -> np.ndarray:
    return np.asarray(array).reshape(-1).view(np.uint8)


def equal_bits(actual: np.ndarray, expected: np.ndarray) -> bool:
    return np.array_equal(bits(actual), bits(expected))


def numpy_differences(qt: QTensor, expected: dict[str, np.ndarray]) -> list[str]:
    """Names the leaves of a weight quantized in NumPy that are not bit-identical to the oracle's."""
    leaves = [name for name in expected if name != "weights"]
    different = [name for name in leaves if not equal_bits(getattr(qt, name), expected[name])]
    # By value: bitsandbytes' kernels differ in the sign of FP4's second zero.
    if not np.array_equal(dequantize_numpy(qt).astype(np.float32), expected["weights"]):
        different.append("weights")
    return different


def jit_differences(weight: np.ndarray, settings: dict, qt: QTensor, flushed: bool) -> list[str]:
    """Names the leaves in which jit differs from NumPy."""
    in_jit = quant.quantize(weight, **settings)
    equal = map(equal_bits, jax.tree.leaves(in_jit), jax.tree.leaves(qt))
    different = [] if all(equal) else ["quantize"]
    if not flushed and not np.array_equal(np.asarray(quant.dequantize(in_jit)), dequantize_numpy(qt)):
        different.append("dequantize")
    return different


def differences(weight: np.ndarray, settings: dict, expected: dict[str, np.ndarray], flushed: bool) -> list[str]:
    """Names everything in which one weight differs from the oracle, or jit from NumPy."""
    qt = quant.quantize_numpy(weight, **settings)
    in_jit = jit_differences(weight, settings, qt, flushed) if settings["double_quant"] else []
    return in_jit + numpy_differences(qt, expected)


def make_groups() -> dict[str, tuple[np.ndarray, dict, str, bool]]:
    """name -> (weights [COUNT, *shape] in their dtype, settings, dtype, whether XLA would flush products)."""
    rng, groups = np.random.default_rng(20260), {}
    for (make, block_size, dtype), quant_type, double_quant in itertools.product(GROUPS, ("nf4", "fp4"), (False, True)):
        name = f"{make.__name__}-{block_size}-{dtype}-{quant_type}-{'double' if double_quant else 'single'}"
        settings = {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
        weights = make(rng, quant_type).astype(np.float32).astype(DTYPES[dtype])
        groups[name] = (weights, settings, dtype, make in FLUSHED_BY_XLA)
    return groups


@pytest.mark.exhaustive
@pytest.mark.slow
def test_equals_bitsandbytes_on_thousands_of_weights(oracle) -> None:
    groups = make_groups()
    assert sum(len(weights) for weights, *_ in groups.values()) > 2000
    results = oracle(
        SCRIPT,
        settings={name: settings | {"dtype": dtype} for name, (_, settings, dtype, _) in groups.items()},
        **{
            name: weights.view(np.uint16) if dtype == "bfloat16" else weights
            for name, (weights, _, dtype, _) in groups.items()
        },
    )
    failures = []
    for name, (weights, settings, _, flushed) in groups.items():
        outputs = {key.removeprefix(f"{name}."): value for key, value in results.items() if key.startswith(f"{name}.")}
        for i, weight in enumerate(weights):
            expected = {key: value[i] for key, value in outputs.items()}
            if different := differences(weight, settings, expected, flushed):
                failures.append(f"{name}[{i}]: {', '.join(different)}")
    assert not failures, f"{len(failures)} weights differ:\n" + "\n".join(failures[:40])


@pytest.mark.slow
def test_ordinary_matrices_of_many_shapes_equal_bitsandbytes(oracle) -> None:
    """The last one has more constants than torch adds on one thread by itself."""
    rng, settings = np.random.default_rng(0), {"quant_type": "nf4", "block_size": 64, "double_quant": True}
    shapes = [(int(rng.integers(1, 300)), 64 * int(rng.integers(1, 24))) for _ in range(119)] + [(1100, 2048)]
    given = {f"{n}": 0.03 * rng.standard_normal((1, *shape), np.float32) for n, shape in enumerate(shapes)}
    results = oracle(SCRIPT, settings={name: settings | {"dtype": "float32"} for name in given}, **given)
    for name, (weight,) in given.items():
        expected = {key.removeprefix(f"{name}."): v[0] for key, v in results.items() if key.startswith(f"{name}.")}
        assert not numpy_differences(quant.quantize_numpy(weight, **settings), expected), weight.shape


@pytest.mark.slow
def test_each_expert_of_a_loaded_mixture_equals_bitsandbytes(oracle, tmp_path: Path) -> None:
    """Blocks, nested blocks and the offset end with each expert's matrix, as those of a single weight do."""
    config = FAMILIES["qwen3moe"][1] | {"moe_intermediate_size": 64}
    weights = {name: 3.0 ** (n % 5) * each for n, (name, each) in enumerate(random_tensors(config).items())}
    source = open_model(write_folder(tmp_path, config, weights))
    for nested in (False, True):
        model = load_model(
            source, model_config(source.config), WeightFormat(dtype="float32", double_quant=nested)
        ).model
        stacks = {
            name: getattr(model.model.layers.mlp.experts, name).weight.get_value()
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        settings = {"quant_type": "nf4", "block_size": 64, "double_quant": nested}
        given = {name: experts_of(weights, name, stack.stack_shape) for name, stack in stacks.items()}
        results = oracle(SCRIPT, settings={name: settings | {"dtype": "float32"} for name in given}, **given)
        for name, stack in stacks.items():
            outputs = {key.removeprefix(f"{name}."): v for key, v in results.items() if key.startswith(f"{name}.")}
            for index, place in enumerate(np.ndindex(*stack.stack_shape)):
                expert = repack(jax.tree.map(lambda leaf, at=place: np.asarray(leaf[at]), stack), "bnb")
                expected = {key: values[index] for key, values in outputs.items()}
                assert not numpy_differences(expert, expected), (name, place)


def experts_of(weights: dict[str, np.ndarray], name: str, stack: tuple[int, ...]) -> np.ndarray:
    """The matrices of all experts of a projection, by layer and expert."""
    names = (f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight" for layer, expert in np.ndindex(*stack))
    return np.stack([weights[each] for each in names])
