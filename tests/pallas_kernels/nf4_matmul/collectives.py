"""What crosses between devices in a compiled program."""

import math
import re

_OPERATIONS = (
    "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast|ragged-all-to-all"
)


def collectives(text):
    """{(operation, dtype, elements)} of every array that a collective takes or makes."""
    found = re.findall(rf"= (\(.*?\)|\S+) ({_OPERATIONS})(?:-start)?\(", text)
    return {
        (operation, dtype, math.prod(int(size) for size in sizes.split(",") if size))
        for types, operation in found
        for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", types)
    }


def moved(text, at_least=2):
    """{(operation, dtype)} of all that is more than a number."""
    return {(operation, dtype) for operation, dtype, elements in collectives(text) if elements >= at_least}


def largest_moved(text):
    """Elements of the largest array that is not of packed bytes."""
    return max((elements for _, dtype, elements in collectives(text) if dtype != "u8"), default=0)
