"""Vector-based random matrix adaptation, VeRA (Kopiczko et al., 2024): all projections share frozen random A and B.

Dimension key: L layers, B rows of the batch, M tokens, K in, N out, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key
from pydantic import Field

from pallas_kernels.dense_matmul import dot_nn, dot_nt, dot_tn
from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work
from qlora_jax.methods.low_rank_cost import low_rank_work, ranked_projections, saved_products
from qlora_jax.methods.method import Given, Method, linears, target_shapes
from qlora_jax.methods.peft_form import (
    NO_ARRAYS,
    PeftFile,
    PeftForm,
    PeftKeys,
    PeftLeaf,
    ReadAdapter,
    TrainedAdapter,
    check_fits,
    common_config,
    setting_differences,
    stack_layers,
)
from qlora_jax.methods.peft_names import suffixes_of
from qlora_jax.methods.targets import projection_layers, target_layers
from qlora_jax.model_source import TensorEntry
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.dropout import apply_dropout
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter
from qlora_jax.nn.lora import adapter_deltas
from qlora_jax.nn.variables import Frozen, TrainedLeaf
from qlora_jax.untrusted_json import JsonObject

A, B = "vera_A", "vera_B"  # PEFT's names of the frozen matrices


def draw_projections(seed: int, rank: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draws A and B as PEFT does for `projection_prng_key`, to the bit.

    Both are uniform in +-sqrt(6 / columns). Numbers come from torch's generator, the Mersenne Twister, with 24 bits
    each. NumPy promises never to change this stream.

    Args:
      shape: (N, K) of the largest projection, in each of the two sizes.
    """
    twister = np.random.RandomState(seed)
    n, k = shape
    return _draw(twister, rank, k), _draw(twister, n, rank)


