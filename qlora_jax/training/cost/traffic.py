"""The bytes that the parts of a traced program pass each other through memory: a lower bound, read from its jaxpr.

Each equation belongs to a part, by its named scope; recomputation is a separate one. A part reads an array that another
one computed once, and writes an array that another one reads once. An array that only one part uses stays on the chip:
attention's tiles, the head's logits. A loop counts as often as it runs. Arrays that it carries or stacks cross memory,
and so do the program's arguments.

Weights are left out: kernels read packed codes by a layer's index from the whole stack, which equations do not show.
"""

import dataclasses
import functools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jax.extend.core import Jaxpr, JaxprEqn, Literal

type Part = tuple[str, bool]  # its name, and True for recomputation

OUTSIDE: Part = "outside", False
# Equations whose result is their operand; those that look at a part of an array; those that run a jaxpr once.
SAME = ("name", "reshape", "squeeze", "layout_constraint", "optimization_barrier", "copy")
VIEWS = (*SAME, "slice", "dynamic_slice", "transpose", "convert_element_type", "broadcast_in_dim")
CALLS = {"jit": "jaxpr", "remat2": "jaxpr", "closed_call": "call_jaxpr"}
CALLS |= {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}
IN_REFERENCES = ("new_ref", "freeze")
RECOMPUTED = "rematted_computation"  # JAX's name scope


@dataclasses.dataclass(eq=False)
class _Array:
    """An array in the body of a loop; `free` if reading it is not counted; `maker` None: it crossed memory before."""

    nbytes: int
    maker: Part | None = None
    free: bool = False
    readers: set[Part] = dataclasses.field(default_factory=set)


class Traffic:
    """Counts bytes by part.

    Args:
      scopes: part by named scope; of several scopes of an equation, the first here counts.
      rest: the part of equations in none of these scopes.
    """

    def __init__(self, scopes: Mapping[str, str], rest: str):
        self._scopes, self._rest = scopes, rest
        self.found: Counter[str] = Counter()
        self._part = functools.cache(self._part_of)

    def program(self, program: Jaxpr, is_weight: Sequence[bool]) -> None:
        """Adds a program's bytes; `is_weight`: whether each of its flat arguments is a weight."""
        inputs = [_Array(_nbytes(var), free=free) for var, free in zip(program.invars, is_weight, strict=True)]
        self._cross(self._body(program, inputs, "", 1), 1)

    def _part_of(self, path: str) -> Part:
        names = (part for scope, part in self._scopes.items() if re.search(rf"\b{scope}\b", path))
        return next(names, self._rest), RECOMPUTED in path

    def _read(self, array: _Array, part: Part, times: int) -> None:
        if array.free or part in (array.maker, *array.readers):
            return
        if array.maker is not None and not array.readers:
            self.found[array.maker[0]] += times * array.nbytes
        array.readers.add(part)
        if part != OUTSIDE:
            self.found[part[0]] += times * array.nbytes

    def _cross(self, arrays: Iterable[_Array], times: int) -> None:
        for array in arrays:
            self._read(array, OUTSIDE, times)

    def _body(self, jaxpr: Jaxpr, inputs: Sequence[_Array], path: str, times: int) -> list[_Array]:
        """Visits a body that runs `times` times; returns its results."""
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: _Array(_nbytes(var), free=True) for var in jaxpr.constvars}

        def operands(variables) -> list[_Array]:
            return [_Array(0, free=True) if isinstance(one, Literal) else known[one] for one in variables]

        for eqn in jaxpr.eqns:
            known |= zip(eqn.outvars, self._equation(eqn, operands(eqn.invars), path, times), strict=True)
        return operands(jaxpr.outvars)

    def _equation(self, eqn: JaxprEqn, inputs: list[_Array], path: str, times: int) -> list[_Array]:
        name, path = eqn.primitive.name, f"{path}/{eqn.source_info.name_stack}"
        part = self._part(path)
        if name in SAME:
            return inputs[: len(eqn.outvars)]
        if name == "addupdate":  # the sum in memory is read and written where the value is made
            self.found[(inputs[1].maker or part)[0]] += 2 * times * inputs[1].nbytes
            return []
        if name in IN_REFERENCES:
            self._cross(inputs, times)
            return [_Array(_nbytes(var), free=name == "new_ref") for var in eqn.outvars]
        is_rest = part[0] == self._rest
        if is_rest and name == "scan":
            self._cross(inputs, times)
            body = eqn.params["jaxpr"].jaxpr
            slices = [_Array(_nbytes(var), free=one.free) for var, one in zip(body.invars, inputs, strict=True)]
            trips = times * eqn.params["length"]
            self._cross(self._body(body, slices, path, trips), trips)
            return [_Array(_nbytes(var)) for var in eqn.outvars]
        if is_rest and name in CALLS:
            inner = eqn.params[CALLS[name]]
            return self._body(getattr(inner, "jaxpr", inner), inputs, path, times)
        for array in inputs:
            self._read(array, part, times)
        large = [array for array, var in zip(inputs, eqn.invars, strict=True) if getattr(var.aval, "ndim", 0)]
        free = name in VIEWS and all(array.free for array in large) and bool(large)
        return [_Array(_nbytes(var), part, free) for var in eqn.outvars]


def _nbytes(var) -> int:
    shape, dtype = getattr(var.aval, "shape", ()), getattr(var.aval, "dtype", None)
    return 0 if dtype is None else math.prod(shape) * dtype.itemsize
