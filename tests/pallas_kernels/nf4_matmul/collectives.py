"""The arrays that devices exchange in a compiled program."""

import math
import re

_OPERATIONS = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
)


def collectives(text):
    """Returns {(operation, dtype, elements)} of every operand and result of a collective."""
    found = re.findall(rf"= (\(.*?\)|\S+) ({_OPERATIONS})(?:-start)?\(", text)
    return {
        (operation, dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for types, operation in found
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", types)
    }


def moved(text, at_least=2):
    """Returns {(operation, dtype)} of arrays with more than one element."""
    return {(operation, dtype) for operation, dtype, elements in collectives(text) if elements >= at_least}


def largest_moved(text):
    """Returns the elements of the largest array other than packed bytes."""
    return max((elements for _, dtype, elements in collectives(text) if dtype != "u8"), default=0)