def _draw(twister: np.random.RandomState, rows: int, columns: int) -> np.ndarray:
    bound = np.float32(math.sqrt(3) * (math.sqrt(2) / math.sqrt(columns)))
    bits = twister.randint(0, 1 << 32, size=(rows, columns), dtype=np.uint32) & np.uint32((1 << 24) - 1)
    return (bits * 2.0**-24 * np.float64(bound + bound) - np.float64(bound)).astype(np.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def vera_deltas(
    x_MK: Float[Array, "M K"],
    a_KR: Float[Array, "K R"],
    bs: tuple[Float[Array, "_ R"], ...],
    lambda_ds: tuple[Float[Array, " R"], ...],
    lambda_bs: tuple[Float[Array, " _"], ...],
    dropout: float,
    keys_B: Key[Array, " B"] | None,
) -> tuple[Float[Array, "M _"], ...]:
    """Returns lambda_b_i * ((lambda_d_i * dropout(x) A) B_i^T) for each i, in x's dtype; sums are in f32.

    All i share the product with A and the dropout mask. A and B get no gradient, so the backward pass saves x A and not
    x.

    Args:
      a_KR: A^T.
      bs: the rows of B for each i, [N_i, R].
      lambda_ds: f32, one per i.
      lambda_bs: f32 [N_i], one per i.
      dropout: probability that an element of x is zeroed.
      keys_B: the dropout key of each row of the batch; None: no dropout.
    """
    return _forward(x_MK, a_KR, bs, lambda_ds, lambda_bs, dropout, keys_B)[0]


def _scaled(x: jax.Array, vector: jax.Array) -> jax.Array:
    """Multiplies columns by a vector in f32, rounded to x's dtype."""
    return (x.astype(jnp.float32) * vector[None]).astype(x.dtype)


def _forward(x_MK, a_KR, bs, lambda_ds, lambda_bs, dropout, keys_B):
    dtype = x_MK.dtype
    xa_MR = dot_nn(apply_dropout(x_MK, dropout, keys_B), a_KR.astype(dtype), dtype)
    rows = zip(bs, lambda_ds, lambda_bs, strict=True)
    ys = tuple(_scaled(dot_nt(_scaled(xa_MR, d), b.astype(dtype), dtype), lambda_b) for b, d, lambda_b in rows)
    return ys, (checkpoint_name(xa_MR, "lora_xa"), a_KR, bs, lambda_ds, lambda_bs, keys_B)


def _backward(dropout, residuals, dys):
    xa_MR, a_KR, bs, lambda_ds, lambda_bs, keys_B = residuals
    dtype, d_xas, d_ds, d_bs = xa_MR.dtype, [], [], []
    for dy_MN, b_NR, d_R, b_N in zip(dys, bs, lambda_ds, lambda_bs, strict=True):
        b_NR = b_NR.astype(dtype)
        d_scaled_MR = dot_nn(_scaled(dy_MN, b_N), b_NR)
        d_ds.append(jnp.sum(xa_MR.astype(jnp.float32) * d_scaled_MR, axis=0))
        d_bs.append(jnp.sum(dot_tn(_scaled(xa_MR, d_R), dy_MN) * b_NR.T.astype(jnp.float32), axis=0))
        d_xas.append(d_scaled_MR * d_R[None])
    d_xa_MR = functools.reduce(jnp.add, d_xas)
    dx_MK = apply_dropout(dot_nt(d_xa_MR.astype(dtype), a_KR.astype(dtype), dtype), dropout, keys_B)
    return dx_MK, None, None, tuple(d_ds), tuple(d_bs), None


vera_deltas.defvjp(_forward, _backward)


class VeRA(LinearAdapter):
    """y = x W^T + b + lambda_b * ((lambda_d * dropout(x) A) B^T); PEFT's VeRA.

    `lambda_d` [L, R] and `lambda_b` [L, N] train in f32. Inside the scan over layers they have one layer each. A and B
    are frozen Variables that all adapters of a model share: `a` [K, R] and `b` [N, R] of the largest K and N, of which
    each adapter takes the first rows.
    """

    LEAVES = (TrainedLeaf("lambda_d", vector=True), TrainedLeaf("lambda_b", vector=True))
    SAVED = ("lora_xa",)

    def __init__(
        self, lambda_d: Float[Array, "*L R"], lambda_b: Float[Array, "*L N"], a: Frozen, b: Frozen, dropout: float
    ):
        self.lambda_d = nnx.LoRAParam(lambda_d)
        self.lambda_b = nnx.LoRAParam(lambda_b)
        self.a = a
        self.b = b
        self.dropout = dropout

    @classmethod
    def init(cls, stack: int, out_features: int, a: Frozen, b: Frozen, *, d_initial: float, dropout: float) -> "VeRA":
        """Creates adapters that change nothing for `stack` layers: lambda_b is zero."""
        lambda_d = jnp.full((stack, a.get_value().shape[1]), d_initial, jnp.float32)
        return cls(lambda_d, jnp.zeros((stack, out_features), jnp.float32), a, b, dropout)

    @staticmethod
    def apply(
        adapters: "Sequence[VeRA]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns each layer's result; without dropout, all layers share the product with A."""
        ys = [one(x_MK) for one in frozen]
        with jax.named_scope("lora"):
            deltas = adapter_deltas(adapters, x_MK, keys, _deltas)
            return [y + delta for y, delta in zip(ys, deltas, strict=True)]

    @property
    def own_b(self) -> Float[Array, "N R"]:
        """The rows of B that the adapter takes."""
        return self.b[...][: self.lambda_b[...].shape[-1]]

    def select_layer(self, layer: int) -> "VeRA":
        """Returns the adapter of one layer of the stack."""
        return VeRA(self.lambda_d[...][layer], self.lambda_b[...][layer], self.a, self.b, self.dropout)

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns W + (lambda_b B) (lambda_d A), in f32."""
        a_KR, b_NR = (each.astype(jnp.float32) for each in (self.a[...][: weight.shape[1]], self.own_b))
        delta_NK = dot_nt(self.lambda_b[...][:, None] * b_NR * self.lambda_d[...][None], a_KR)
        return weight.astype(jnp.float32) + delta_NK


def _deltas(
    adapters: Sequence[VeRA], x_MK: jax.Array, dropout: float, keys_B: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Returns the changes of several adapters for one x, with one dropout mask."""
    a_KR = adapters[0].a[...][: x_MK.shape[1]]
    bs = tuple(adapter.own_b for adapter in adapters)
    lambda_ds = tuple(adapter.lambda_d[...] for adapter in adapters)
    lambda_bs = tuple(adapter.lambda_b[...] for adapter in adapters)
    return vera_deltas(x_MK, a_KR, bs, lambda_ds, lambda_bs, dropout, keys_B)


def largest_shape(config: ModelConfig, spec: LoraArgs) -> tuple[int, int]:
    """Returns the largest N and the largest K of the targeted projections."""
    shapes = target_shapes(config, spec).values()
    return max(n for n, _ in shapes), max(k for _, k in shapes)


class VeRAKeys(PeftKeys, total=False):
    """The settings of PEFT's VeraConfig."""

    r: Annotated[int, Field(ge=0, le=1 << 16)]
    vera_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    projection_prng_key: Annotated[int, Field(ge=0, lt=1 << 32)]
    save_projection: bool


class VeRAForm(PeftForm):
    """PEFT's VERA: vera_lambda_b [N] and vera_lambda_d [R], and once vera_A [R, K] and vera_B [N, R]."""

    keys = VeRAKeys
    required = ("r",)
    unused = ("init_weights", "d_initial")
    leaves: ClassVar[Mapping[str, PeftLeaf]] = {
        "lambda_b": PeftLeaf("vera_lambda_b"),
        "lambda_d": PeftLeaf("vera_lambda_d"),
    }
    reads_exclude_modules = False

    def describe(self, config: JsonObject) -> str:
        """Returns what an adapter is."""
        return "A VeRA adapter"

    def config(self, adapter: TrainedAdapter, base: str) -> JsonObject:
        """Returns adapter_config.json."""
        return common_config(adapter, base) | {
            "peft_type": "VERA",
            "r": adapter.args.rank,
            "vera_dropout": adapter.args.dropout,
            "projection_prng_key": adapter.args.projection_prng_key,
            "save_projection": True,
            "d_initial": adapter.args.d_initial,
            "bias": "none",
            "init_weights": True,
        }

    def tensors(self, adapter: TrainedAdapter) -> dict[str, np.ndarray]:
        """Returns the vectors of each layer, and A and B."""
        return super().tensors(adapter) | {_in_file(name): values for name, values in adapter.frozen.items()}

    def problems(self, config: VeRAKeys) -> list[str]:
        """Lists a rank of 0."""
        return ["r: found 0, expected at least 1"] if config.get("r") == 0 else []

    def read(self, file: PeftFile[VeRAKeys]) -> ReadAdapter:
        """Reads the vectors, and A and B if they are not those that the settings draw, to the bit.

        An adapter without them (save_projection=false) has the drawn ones, as in PEFT.
        """
        found = {name: entry for entry in file.tensors for name in (A, B) if entry.name == _in_file(name)}
        layers = [entry for entry in file.tensors if entry not in found.values()]
        lora = stack_layers(dataclasses.replace(file, tensors=layers), self)
        assert "r" in file.config  # required
        args = LoraArgs(
            method="vera",
            rank=file.config["r"],
            dropout=file.config.get("vera_dropout") or 0.0,
            target_modules=suffixes_of(lora, file.model),
            projection_prng_key=file.config.get("projection_prng_key", 0),
        )
        ranks = {name: leaves["lambda_d"].shape[-1] for name, leaves in lora.items()}
        problems = [f"{name}: rank {rank}, expected r={args.rank}" for name, rank in ranks.items() if rank != args.rank]
        if found or file.config.get("save_projection", True):
            n, k = largest_shape(file.model, args)
            problems += _matrix_problems(found, {A: (args.rank, k), B: (n, args.rank)}, args.rank)
        check_fits(file.folder, problems)
        own = {name: np.asarray(entry.read(), np.float32) for name, entry in found.items()}
        drawn = METHOD.frozen_arrays(file.model, args) if own else {}
        same = all(np.array_equal(own[name], drawn[name]) for name in own)
        return ReadAdapter(lora, args, NO_ARRAYS if same else own)

    def shapes(self, first: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> Mapping[str, tuple[int, ...]]:
        """Returns the shapes of a layer's vectors."""
        return {**first, "lambda_b": (shape[0],)}

    def differences(self, ours: LoraArgs, of_adapter: LoraArgs, model: ModelConfig) -> list[str]:
        """Lists settings that draw other matrices."""
        return setting_differences(("rank", "projection_prng_key"), ours, of_adapter)


def _in_file(name: str) -> str:
    return f"base_model.{name}"


def _matrix_problems(found: Mapping[str, TensorEntry], least: Mapping[str, tuple[int, int]], rank: int) -> list[str]:
    """Describes the matrices that are missing or smaller than `least`, or have another rank."""
    problems = []
    for rank_axis, (name, (rows, columns)) in enumerate(least.items()):
        shape = found[name].shape if name in found else None
        if shape is None:
            problems.append(f"{_in_file(name)} is missing")
        elif len(shape) != 2 or shape[rank_axis] != rank or shape[0] < rows or shape[1] < columns:
            problems.append(
                f"{_in_file(name)}: shape {list(shape)}, expected at least {[rows, columns]}, of rank {rank}"
            )
    return problems


SAME_INPUT = (  # projections that read the same x
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


def _with_own_product(names: Collection[str], spec: LoraArgs) -> list[str]:
    """Returns the projections with a product x A; those that read the same x share it, unless their masks differ."""
    sharing = () if spec.dropout else ([name for name in group if name in names] for group in SAME_INPUT)
    others = {name for group in sharing for name in group[1:]}
    return [name for name in names if name not in others]


class VeRAMethod(Method):
    """VeRA on projections."""

    peft = VeRAForm()

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns the layers with adapters."""
        return AdapterShape({name: one.layers for name, one in ranked_projections(config, spec).items()})

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns the work of x A and (x A) B^T, whose A and B take no gradient."""
        every = ranked_projections(sizes.model, sizes.lora)
        return (low_rank_work(sizes, every, {}, trains_a=False, down=_with_own_product(every, sizes.lora)),)

    def saved(self, sizes: StepSizes) -> dict[str, int]:
        """Returns the bytes of x A, which takes the place of x."""
        every = ranked_projections(sizes.model, sizes.lora)
        return saved_products(sizes, {name: every[name] for name in _with_own_product(every, sizes.lora)}, {})

    def frozen_arrays(self, config: ModelConfig, spec: LoraArgs) -> dict[str, np.ndarray]:
        """Returns A [R, K] and B [N, R], which all targeted projections share, in f32."""
        drawn = draw_projections(spec.projection_prng_key, spec.rank, largest_shape(config, spec))
        return dict(zip((A, B), drawn, strict=True))

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Collection[str]:
        """Returns the targeted projections."""
        return target_layers(config, spec)

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds vectors to each targeted projection, and A and B, which they share, to the base."""
        shapes = target_shapes(model.config, spec)
        frozen = given.frozen or self.frozen_arrays(model.config, spec)
        dtype = model.model.embed_tokens.weight.get_value().dtype
        shared = Frozen(jnp.asarray(frozen[A].T, dtype)), Frozen(jnp.asarray(frozen[B], dtype))
        stacks, known = projection_layers(model.config), dict(linears(model))
        for name, (n, _) in shapes.items():
            known[name].adapter = VeRA.init(
                len(stacks[name]), n, *shared, d_initial=spec.d_initial, dropout=spec.dropout
            )


METHOD = VeRAMethod()
