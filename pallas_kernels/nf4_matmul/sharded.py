"""nf4_matmul on several devices: they exchange rows or sums, never weights.

There are two ways over one mesh axis of s devices. Outside a pair of products, rows are "outer": each device has all
of K or N. Between the two products they are "inner": the last axis is cut into s.

| product           | weights cut along | x -> y         | moved forward | moved backward |
|-------------------|-------------------|----------------|---------------|----------------|
| `column_parallel` | N                 | outer -> inner | nothing       | sum of dx      |
| `row_parallel`    | K                 | inner -> outer | sum of y      | nothing        |

If outer rows are themselves cut over the axis (`rows` names it), the products gather them where the table says
"nothing", and a sum leaves each device only its rows. Each device rounds its part of a sum once, to x's dtype, as the
op does. The parts are added in f32, and the sum is rounded once more: one rounding more than on a single device.

The residuals between forward and backward are the weights and the layer as given, as in nf4_matmul.

Dimension key: M rows, N out, K in, G = K / block_size blocks a row; `...` leading axes of rows.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Direction, Layer
from pallas_kernels.formats.qtensor import QTensor
from pallas_kernels.formats.shards import AnyMesh, Cut, cut_problems, shard, specs
from pallas_kernels.nf4_matmul import api

EVERYWHERE = P()


def column_parallel(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer, mesh: AnyMesh, axis: str, rows: P = EVERYWHERE
) -> Float[Array, "... N"]:
    """Computes y[..., n] = sum_k x[..., k] w[n, k]; each device computes its part of N, along which y is cut.

    dx, a sum over N, is summed over the devices in f32.

    Args:
      weights: cut along N over `axis` (`specs`); one weight (`layer` None), or a stack and the index of a layer.
      rows: mesh axes of x's leading axes. If `axis` is among them, x is gathered over it, and dx scattered.

    Raises:
      ValueError: nf4_matmul would raise it, or weights or rows cannot be cut this way. Lists all problems.
      NotImplementedError: no implementation supports a device's part.
    """
    return _checked(x, weights, layer, _Split("column", mesh, axis, rows))


def row_parallel(
    x: Float[Array, "... K"], weights: QTensor, layer: Layer, mesh: AnyMesh, axis: str, rows: P = EVERYWHERE
) -> Float[Array, "... N"]:
    """Computes y[..., n] = sum_k x[..., k] w[n, k]; each device sums over its part of K, along which x is cut.

    y is summed over the devices in f32. dx stays cut along K.

    Args:
      weights: cut along K over `axis` (`specs`); one weight (`layer` None), or a stack and the index of a layer.
      rows: mesh axes of y's leading axes. If `axis` is among them, y is scattered over it, and dy gathered.

    Raises:
      ValueError, NotImplementedError: see column_parallel.
    """
    return _checked(x, weights, layer, _Split("row", mesh, axis, rows))


@dataclasses.dataclass(frozen=True)
class _Split:
    """A product's distribution over a mesh: a row of the table above."""

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
        """The axis of outer rows that is cut over the mesh axis."""
        return next((at for at, entry in enumerate(self.rows) if self.axis in _names(entry)), None)

    def spec(self, ndim: int, inner: bool) -> P:
        """Returns the PartitionSpec of rows with `ndim` axes."""
        if not inner:
            return P(*self.rows, *[None] * (ndim - len(self.rows)))
        remaining = [tuple(name for name in _names(entry) if name != self.axis) or None for entry in self.rows]
        return P(*remaining, *[None] * (ndim - 1 - len(remaining)), self.axis)


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes of one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


# One device's part


def _gather_and_multiply(
    direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split, whole_specs: QTensor
):
    """Outer -> inner: computes the device's columns of the result for all rows."""
    if split.rows_axis is not None:
        rows = lax.all_gather(rows, split.axis, axis=split.rows_axis, tiled=True)
    return _multiply(direction, rows, _own(weights, split, whole_specs), layer)


def _multiply_and_sum(
    direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split, whole_specs: QTensor
):
    """Inner -> outer: computes the device's part of a sum, and sums the parts."""
    part = _multiply(direction, rows, _own(weights, split, whole_specs), layer).astype(jnp.float32)
    if split.rows_axis is None:
        return lax.psum(part, split.axis).astype(rows.dtype)
    scattered = lax.psum_scatter(part, split.axis, scatter_dimension=split.rows_axis, tiled=True)
    return scattered.astype(rows.dtype)


