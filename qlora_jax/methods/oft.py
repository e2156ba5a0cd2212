"""Orthogonal finetuning, OFT (Qiu et al., 2023), which rotates the inputs of a frozen layer (OFTv2, Qiu et al., 2025).

The inputs are cut into blocks of S neighbours, and an S x S matrix R rotates each block. R is the Cayley transform of a
skew-symmetric Q, whose upper triangle trains: E = S (S - 1) / 2 numbers. All code handles R - I instead of R, so
that small rotations survive in bf16, and an adapter of zeros changes no bit.

Dimension key: L layers, M rows, K in, N out, C blocks, S block size, E trained numbers per block.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from pydantic import Field

from pallas_kernels.dense_matmul import dot_nn, dot_tn, row_major
from qlora_jax.config import LoraArgs
from qlora_jax.methods.adapter_cost import AdapterShape, StepSizes, Work, every_layer, within_layers
from qlora_jax.methods.method import Given, Method, linears, target_shapes
from qlora_jax.methods.peft_form import (
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
from qlora_jax.methods.targets import projection_layers
from qlora_jax.models.config import ModelConfig
from qlora_jax.models.decoder import CausalLM
from qlora_jax.nn.linear import FrozenLayer, LinearAdapter, Weight
from qlora_jax.nn.variables import TrainedLeaf
from qlora_jax.sharding import AnyMesh
from qlora_jax.untrusted_json import JsonObject, shorten


def block_elements(size: int) -> int:
    """Returns E, the numbers above the diagonal of a block."""
    return size * (size - 1) // 2


def block_size(elements: int) -> int:
    """Returns the S with S (S - 1) / 2 = `elements`."""
    return (1 + math.isqrt(1 + 8 * elements)) // 2


def skew_symmetric(upper: Float[Array, "*C E"]) -> Float[Array, "*C S S"]:
    """Returns Q in f32, with `upper` above its diagonal in row-major order and its negative below."""
    size = block_size(upper.shape[-1])
    rows, columns = np.triu_indices(size, 1)
    place, sign = np.zeros((size, size), np.int32), np.zeros((size, size), np.float32)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    sign[rows, columns], sign[columns, rows] = 1, -1
    taken = jnp.take(upper.astype(jnp.float32), place, axis=-1)
    return taken * jnp.broadcast_to(sign, taken.shape)


def _upper_gradient(d_skew: Float[Array, "*C S S"]) -> Float[Array, "*C E"]:
    """Returns the gradient of `upper` for that of Q: each number is in Q twice, with both signs."""
    rows, columns = np.triu_indices(d_skew.shape[-1], 1)
    return (d_skew - jnp.swapaxes(d_skew, -1, -2))[..., rows, columns]


def rotation_change(skew: Float[Array, "*C S S"], neumann_terms: int | None) -> Float[Array, "*C S S"]:
    """Returns R - I for Q, by PEFT's definitions.

    The exact one is R = (I - Q) (I + Q)^-1. The series approximates (I + Q) (I - Q)^-1, the same rotation backwards:
    I + 2 Q + 2 Q^2 + ... + Q^n, whose last power counts once. Its n is terms - 1, and at least 3; 2 terms are I + 2 Q.

    Args:
      neumann_terms: terms of the series, at least 2; None: the exact rotation.
    """
    if neumann_terms is None:
        identity = jnp.broadcast_to(jnp.eye(skew.shape[-1], dtype=skew.dtype), skew.shape)
        return jnp.swapaxes(jnp.linalg.solve(identity - skew, 2 * skew), -1, -2)
    change, power, last = 2 * skew, skew, last_power(neumann_terms)
    for exponent in range(2, last + 1):
        power = jnp.matmul(power, skew, precision=jax.lax.Precision.HIGHEST)
        change += power if exponent == last else 2 * power
    return change


def last_power(neumann_terms: int) -> int:
    """Returns the exponent of the series' last power."""
    return 1 if neumann_terms == 2 else max(3, neumann_terms - 1)


def _block_products(x_MK: jax.Array, blocks_CSS: jax.Array) -> jax.Array:
    """Returns x times the block-diagonal matrix, in f32; a single block is shared by all columns."""
    count, size, _ = blocks_CSS.shape
    if count == 1:
        return dot_nn(x_MK.reshape(-1, size), blocks_CSS[0]).reshape(x_MK.shape)
    return _joined(dot_nn(_cut(x_MK, count), blocks_CSS))


