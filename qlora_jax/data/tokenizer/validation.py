"""Checks a stranger's tokenizer.json before it is loaded, since the tokenizers library trusts all that it says.

How much a text can grow is computed, and the table of a `Precompiled` step is checked. The time that a regular
expression takes is measured: unless it is a known one, another process tries the file first (trial_worker.py).
"""

import base64
import functools
import json
import math
import pickle
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from qlora_jax.data.tokenizer.gguf_tokenizer import KNOWN_PRE
from qlora_jax.data.tokenizer.template_pipe import MEMORY_REACHED, Limits
from qlora_jax.regex import MAX_LENGTH
from qlora_jax.sandbox.limits import python_environment

WORKER = "qlora_jax.data.tokenizer.trial_worker"
MAX_STEPS = 64  # steps of a normalizer, pre-tokenizer or decoder; each passes over the text
MAX_TEXT = 100  # characters that a step or the model adds at one place
MAX_WORD = 1000  # characters of a word that WordPiece looks for, in quadratic time
MAX_GROWTH = 256.0  # bytes that the steps of a part write per byte; those of T5 may write 132
MAX_PROBLEMS = 10  # that an error lists
ORDINARY_GROWTH = 16.0  # so that added tokens, which the library normalizes when it loads them, fit into memory
TRIAL_MEMORY = 16  # bytes per byte of the file, besides those of any process

# Bytes that other steps than Replace and Precompiled write per byte, at most; 1 if they are not here.
_GROWTH = dict(NFC=3.0, NFD=3.0, NFKC=11.0, NFKD=11.0, Lowercase=1.5, BertNormalizer=9.0, ByteLevel=2.0, Metaspace=4.0)

# A trial encodes runs of characters of many kinds, and of those of the patterns, before a character unlike them.
_SAMPLES = "aA0 \n\r\t.'_\u4e2d\u0301\u02b0\U0001f642\u00a0"
_RUN, _END, _MOST_PROBES = 2_000, "\x01", 64

Step = Mapping[str, object]


