"""Cases that damage files and read them: each gives one clear error, or the same result as the sound files."""

import contextlib
import dataclasses
import functools
import io
import random
import re
import shutil
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from qlora_jax.config import run_main
from qlora_jax.inference.result_cache import digest
from qlora_jax.line_digests import warn_without_digests
from scripts.campaign.isolation import CaseRunner
from scripts.campaign.ledger import Case, Verdict

LONGEST_MESSAGE = 20_000
# data.chat_template, vocab_size, config.json; or a key on a line alone: `  output: missing`
KEY = re.compile(r"\b[a-z]\w*[._]\w+|^ +\w+: ", re.MULTILINE)
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
TOLD = ("without digests", "Lost: ")  # in warnings about a file without its digests, and about lost records
OURS = ("qlora_jax", "pallas_kernels")

Damage = Callable[[random.Random, Path], str]
Read = Callable[[Path], Sequence[object]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileKind:
    """Damages a copy of sound files and reads it.

    Attributes:
      write: writes the sound files into an existing folder.
      damage: damages the files in a folder; returns what it did.
      read: reads the files in a folder; returns all that later steps depend on: arrays, texts, numbers.
      shared: name of the sound files, if several kinds have the same.
      variants: True if `write` makes several folders; each case damages one.
      digested: True if the files hold digests or are generated again, so that no other result is acceptable.
    """

    write: Callable[[Path], None]
    damage: Damage
    read: Read
    shared: str | None = None
    variants: bool = False
    digested: bool = False

    def write_sound(self, folder: Path) -> None:
        """Writes the sound files."""
        self.write(folder)

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Reads sound files, and returns the function that runs a case; a variant is read when a case has it first."""
        copy = scratch / "case"
        sources = sorted(sound.iterdir()) if self.variants else [sound]

        @functools.cache
        def expected(source: Path) -> str:
            _copy(source, copy)
            return digest(self.read(copy))

        expected(sources[0])  # imports and caches are not part of a case

        def run(case: Case) -> Verdict:
            chance = random.Random(f"{case.seed}/{case.kind}/{case.number}")
            source = chance.choice(sources)
            result = expected(source)
            _copy(source, copy)
            damage = self.damage(chance, copy)
            verdict = self._judge(copy, result)
            return verdict._replace(detail=f"{verdict.detail} | {source.name}: {damage}"[:2000])

        return run

    def _judge(self, folder: Path, expected: str) -> Verdict:
        found: list[str] = []
        message = io.StringIO()
        warn_without_digests.cache_clear()  # each case warns
        try:
            with contextlib.redirect_stderr(message), warnings.catch_warnings(action="always"):
                run_main(lambda _: found.append(digest(self.read(folder))), [])
        except SystemExit as end:
            return judge_message(message.getvalue(), folder, end.__context__)
        except MemoryError:
            raise
        except BaseException as error:  # a panic of a Rust library does not derive from Exception
            return Verdict("traceback", describe(error))
        if found == [expected]:
            return Verdict("same")
        if not self.digested:
            return Verdict("other")
        return Verdict("warned" if any(t in message.getvalue() for t in TOLD) else "silent", "another result")


def _copy(sound: Path, copy: Path) -> None:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(sound, copy)


def judge_message(message: str, folder: Path, error: BaseException | None) -> Verdict:
    """Returns "refused" for a message that names a key or a file in `folder`, and is fit for a terminal."""
    problem = None
    if str(folder) not in message and not (error is not None and _is_ours(error) and KEY.search(message)):
        problem = "names neither file nor key"
    elif CONTROL.search(message):
        problem = "has control characters"
    elif len(message) > LONGEST_MESSAGE:
        problem = f"has more than {LONGEST_MESSAGE} characters"
    if problem is None:
        return Verdict("refused")
    return Verdict("unclear", f"{problem}: {describe(error)}" if error else f"{problem} | {message[:300]}")


def _is_ours(error: BaseException) -> bool:
    """Returns True if our code raised the error, not a library that it calls."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return any(f"/{package}/" in last.filename for package in OURS)


def describe(error: BaseException) -> str:
    """Returns the type of an error and its place in our code; the message follows "|"."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if any(f"/{package}/" in frame.filename for package in OURS)]
    place = next((f"{Path(f.filename).parent.name}/{Path(f.filename).name}:{f.lineno}" for f in reversed(ours)), "?")
    message = " ".join(str(error).encode("utf-8", "backslashreplace").decode().split())
    return f"{type(error).__name__} at {place} | {message[:300]}"