def _cut(x_MK: jax.Array, count: int) -> jax.Array:
    """Returns the columns of each block, [C, M, S]."""
    return row_major(jnp.swapaxes(x_MK.reshape(x_MK.shape[0], count, -1), 0, 1))


def _joined(x_CMS: jax.Array) -> jax.Array:
    return jnp.swapaxes(x_CMS, 0, 1).reshape(x_CMS.shape[1], -1)


def add_rotation(x: Float[Array, "M K"], change_CSS: Float[Array, "C S S"]) -> Float[Array, "M K"]:
    """Returns x R in x's dtype, rounded once, for R - I in `change_CSS`."""
    added = _block_products(x, change_CSS.astype(x.dtype))
    return (x.astype(jnp.float32) + added).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rotate(x_MK: Float[Array, "M K"], upper_CE: Float[Array, "C E"], neumann_terms: int | None) -> Float[Array, "M K"]:
    """Returns x R in x's dtype, where each block of columns has its Q, or all share the only one.

    The backward pass saves x and Q's triangle, and computes R again.
    """
    return _forward(x_MK, upper_CE, neumann_terms)[0]


def _change(skew_CSS: jax.Array, neumann_terms: int | None) -> jax.Array:
    with jax.named_scope("cayley"):
        return rotation_change(skew_CSS, neumann_terms)


def _forward(x_MK, upper_CE, neumann_terms):
    return add_rotation(x_MK, _change(skew_symmetric(upper_CE), neumann_terms)), (x_MK, upper_CE)


def _backward(neumann_terms, residuals, dy_MK):
    x_MK, upper_CE = residuals
    change_CSS, pull_back = jax.vjp(functools.partial(_change, neumann_terms=neumann_terms), skew_symmetric(upper_CE))
    count, size, _ = change_CSS.shape
    dx_MK = add_rotation(dy_MK, jnp.swapaxes(change_CSS, -1, -2))
    if count == 1:
        d_change_CSS = dot_tn(x_MK.reshape(-1, size), dy_MK.reshape(-1, size))[None]
    else:
        d_change_CSS = dot_tn(_cut(x_MK, count), _cut(dy_MK, count))
    (d_skew_CSS,) = pull_back(d_change_CSS)
    return dx_MK, _upper_gradient(d_skew_CSS).astype(upper_CE.dtype)


rotate.defvjp(_forward, _backward)


class OFT(LinearAdapter):
    """y = (x R) W^T + b with an orthogonal, block-diagonal R; PEFT's OFT.

    `oft_r` [L, C, E] is in f32 or bf16, the triangles of Q; C is 1 if all blocks share one. Inside the scan over layers
    it has one layer.
    """

    LEAVES = (TrainedLeaf("oft_r"),)

    def __init__(self, oft_r: Float[Array, "*L C E"], neumann_terms: int | None):
        self.oft_r = nnx.LoRAParam(oft_r)
        self.neumann_terms = neumann_terms

    @classmethod
    def init(cls, stack: int, blocks: int, size: int, *, neumann_terms: int | None, dtype: DTypeLike) -> "OFT":
        """Creates rotations by nothing for `stack` layers."""
        return cls(jnp.zeros((stack, blocks, block_elements(size)), dtype), neumann_terms)

    @staticmethod
    def apply(
        adapters: "Sequence[OFT]",
        x_MK: Float[Array, "M K"],
        frozen: Sequence[FrozenLayer],
        keys: Sequence[jax.Array | None],
    ) -> list[jax.Array]:
        """Returns each layer's result for its rotation of x; dropout does not apply."""
        results = []
        for adapter, one in zip(adapters, frozen, strict=True):
            with jax.named_scope("rotation"):
                rotated_MK = adapter._rotated(x_MK)
            results.append(one(rotated_MK))
        return results

    def _rotated(self, x_MK: jax.Array) -> jax.Array:
        return rotate(x_MK, self.oft_r[...], self.neumann_terms)

    def select_layer(self, layer: int) -> "OFT":
        """Returns the adapter of one layer of the stack."""
        return OFT(self.oft_r[...][layer], self.neumann_terms)

    def merge(self, weight: Float[Array, "N K"]) -> Float[Array, "N K"]:
        """Returns W R^T in f32."""
        change_CSS = rotation_change(skew_symmetric(self.oft_r[...]), self.neumann_terms)
        return add_rotation(weight.astype(jnp.float32), jnp.swapaxes(change_CSS, -1, -2))

    def for_decoding(self, weight: Weight, mesh: AnyMesh | None) -> "OFT":
        """Returns the adapter with its rotations computed once."""
        return InferenceOFT(self)


