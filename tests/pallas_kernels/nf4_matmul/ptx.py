"""Interprets the PTX instructions of the kernels' inline assembly on arrays of words."""

import re

import jax.numpy as jnp
import numpy as np

from pallas_kernels.formats.tables import CODE_TABLES

U32 = np.uint32


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Selects as byte i the byte of b:a named by bits 0 to 2 of selector nibble i; bit 3 replicates its sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> U32(4 * i) & U32(15)
        byte = (both >> (nibble & U32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)).astype(U32)
        signs = np.where(byte & U32(128), U32(255), U32(0))
        result |= np.where(nibble & U32(8), signs, byte) << U32(8 * i)
    return result


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Looks up each bit in the table at the index formed by the bits of a, b and c, with a's the highest."""
    result = np.zeros_like(a)
    for i in range(32):
        number = (a >> U32(i) & U32(1)) << U32(2) | (b >> U32(i) & U32(1)) << U32(1) | c >> U32(i) & U32(1)
        result |= (table >> number & U32(1)) << U32(i)
    return result


INSTRUCTIONS = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "lop3.b32": lop3,
    "shr.u32": np.right_shift,
    "prmt.b32": prmt,
}


def run(ptx: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Runs a snippet and returns the words of $0 .. $outputs-1; the inputs are the operands after them.

    Raises:
      KeyError: an unknown instruction or register.
    """
    registers = {f"${outputs + i}": words.astype(U32) for i, words in enumerate(inputs)}
    shape = np.broadcast_shapes(*(words.shape for words in inputs))

    def value(operand: str) -> np.ndarray:
        if re.match(r"\d", operand):
            return np.full(shape, int(operand, 0), U32)
        return registers[operand]

    for statement in ptx.strip("{} \n").split(";"):
        if not statement.strip() or ".reg" in statement:
            continue
        instruction, operands = statement.split(maxsplit=1)
        result, *arguments = (operand.strip() for operand in operands.split(","))
        registers[result] = INSTRUCTIONS[instruction](*map(value, arguments))
    return [registers[f"${i}"] for i in range(outputs)]


# Expected look-ups


def table_bits(quant_type: str, dtype: str) -> np.ndarray:
    """Returns the table's 16 values in a 16-bit dtype, as words."""
    return CODE_TABLES[quant_type].astype(jnp.dtype(dtype)).view(np.uint16).astype(U32)


def two_values(words: np.ndarray, first: int, second: int, values: np.ndarray) -> np.ndarray:
    """Looks up nibbles `first` and `second` of each word, the first in the low half."""
    return values[words >> (4 * first) & 15] | values[words >> (4 * second) & 15] << 16
