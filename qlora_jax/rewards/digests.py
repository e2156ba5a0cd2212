"""Digests of the files that a command line names: a run stores them, and a resumed run must have the same.

A digest covers the bytes of the file, and not the modules that it imports.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from qlora_jax.config import Config
from qlora_jax.config.rewards import split_code
from qlora_jax.verifiers.process import SCHEME, Address, is_address, verifiers_digest

# Option -> name of a function -> `file`, as given, and `sha256` of its bytes. It can be stored as JSON.
CodeDigests = Mapping[str, Mapping[str, Mapping[str, str]]]


def code_digests(config: Config) -> CodeDigests:
    """Returns the files of a run's functions, in the order of the command line.

    Raises:
      ValueError: a value is not FILE.py:NAME.
      OSError: a file cannot be read.
    """
    environment = [] if config.environment is None else [config.environment]
    given = {"--reward": config.reward, "--tool": config.tool, "--environment": environment}
    return {flag: _digests(places, flag) for flag, places in given.items()}


def _digests(places: Sequence[str], flag: str) -> dict[str, dict[str, str]]:
    if any(map(is_address, places)):
        (place,) = places
        return {Address.parse(place).name: {"file": SCHEME.rstrip(":"), "sha256": verifiers_digest(place)}}
    named = {name: file for file, name in (split_code(place, flag) for place in places)}
    return {
        name: {"file": file, "sha256": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
        for name, file in named.items()
    }


def check_same_code(stored: CodeDigests, given: CodeDigests, *, accept_changed: bool) -> None:
    """Raises ValueError if a resumed run has other functions than it had; a moved file is the same.

    Args:
      stored, given: of `code_digests`, when the run started and now.
      accept_changed: files may have changed; functions may not be missing or new.
    """
    problems = [
        problem
        for flag, files in given.items()
        for problem in _problems(flag, stored.get(flag, {}), files, accept_changed)
    ]
    if problems:
        raise ValueError("\n  ".join(["the run's functions differ:", *dict.fromkeys(problems)]))


def _problems(
    flag: str, stored: Mapping[str, Mapping[str, str]], given: Mapping[str, Mapping[str, str]], accept_changed: bool
) -> list[str]:
    problems = [
        f"{flag}: {each['file']}:{name} is missing, with which the run started. Add {flag} {each['file']}:{name}"
        for name, each in stored.items()
        if name not in given
    ]
    problems += [
        f"{flag}: the run started without {each['file']}:{name}. Remove it, or start a new run"
        for name, each in given.items()
        if name not in stored
    ]
    if not problems and [*stored] != [*given]:
        problems.append(f"{flag}: found the order {', '.join(given)}, expected {', '.join(stored)}. Restore it")
    return problems + [
        f"{each['file']}: has changed since the run started (found {each['sha256'][:12]}, expected "
        f"{stored[name]['sha256'][:12]}). Restore it, or add --accept_changed_reward"
        for name, each in given.items()
        if name in stored and each["sha256"] != stored[name]["sha256"] and not accept_changed
    ]