class InferenceOFT(OFT):
    """OFT with rotations computed once, for inference only. `rotation` [L, C, S, S] is R - I."""

    LEAVES = (*OFT.LEAVES, TrainedLeaf("rotation"))

    def __init__(self, adapter: OFT):
        super().__init__(adapter.oft_r[...], adapter.neumann_terms)
        self.rotation = nnx.LoRAParam(rotation_change(skew_symmetric(adapter.oft_r[...]), adapter.neumann_terms))

    def _rotated(self, x_MK: jax.Array) -> jax.Array:
        return add_rotation(x_MK, self.rotation[...])

    def for_decoding(self, weight: Weight, mesh: AnyMesh | None) -> "OFT":
        """Returns itself."""
        return self


def oft_blocks(config: ModelConfig, spec: LoraArgs) -> dict[str, tuple[int, int]]:
    """Returns {Hugging Face name: (trained blocks, block size)} of each projection whose inputs OFT rotates.

    One block trains if all share it.

    Raises:
      ValueError: the inputs of a projection are not a multiple of the blocks, or a pattern that matches nothing or only
        some layers of a stack.
    """
    setting, value = ("oft_blocks", spec.oft_blocks) if spec.oft_blocks else ("oft_block_size", spec.oft_block_size)
    inputs = {name: k for name, (_, k) in target_shapes(config, spec).items()}
    if single := [name for name, k in inputs.items() if k == spec.oft_blocks]:
        raise ValueError(
            f"lora.oft_blocks: found {value}, which makes blocks of 1 input in {', '.join(single)}, and these do not "
            "rotate. Set a smaller number of blocks."
        )
    if wrong := [f"{name} has {k} inputs" for name, k in inputs.items() if k % value]:
        raise ValueError(f"lora.{setting}: found {value}, but {'; '.join(wrong)}. Set it to a divisor of all of these.")
    counts = {name: (value, k // value) if spec.oft_blocks else (k // value, value) for name, k in inputs.items()}
    return {name: (1 if spec.block_share else count, size) for name, (count, size) in counts.items()}


PEFT_VERSION = "0.18.0"  # the first with this series, which PEFT warns about unless the file names such a version


class OFTKeys(PeftKeys, total=False):
    """The settings of PEFT's OFTConfig; r is the number of blocks, 0 if oft_block_size applies."""

    r: Annotated[int, Field(ge=0, le=1 << 16)]
    oft_block_size: Annotated[int, Field(ge=0, le=1 << 16)]
    block_share: bool | None
    use_cayley_neumann: bool | None
    num_cayley_neumann_terms: Annotated[int, Field(ge=2, le=1 << 8)]


class OFTForm(PeftForm):
    """PEFT's OFT: oft_R.weight [C, E]."""

    keys = OFTKeys
    required = ("oft_block_size",)
    unused = ("init_weights", "eps")  # eps: used only by coft
    leaves: ClassVar[Mapping[str, PeftLeaf]] = {"oft_r": PeftLeaf("oft_R.weight")}

    def describe(self, config: JsonObject) -> str:
        """Returns what an adapter is."""
        return "An OFT adapter"

    def config(self, adapter: TrainedAdapter, base: str) -> JsonObject:
        """Returns adapter_config.json."""
        args = adapter.args
        return common_config(adapter, base) | {
            "peft_type": "OFT",
            "r": args.oft_blocks,
            "oft_block_size": 0 if args.oft_blocks else args.oft_block_size,
            "block_share": args.block_share,
            "use_cayley_neumann": args.use_cayley_neumann,
            "num_cayley_neumann_terms": args.num_cayley_neumann_terms,
            "module_dropout": 0.0,
            "coft": False,
            "bias": "none",
            "init_weights": True,
            "peft_version": PEFT_VERSION,
        }

    def problems(self, config: OFTKeys) -> list[str]:
        """Lists blocks that are not given in one way, and a series of earlier versions of PEFT."""
        blocks, size, version = config.get("r", 0), config.get("oft_block_size", 0), config.get("peft_version")
        problems = []
        if bool(blocks) == bool(size) or size == 1:
            problems.append(
                f"r, oft_block_size: found {blocks} and {size}, expected one of them to be 0, the other above"
            )
        numbers = re.match(r"(\d{1,4})\.(\d{1,4})", version or "0.0")
        if config.get("use_cayley_neumann", True) and (numbers is None or tuple(map(int, numbers.groups())) < (0, 18)):
            problems.append(
                "use_cayley_neumann: its series was another one before PEFT 0.18 (found peft_version "
                f"{shorten(version)}). Train the adapter again"
            )
        return problems

    def read(self, file: PeftFile[OFTKeys]) -> ReadAdapter:
        """Reads the triangles, and checks that the blocks fit the projections."""
        lora, config, plain = stack_layers(file, self), file.config, LoraArgs()
        series = config.get("use_cayley_neumann", True)
        terms = config.get("num_cayley_neumann_terms", plain.num_cayley_neumann_terms)
        args = LoraArgs(
            method="oft",
            target_modules=suffixes_of(lora, file.model),
            oft_blocks=config.get("r", 0),
            oft_block_size=config.get("oft_block_size") or plain.oft_block_size,
            block_share=bool(config.get("block_share")),
            use_cayley_neumann=bool(series),
            num_cayley_neumann_terms=terms if series else plain.num_cayley_neumann_terms,
        )
        try:
            oft_blocks(file.model, args)
        except ValueError as error:
            check_fits(file.folder, [str(error)])
        return ReadAdapter(lora, args)

    def differences(self, ours: LoraArgs, of_adapter: LoraArgs, model: ModelConfig) -> list[str]:
        """Lists settings that change the rotation."""
        names = ("oft_block_size", "oft_blocks", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms")
        return setting_differences(names, ours, of_adapter)


class OFTMethod(Method):
    """OFT on projections."""

    peft = OFTForm()

    def targets(self, config: ModelConfig, spec: LoraArgs) -> Mapping[str, tuple[int, int]]:
        """Returns the projections whose inputs rotate, with their blocks."""
        return oft_blocks(config, spec)

    def shape(self, config: ModelConfig, spec: LoraArgs) -> AdapterShape:
        """Returns the projections, whose inputs the gradient of the rotation reads."""
        return AdapterShape(reads=every_layer(config, within_layers(config, oft_blocks(config, spec))))

    def work(self, sizes: StepSizes) -> tuple[Work, ...]:
        """Returns the work of x R, 2 M K S, and of the series, C (n - 1) 2 S^3 for powers up to n.

        Gradients are dx = dy R^T and dR = x^T dy, for which R is rebuilt; two products for each of the series, or one
        per solve, which is not counted in the forward pass.
        """
        blocks = within_layers(sizes.model, oft_blocks(sizes.model, sizes.lora))
        series = sizes.lora.use_cayley_neumann
        products = last_power(sizes.lora.num_cayley_neumann_terms) - 1 if series else 0
        inputs = {name: k for name, (_, k) in sizes.shapes()}
        rotated = {
            name: sizes.layers(name) * 2 * sizes.rows * inputs[name] * size for name, (_, size) in blocks.items()
        }
        cubes = {name: sizes.layers(name) * count * 2 * size**3 for name, (count, size) in blocks.items()}
        again = [name for name in blocks if name not in sizes.not_recomputed]
        rotation, all_cubes, cubes_again = (
            sum(rotated.values()),
            sum(cubes.values()),
            sum(cubes[name] for name in again),
        )
        series_backward = 2 * products * all_cubes if series else all_cubes
        return (
            Work("rotation", rotation, 2 * rotation, sum(rotated[name] for name in again)),
            Work(
                "cayley",
                products * all_cubes,
                series_backward,
                products * cubes_again,
                rebuild=products * all_cubes,
                per_micro_batch=True,
            ),
        )

    def attach(self, model: CausalLM, spec: LoraArgs, given: Given) -> None:
        """Adds rotations by nothing to each targeted projection."""
        terms = spec.num_cayley_neumann_terms if spec.use_cayley_neumann else None
        stacks, known = projection_layers(model.config), dict(linears(model))
        for name, blocks in oft_blocks(model.config, spec).items():
            known[name].adapter = OFT.init(len(stacks[name]), *blocks, neumann_terms=terms, dtype=spec.dtype)


METHOD = OFTMethod()
