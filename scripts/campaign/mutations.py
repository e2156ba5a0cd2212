"""Damages bytes, JSON values and texts at random, in ways that parsers tend to get wrong."""

import json
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

# Lengths, counts and offsets at the edges of their types.
INTEGERS = (0, 1, -1, 2, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 10**9, 2**53 + 1)
LARGE = (2**62, 2**63 - 1, 2**63, 2**64 - 1, 10**30, -(10**30), 10**400)
FLOATS = (0.0, -0.0, 0.5, -1.5, 1e-300, 1e38, 1e39, 1e308, float("inf"), float("-inf"), float("nan"))
TEXTS = (
    *("", " ", "x", "None", "null", "true", "0", "1e9", "-1", "NaN", "default", "model", "\n", "\t", "\\", "\"'", "%s"),
    *(
        "\x00",
        "a\x00b",
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "\r",
        "\u202e",
        "\ufeff",
        "\ud800",
        "\U0001f469\u200d",
    ),
    *("../../x", "/etc/passwd", "~", "file:///x", "http://user:secret@host/x", "a/b", ".", "..", "CON", "x" * 300),
    *("(", "[", "*", "(a+)+$", "(([a-z_.0-9]+)+)+!", "(?P<n>", "\\", "a{99999999}", "{{", "{% for x in y %}", "${x}"),
)
DEEP = "\ue000deep"  # replaced in the text of JSON by brackets that nest too deeply to build in Python
DEPTHS = (150, 1_000, 20_000, 100_000)
MAX_TEXT = 4 << 20  # characters; a text that is repeated twice would need gigabytes


def damage_bytes(chance: random.Random, data: bytes) -> bytes:
    """Returns `data` with one to four damages."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        data = chance.choice(_BYTE_DAMAGES)(chance, data)
    return data


def _flip_bit(chance: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\x00"
    changed = bytearray(data)
    changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _set_byte(chance: random.Random, data: bytes) -> bytes:
    if not data:
        return b"\xff"
    changed = bytearray(data)
    changed[chance.randrange(len(data))] = chance.choice((0, 0xFF, 0x0A, 0x22, 0x7B, 0x5B, chance.randrange(256)))
    return bytes(changed)


def _truncate(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.choice((0, 1, len(data) // 2, max(len(data) - 1, 0), chance.randint(0, len(data))))]


def _insert(chance: random.Random, data: bytes) -> bytes:
    at = chance.randint(0, len(data))
    return data[:at] + chance.randbytes(chance.choice((1, 2, 8, 100))) + data[at:]


def _delete(chance: random.Random, data: bytes) -> bytes:
    begin, end = _span(chance, data)
    return data[:begin] + data[end:]


def _duplicate(chance: random.Random, data: bytes) -> bytes:
    begin, end = _span(chance, data)
    return data[:end] + data[begin:end] * chance.choice((1, 1, 2, 50)) + data[end:]


def _zero(chance: random.Random, data: bytes) -> bytes:
    begin, end = _span(chance, data)
    return data[:begin] + bytes(end - begin) + data[end:]


def _splice(chance: random.Random, data: bytes) -> bytes:
    (begin, end), at = _span(chance, data), chance.randint(0, len(data))
    return data[:at] + data[begin:end] + data[at + end - begin :]


def _set_integer(chance: random.Random, data: bytes) -> bytes:
    form = chance.choice(("<I", "<Q", ">I", ">Q"))
    size = struct.calcsize(form)
    value = chance.choice((*INTEGERS, *LARGE)) % (1 << 8 * size)
    at = chance.randint(0, max(len(data) - size, 0))
    return data[:at] + struct.pack(form, value) + data[at + size :]


def _span(chance: random.Random, data: bytes) -> tuple[int, int]:
    begin = chance.randint(0, len(data))
    return begin, min(len(data), begin + chance.choice((1, 2, 4, 8, 32, 256, 4096)))


_BYTE_DAMAGES: Sequence[Callable[[random.Random, bytes], bytes]] = (
    *(_flip_bit, _flip_bit, _flip_bit, _set_byte, _truncate),
    *(_insert, _delete, _duplicate, _zero, _splice, _set_integer),
)


def damage_lines(chance: random.Random, path: Path) -> str:
    """Damages a file of lines as disks, crashes and people do; returns what it did."""
    content = path.read_bytes()
    lines, place = content.splitlines(keepends=True), chance.randrange(len(content))
    at, other = chance.randrange(len(lines)), chance.randrange(len(lines))
    end = len(b"".join(lines[: at + 1])) - 1
    damages = {
        "missing": None,
        "empty": b"",
        "cut": content[:place],
        "zeros at the end": content[:place] + bytes(len(content) - place),
        "deleted": b"".join(lines[:at] + lines[at + chance.choice((1, 1, 3)) :]),
        "doubled": b"".join([*lines[:other], lines[at], *lines[other:]]),
        "swapped": b"".join({at: lines[other], other: lines[at]}.get(n, line) for n, line in enumerate(lines)),
        "line break": content[:end] + bytes([content[end] ^ 1 << chance.randrange(8)]) + content[end + 1 :],
    }
    way = chance.choice(list(damages))
    damaged = damages[way]
    if damaged is None:
        path.unlink()
    else:
        path.write_bytes(damaged)
    return f"{path.name}: {way}"


def any_value(chance: random.Random) -> object:
    """Returns a JSON value of a random type."""
    pools = (
        INTEGERS,
        LARGE,
        FLOATS,
        TEXTS,
        (None, True, False),
        ([], {}, [[]], [None], {"": None}, [1, "a"], {"a": {}}),
    )
    return chance.choice((*chance.choice(pools), DEEP))


def damage_value(chance: random.Random, value: object) -> object:
    """Returns a copy of a JSON value with one to three nodes damaged."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        value = _damage_node(chance, value, depth=0)
    return value


