"""The primitives of a traced kernel, in order."""

import jax


def subjaxprs(equation):
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns"):
            yield inner


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in subjaxprs(equation):
            yield from equations(inner)


def names(jaxpr):
    return [equation.primitive.name for equation in equations(jaxpr)]


def loops(jaxpr):
    for equation in equations(jaxpr):
        if equation.primitive.name in ("scan", "while"):
            yield from subjaxprs(equation)
