"""The arrays that devices exchange in a compiled program, as tests of the op ask for them."""

from pallas_kernels.aot.collectives import read_collectives


def moved(text):
    """Returns {(operation, dtype)} of arrays with more than one element."""
    return {(one.operation, one.dtype) for one in read_collectives(text) if one.elements > 1}


def largest_moved(text):
    """Returns the elements of the largest array other than packed bytes."""
    return max((one.elements for one in read_collectives(text) if one.dtype != "u8"), default=0)