def _damage_node(chance: random.Random, node: object, depth: int) -> object:
    """Walks down to a random node and damages it."""
    if not isinstance(node, dict | list) or not node or chance.random() < (0.03 if depth == 0 else 0.25):
        return _damaged(chance, node)
    if isinstance(node, dict):
        key = chance.choice(list(node))
        if chance.random() < 0.7:
            return node | {key: _damage_node(chance, node[key], depth + 1)}
        others = {name: value for name, value in node.items() if name != key}
        renamed = chance.choice((key.upper(), key + "_", key[:-1], *TEXTS))
        return chance.choice((others, others, others | {renamed: node[key]}, node | {renamed: any_value(chance)}, {}))
    index = chance.randrange(len(node))
    if chance.random() < 0.7:
        return [*node[:index], _damage_node(chance, node[index], depth + 1), *node[index + 1 :]]
    without = [*node[:index], *node[index + 1 :]]
    added = [*node[:index], any_value(chance), *node[index:]]
    return chance.choice((without, added, [*node, node[index]], node[::-1], [], node * 100))


def _damaged(chance: random.Random, node: object) -> object:
    """Returns another value in place of `node`, half the time one of the same type."""
    match node:
        case bool() | None:
            return any_value(chance)
        case int() if chance.random() < 0.5:
            return chance.choice((node + 1, node - 1, -node, node * 2, node // 2, *INTEGERS, *LARGE))
        case float() if chance.random() < 0.5:
            return chance.choice((node * 2, -node, *FLOATS))
        case str() if chance.random() < 0.5:
            return chance.choice(
                (node[: len(node) // 2], node * 2, node + chance.choice(TEXTS), *TEXTS, node * _repeats(node))
            )
    return chance.choice((any_value(chance), [node], {"": node}, {"content": node}, str(node)[:1000]))


def _repeats(text: str) -> int:
    return min(10_000, MAX_TEXT // max(len(text), 1))


def to_json(chance: random.Random, value: object) -> str:
    """Returns the text of a damaged value, with NaN and Infinity as Python writes them."""
    text = json.dumps(value, ensure_ascii=chance.random() < 0.9)
    depth = chance.choice(DEPTHS)
    opening, closing = chance.choice((("[", "]"), ('{"a":', "}")))
    middle = "" if opening == "[" else "1"
    return text.replace(json.dumps(DEEP), opening * depth + middle + closing * depth).replace(DEEP, "deep")


def damage_json(chance: random.Random, text: str) -> bytes:
    """Returns the text of a JSON document with damaged values, or in one of six cases with damaged bytes."""
    if chance.random() < 1 / 6:
        return damage_bytes(chance, text.encode())
    return to_json(chance, damage_value(chance, json.loads(text))).encode("utf-8", "surrogatepass")


def damage_text(chance: random.Random, tokens: Sequence[str], snippets: Sequence[str]) -> str:
    """Returns a text whose tokens are deleted, repeated, exchanged, or joined by snippets."""
    changed = list(tokens)
    for _ in range(chance.choice((1, 1, 2, 3, 5))):
        at, other = chance.randint(0, len(changed)), chance.randint(0, len(changed))
        begin, end = min(at, other), min(max(at, other), min(at, other) + 12)
        kind = chance.randrange(5)
        if kind == 0:
            changed[begin:end] = []
        elif kind == 1:
            changed[at:at] = changed[begin:end]
        elif kind == 2 and changed:
            changed[at % len(changed)] = chance.choice(changed)
        else:
            changed[at:at] = [chance.choice(snippets)]
    return "".join(changed)
