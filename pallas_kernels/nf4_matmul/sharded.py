"""nf4_matmul on several devices: what crosses between them is rows, sums, or packed codes, never a dequantized weight.

Three ways over one axis of a mesh, s devices. "Outer" is how rows lie outside of a pair of products, all of K or N on
each device; "inner" is how they lie between the two, the last axis cut into s:

| product           | weights cut along | x -> y         | moved forward                | moved backward |
|-------------------|-------------------|----------------|------------------------------|----------------|
| `column_parallel` | N                 | outer -> inner | nothing                      | sum of dx      |
| `row_parallel`    | K                 | inner -> outer | sum of y                     | nothing        |
| `gathered`        | N                 | outer -> outer | a layer's codes and constants | the same      |

Where the rows themselves lie over the axis outside (`rows` names it), the first two gather them where the table says
nothing, and a sum leaves to each device its rows alone. Each device rounds its part of a sum once, to x's dtype, as the
op does; parts are added in f32, and the sum is rounded once more. With parts of random signs that is one rounding more
than on one device, however many they are.

Between forward and backward only the weights and the layer are kept, exactly as they were given, as nf4_matmul does it.

Dimension key: M rows, N out, K in, G = K / block_size blocks a row; `...` leading axes of rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.shards import AnyMesh, Cut, cut_problems, shard, specs
from pallas_kernels.nf4_matmul import api
from pallas_kernels.nf4_matmul.dispatch import Direction, Layer

EVERYWHERE = P()


def column_parallel(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer, mesh: AnyMesh, axis: str, rows: P = EVERYWHERE
) -> Float[Array, "... N"]:
    """y[..., n] = sum_k x[..., k] w[n, k], each device with its own part of N, which y is cut along.

    dx, a sum over N, is summed over the devices in f32.

    Args:
      weights: cut along N over `axis` (`specs`); one weight (`layer` None), or a stack and the index of a layer.
      rows: mesh axes of x's leading axes. Where `axis` is among them, x is gathered there, and dx scattered.

    Raises:
      ValueError: what nf4_matmul refuses; weights or rows that can't be cut so: all problems at once.
      NotImplementedError: no implementation can do a device's part.
    """
    return _checked(x, weights, layer, _Split("column", mesh, axis, rows))


def row_parallel(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer, mesh: AnyMesh, axis: str, rows: P = EVERYWHERE
) -> Float[Array, "... N"]:
    """y[..., n] = sum_k x[..., k] w[n, k], each device with its own part of K, which x is cut along.

    y is summed over the devices in f32; dx is each device's own.

    Args:
      weights: cut along K over `axis` (`specs`); one weight (`layer` None), or a stack and the index of a layer.
      rows: mesh axes of y's leading axes. Where `axis` is among them, y is scattered there, and dy gathered.

    Raises:
      ValueError, NotImplementedError: as column_parallel.
    """
    return _checked(x, weights, layer, _Split("row", mesh, axis, rows))


def gathered(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer, mesh: AnyMesh, axis: str, rows: P = EVERYWHERE
) -> Float[Array, "... N"]:
    """y[..., n] = sum_k x[..., k] w[n, k], the layer's packed codes brought together for this product alone.

    For weights that are spread out to save memory, while rows lie over the same devices: forward and backward each
    bring about half a byte a weight, and sum nothing.

    Args:
      weights: cut along N over `axis` (`specs`); one weight (`layer` None), or a stack and the index of a layer.
      rows: mesh axes of x's leading axes, as a rule `axis` among them.

    Raises:
      ValueError, NotImplementedError: as column_parallel.
    """
    return _checked(x, weights, layer, _Split("gathered", mesh, axis, rows))


@dataclasses.dataclass(frozen=True)
class _Split:
    """One product on a mesh: a row of the table above."""

    kind: str
    mesh: AnyMesh
    axis: str
    rows: P

    @property
    def cut(self) -> Cut:
        return "K" if self.kind == "row" else "N"

    @property
    def shards(self) -> int:
        return self.mesh.shape[self.axis]

    @property
    def rows_axis(self) -> int | None:
        """The axis of rows that lies over the mesh axis outside."""
        return next((at for at, entry in enumerate(self.rows) if self.axis in _names(entry)), None)

    def lies(self, ndim: int, inner: bool) -> P:
        """How rows of `ndim` axes lie on the mesh."""
        if not inner:
            return P(*self.rows, *[None] * (ndim - len(self.rows)))
        kept = [tuple(name for name in _names(entry) if name != self.axis) or None for entry in self.rows]
        return P(*kept, *[None] * (ndim - 1 - len(kept)), self.axis)


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


# What a device does


def _gather_and_multiply(
    direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split, laid: QTensor
):
    """Outer -> inner: all rows, and of the result's columns the device's own."""
    if split.rows_axis is not None:
        rows = lax.all_gather(rows, split.axis, axis=split.rows_axis, tiled=True)
    return _multiply(direction, rows, _own(weights, split, laid), layer)


def _multiply_and_sum(direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split, laid: QTensor):
    """Inner -> outer: the device's part of a sum, and the sum of all."""
    part = _multiply(direction, rows, _own(weights, split, laid), layer).astype(jnp.float32)
    if split.rows_axis is None:
        return lax.psum(part, split.axis).astype(rows.dtype)
    scattered = lax.psum_scatter(part, split.axis, scatter_dimension=split.rows_axis, tiled=True)
    return scattered.astype(rows.dtype)


