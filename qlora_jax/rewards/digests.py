"""Digests of the files that rewards come from: a run stores them, and a resumed run must have the same.

A digest covers the bytes of the file, and not the modules that it imports.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from qlora_jax.config import Config
from qlora_jax.config.rewards import split_code
from qlora_jax.verifiers.process import SCHEME, Address, is_address, verifiers_digest

# Option or setting -> name of a function -> `file`, as given, and `sha256` of its bytes. It can be stored as JSON.
CodeDigests = Mapping[str, Mapping[str, Mapping[str, str]]]
FILE_SETTINGS = ("schema", "judge_prompt")


def code_digests(config: Config) -> CodeDigests:
    """Returns the files of a run's functions, in the order of the command line, and those that `rewards` names.

    Raises:
      ValueError: a value is not FILE.py:NAME, or a file cannot be read.
    """
    played = config.environment if is_address(config.environment) else None
    environment = [] if config.environment in (None, played) else [config.environment]
    given = {"--reward": config.reward, "--tool": config.tool, "--environment": environment}
    named = {flag: [split_code(place, flag) for place in places] for flag, places in given.items()}
    settings = {name: getattr(config.rewards, name) for name in FILE_SETTINGS}
    named |= {f"rewards.{name}": [(file, name)] for name, file in settings.items() if file is not None}
    found = {
        flag: {name: {"file": file, "sha256": _digest(flag, file)} for file, name in files}
        for flag, files in named.items()
    }
    if played is not None:
        version = {"file": SCHEME.rstrip(":"), "sha256": verifiers_digest(played)}
        found["--environment"] = {Address.parse(played).name: version}
    return found


def _digest(flag: str, file: str) -> str:
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{flag}: {file} cannot be read (found {error.strerror}). Name a file") from error


def check_same_code(stored: CodeDigests, given: CodeDigests, *, accept_changed: bool) -> None:
    """Raises ValueError if a resumed run has other functions than it had; a moved file is the same.

    Args:
      stored, given: of `code_digests`, when the run started and now.
      accept_changed: files may have changed; functions may not be missing or new.
    """
    problems: list[str] = []
    for flag, files in given.items():
        before = stored.get(flag, {})
        if flag.startswith("--"):  # settings are compared elsewhere
            problems += _other_functions(flag, before, files)
        problems += [] if accept_changed else _changed_files(before, files)
    if problems:
        raise ValueError("\n  ".join(["the run's functions differ:", *dict.fromkeys(problems)]))


def _other_functions(
    flag: str, stored: Mapping[str, Mapping[str, str]], given: Mapping[str, Mapping[str, str]]
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
    return problems


def _changed_files(stored: Mapping[str, Mapping[str, str]], given: Mapping[str, Mapping[str, str]]) -> list[str]:
    return [
        f"{each['file']}: has changed since the run started (found {each['sha256'][:12]}, expected "
        f"{stored[name]['sha256'][:12]}). Restore it, or add --accept_changed_reward (in Python "
        "accept_changed_reward=True)"
        for name, each in given.items()
        if name in stored and each["sha256"] != stored[name]["sha256"]
    ]