def _multiply(direction: Direction, rows: Array, weights: QTensor, layer: Layer) -> Array:
    product = api.product(direction, rows.reshape(-1, rows.shape[-1]), weights, layer)
    return product.reshape(*rows.shape[:-1], product.shape[-1])


def _own(weights: QTensor, split: _Split, whole_specs: QTensor) -> QTensor:
    return shard(weights, whole_specs, split.cut, split.shards, lax.axis_index(split.axis))


# The op on the mesh

_Step = Callable[[Direction, Array, QTensor, Layer, _Split, QTensor], Array]

# kind -> direction -> (one device's part, True if its input rows are inner, True if its output rows are inner).
_STEPS: dict[str, dict[Direction, tuple[_Step, bool, bool]]] = {
    "column": {"forward": (_gather_and_multiply, False, True), "backward": (_multiply_and_sum, True, False)},
    "row": {"forward": (_multiply_and_sum, True, False), "backward": (_gather_and_multiply, False, True)},
}


def _on_mesh(direction: Direction, rows: Array, weights: QTensor, layer: Layer, split: _Split) -> Array:
    step, inner_in, inner_out = _STEPS[split.kind][direction]
    whole_specs = specs(weights, split.cut, split.mesh, split.axis)
    run = jax.shard_map(
        lambda rows, weights, layer: step(direction, rows, weights, layer, split, whole_specs),
        mesh=split.mesh,
        in_specs=(split.spec(rows.ndim, inner_in), whole_specs, P()),
        out_specs=split.spec(rows.ndim, inner_out),
        check_vma=False,  # kernels' results carry no such types; the derivative is the custom one below
    )
    return run(rows, weights, layer)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _product(x: Array, weights: QTensor, layer: Layer, split: _Split) -> Array:
    return _on_mesh("forward", x, weights, layer, split)


def _forward(x, weights, layer, split):
    return _on_mesh("forward", x, weights, layer, split), (weights, layer)


def _backward(split, residuals, dy):
    weights, layer = residuals
    return _on_mesh("backward", _resharded("backward", dy, split), weights, layer, split), None, None


_product.defvjp(_forward, _backward)


def _checked(x: Array, weights: QTensor, layer: Layer, split: _Split) -> Array:
    problems = [*api.call_problems(x, weights, layer), *_rows_problems(x, split)]
    if problems := [*problems, *cut_problems(weights, split.cut, split.mesh, split.axis)]:
        raise ValueError(f"{split.kind}: " + "; ".join(problems))
    return _product(_resharded("forward", x, split), weights, _index(layer), split)


def _resharded(direction: Direction, rows: Array, split: _Split) -> Array:
    """Reshards rows for a direction: on axes of type Explicit, JAX does so only on request."""
    if AxisType.Explicit not in split.mesh.axis_types:
        return rows
    _, inner, _ = _STEPS[split.kind][direction]
    return jax.sharding.reshard(rows, NamedSharding(split.mesh, split.spec(rows.ndim, inner)))


def _index(layer: Layer) -> Array | None:
    return None if layer is None else jnp.asarray(layer, jnp.int32)


def _rows_problems(x: Array, split: _Split) -> Iterator[str]:
    """Yields problems of x's leading axes and the mesh axes that cut them."""
    if len(split.rows) >= max(x.ndim, 1):
        yield f"rows={split.rows} name {len(split.rows)} leading axes, x {list(x.shape)} has {x.ndim - 1}"
    for size, entry in zip(x.shape, split.rows, strict=False):
        names = _names(entry)
        if unknown := [name for name in names if name not in split.mesh.shape]:
            yield f"rows={split.rows}: the mesh has axes {', '.join(map(repr, split.mesh.axis_names))}, not {unknown}"
        elif size % (count := math.prod(split.mesh.shape[name] for name in names)):
            yield f"x {list(x.shape)} has an axis of {size}, rows={split.rows} cut it into {count}"
        if split.axis in names[:-1]:
            yield f"rows={split.rows}: {split.axis!r} must be the last mesh axis of its entry"