def _gather_codes(direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split, laid: QTensor):
    """Outer -> outer: the device's rows by the whole weight."""

    def whole(leaf, spec):
        if split.axis not in spec:
            return leaf
        axis = leaf.ndim - len(spec) + spec.index(split.axis)  # without the axis of layers, or with no such axis
        return lax.all_gather(leaf, split.axis, axis=axis, tiled=True)

    one = weights if layer is None else weights.layer(layer)
    return _multiply(direction, rows, jax.tree.map(whole, one, laid), None)


def _multiply(direction: Direction, rows: Array, weights: QTensor, layer: Layer) -> Array:
    product = api.product(direction, rows.reshape(-1, rows.shape[-1]), weights, layer)
    return product.reshape(*rows.shape[:-1], product.shape[-1])


def _own(weights: QTensor, split: _Split, laid: QTensor) -> QTensor:
    return shard(weights, laid, split.cut, split.shards, lax.axis_index(split.axis))


# The op on the mesh

_Step = Callable[[Direction, Array, QTensor, Layer, _Split, QTensor], Array]

# kind -> by direction: what a device does, and whether the rows that it takes, and those that it makes, lie inner.
_STEPS: dict[str, dict[Direction, tuple[_Step, bool, bool]]] = {
    "column": {"forward": (_gather_and_multiply, False, True), "backward": (_multiply_and_sum, True, False)},
    "row": {"forward": (_multiply_and_sum, True, False), "backward": (_gather_and_multiply, False, True)},
    "gathered": {"forward": (_gather_codes, False, False), "backward": (_gather_codes, False, False)},
}


def _on_mesh(direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split) -> Array:
    step, inner_in, inner_out = _STEPS[split.kind][direction]
    laid = specs(weights, split.cut, split.mesh, split.axis)
    run = jax.shard_map(
        lambda rows, weights, layer: step(direction, rows, weights, layer, split, laid),
        mesh=split.mesh,
        in_specs=(split.lies(rows.ndim, inner_in), laid, P()),
        out_specs=split.lies(rows.ndim, inner_out),
        check_vma=False,  # which kernels' results do not tell; the derivative is not jax's but the one below
    )
    return run(rows, weights, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, weights: QTensor, layer: Layer, split: _Split) -> Array:
    return _on_mesh("forward", x, weights, layer, split)


def _forward(x, weights, layer, split):
    return _on_mesh("forward", x, weights, layer, split), (weights, layer)


def _backward(split, residuals, dy):
    weights, layer = residuals
    return _on_mesh("backward", _brought("backward", dy, split), weights, layer, split), None, None


_product.defvjp(_forward, _backward)


def _checked(x: Array, weights: QTensor, layer: Layer, split: _Split) -> Array:
    problems = [*api.call_problems(x, weights, layer), *_rows_problems(x, split)]
    if problems := [*problems, *cut_problems(weights, split.cut, split.mesh, split.axis)]:
        raise ValueError(f"{split.kind}: " + "; ".join(problems))
    return _product(_brought("forward", x, split), weights, _index(layer), split)


def _brought(direction: Direction, rows: Array, split: _Split) -> Array:
    """Rows as the direction takes them: on axes of the type Explicit JAX moves nothing unless it is told to."""
    if AxisType.Explicit not in split.mesh.axis_types:
        return rows
    _, inner, _ = _STEPS[split.kind][direction]
    return jax.sharding.reshard(rows, NamedSharding(split.mesh, split.lies(rows.ndim, inner)))


def _index(layer: Layer) -> Array | None:
    return None if layer is None else jnp.asarray(layer, jnp.int32)


def _rows_problems(x: Array, split: _Split) -> Iterator[str]:
    """Of the leading axes of x and the mesh axes that they lie over."""
    if len(split.rows) >= max(x.ndim, 1):
        yield f"rows={split.rows} are for {len(split.rows)} axes before the last, x {list(x.shape)} has {x.ndim - 1}"
    for size, entry in zip(x.shape, split.rows, strict=False):
        names = _names(entry)
        if unknown := [name for name in names if name not in split.mesh.shape]:
            yield f"rows={split.rows}: the mesh has axes {', '.join(map(repr, split.mesh.axis_names))}, not {unknown}"
        elif size % (count := math.prod(split.mesh.shape[name] for name in names)):
            yield f"x {list(x.shape)} has an axis of {size}, rows={split.rows} cut it into {count}"
        if split.axis in names[:-1]:
            yield f"rows={split.rows}: {split.axis!r} has to be the last of those that cut an axis"