def check_tokenizer(text: str, parts: Mapping[str, object], model: Mapping[str, object], path: Path) -> None:
    """Raises ValueError, with all problems, if it is unsafe to load a tokenizer or to encode texts with it.

    Args:
      text: of tokenizer.json.
      parts: its normalizer, pre_tokenizer and decoder.
      model: settings of its model.
    """
    steps = {key: [*_steps(part)] for key, part in parts.items()}
    texts = {key: model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")}
    problems = [f"model.{problem}" for problem in _text_problems(texts)]
    if isinstance(longest := model.get("max_input_chars_per_word"), int) and longest > MAX_WORD:
        problems.append(f"model.max_input_chars_per_word: found {longest}, expected at most {MAX_WORD}")
    if dropout := model.get("dropout"):
        problems.append(f"model.dropout: found {dropout}, expected null: it makes the ids of a text random")
    for key, own in steps.items():
        problems += [f"{key}: {problem}" for step in own for problem in _step_problems(step)]
        if len(own) > MAX_STEPS:
            problems.append(f"{key}: found {len(own)} steps, expected at most {MAX_STEPS}")
        if (growth := _growth(own)) > MAX_GROWTH:
            problems.append(f"{key}: may make a text {growth:.3g} times as long (expected at most {MAX_GROWTH:g})")
    if not problems and not all(map(_is_ordinary, steps.values())):
        problems = _try(text, [pattern for own in steps.values() for pattern in _patterns(own)])
    if problems:
        listed = "\n  ".join(problems[:MAX_PROBLEMS])
        raise ValueError(f"{path}: unsafe. Correct it, or use the file of another source:\n  {listed}")


def _steps(part: object) -> Iterator[Step]:
    """Yields the steps of a normalizer, pre-tokenizer or decoder, and those inside of each, whatever its type says."""
    if isinstance(part, dict):
        yield part
        inner = (part.get(key) for key in ("normalizers", "pretokenizers", "decoders"))
        for each in (each for steps in inner if isinstance(steps, list) for each in steps):
            yield from _steps(each)


def _pattern(step: Step, kind: str) -> str | None:
    """Returns a step's pattern if it is of a kind, "String" or "Regex"."""
    pattern = step.get("pattern")
    text = pattern.get(kind) if isinstance(pattern, dict) else None
    return text if isinstance(text, str) else None


def _patterns(steps: Sequence[Step]) -> list[str]:
    return [pattern for step in steps if (pattern := _pattern(step, "Regex")) is not None]


@functools.cache
def _known_patterns() -> frozenset[str]:
    """Returns patterns of published tokenizers, which take linear time on any text."""
    splits = [json.loads(pre.split().__getstate__()) for pre in KNOWN_PRE.values()]
    return frozenset(pattern for split in splits for pattern in _patterns([*_steps(split)]))


def _is_ordinary(steps: Sequence[Step]) -> bool:
    return {*_patterns(steps)} <= _known_patterns() and _growth(steps) <= ORDINARY_GROWTH


def _step_problems(step: Step) -> list[str]:
    if step.get("type") == "Precompiled":
        return [f"Precompiled: {problem}" for problem in table_problems(*table_of(step))]
    problems = _text_problems(step) + ([] if "type" in step else ["a step without a type"])
    if any(len(pattern) > MAX_LENGTH for pattern in _patterns([step])):
        problems.append(f"a pattern is too long (expected at most {MAX_LENGTH:,} characters)")
    return problems


def _text_problems(texts: Mapping[str, object]) -> list[str]:
    sizes = {key: len(text) for key, text in texts.items() if isinstance(text, str) and len(text) > MAX_TEXT}
    return [f"{key}: found {size:,} characters, expected at most {MAX_TEXT}" for key, size in sizes.items()]


def _growth(steps: Sequence[Step]) -> float:
    """Returns the bytes that steps write per byte, at most."""
    return math.prod(map(_growth_of_step, steps))


def _growth_of_step(step: Step) -> float:
    if step.get("type") == "Precompiled":
        return max(1.0, max(map(len, table_of(step)[2].split(b"\0"))))
    if step.get("type") != "Replace":
        return _GROWTH.get(str(step.get("type")), 1.0)
    texts = _pattern(step, "String") or "", step.get("content")
    found, written = (len(str(text).encode("utf-8", "surrogatepass")) for text in texts)
    # An empty text, or a regular expression, may match between any two bytes.
    return max(1.0, written / found) if found else 1.0 + written


def table_of(step: Step) -> tuple[int, bytes, bytes]:
    """Returns the table of a `Precompiled` step: the size of its trie, the trie's units of 32 bits, and its texts.

    A unit has an offset to a block of 256 others. If a key ends there, the block has the place of the text to write,
    which ends with a zero byte.
    """
    encoded = step.get("precompiled_charsmap")
    try:
        table = base64.b64decode(encoded if isinstance(encoded, str) else b"", validate=True)
    except ValueError:
        table = b""
    size = int.from_bytes(table[:4], "little")
    return size, table[4 : 4 + size], table[4 + size :] + b"\0"


def table_problems(size: int, trie: bytes, texts: bytes) -> list[str]:
    """Returns what is wrong with the table of a `Precompiled` step, as a list."""
    if size != len(trie) or size % 4 or not size:
        return [f"a trie of {size:,} bytes (found {len(trie):,})"]
    units = np.frombuffer(trie, "<u4").astype(np.int64)
    blocks = np.arange(len(units)) ^ (units >> 10 << (units >> 6 & 8))
    inner = units >> 31 == 0
    if ((blocks | 255)[inner] >= len(units)).any():
        return ["its trie refers to a unit outside of it"]
    values = units[blocks[inner & (units >> 8 & 1 == 1)]]
    places = np.minimum(values & 0x7FFFFFFF, len(texts))
    if (values >> 31 == 0).any() or (np.frombuffer(texts + b"\x80", np.uint8)[places] >> 6 == 2).any():
        return ["its trie refers to something that is not the start of a character"]
    try:
        texts.decode()
    except UnicodeDecodeError:
        return ["its texts are not UTF-8"]
    longest = max(map(len, texts.split(b"\0")))
    return [f"it writes a text of {longest:,} bytes (expected at most {MAX_TEXT})"] if longest > MAX_TEXT else []


def _try(text: str, patterns: Sequence[str]) -> list[str]:
    """Loads a tokenizer and encodes texts with it in another process; returns the problem as a list."""
    limits = Limits(memory=Limits().memory + TRIAL_MEMORY * len(text))
    own = [*dict.fromkeys("".join(patterns)), *re.findall(r"\w{2,}", " ".join(patterns))]
    pieces = [*dict.fromkeys([*_SAMPLES, *own])][:_MOST_PROBES]
    done = subprocess.run(
        [sys.executable, "-P", "-m", WORKER, str(limits.seconds), str(limits.memory)],
        input=pickle.dumps((text, [piece * (_RUN // len(piece)) + _END for piece in pieces])),
        capture_output=True,
        env=python_environment(),
        check=False,
    )
    too_much = f"needs more than {limits.memory >> 20:,} MiB of memory"
    reasons = {
        0: f"the tokenizers library fails: {done.stdout.decode()}",
        -signal.SIGPROF: f"takes more than {limits.seconds:g} s of processor time for {_RUN:,} characters",
        **dict.fromkeys((-signal.SIGABRT, MEMORY_REACHED), too_much),
    }
    failed = done.returncode or done.stdout
    return [reasons.get(done.returncode, f"crashes the tokenizers library ({done.returncode})")] if failed else []
