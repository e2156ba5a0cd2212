"""Fetches models by their name on a Hugging Face Hub: `org/name`, `org/name@revision`, `org/name/file.gguf`.

huggingface_hub does the work, so its cache, token and environment variables apply: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN, HF_HUB_OFFLINE. Only files that are read are fetched: no pickles, no second copy of the weights.
"""

import contextlib
import dataclasses
import logging
import re
import types
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from qlora_jax.io.hf.reader import INDEX, SINGLE, read_config, read_index
from qlora_jax.io.hf.tokenizer import PROCESSOR_FILES, TOKENIZER_FILES
from qlora_jax.io.loading.draft_layers import without_drafts
from qlora_jax.models.families import model_config
from qlora_jax.terminal.visible import without_passwords

# The grammar of hf:// addresses: the revision follows the name; a slash in a revision is written %2F.
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<file>.+\.gguf))?")
CONFIG = "config.json"
DESCRIPTION = (INDEX, *TOKENIZER_FILES, *PROCESSOR_FILES)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the Hub.

    Attributes:
      repo: "org/name".
      revision: a branch, a tag or a commit; None for the repository's default.
      file: a GGUF file in the repository; None for a folder of safetensors.
    """

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def parse(cls, text: str) -> "HubName | None":
        """Parses a name; returns None if `text` does not have the form of one."""
        match = NAME.fullmatch(text)
        if match is None:
            return None
        revision = match["revision"]
        return cls(repo=match["repo"], revision=revision and urllib.parse.unquote(revision), file=match["file"])

    def __str__(self) -> str:
        revision = f"@{urllib.parse.quote(self.revision, safe='')}" if self.revision else ""
        return f"{self.repo}{revision}" + (f"/{self.file}" if self.file else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetched:
    """A model in the cache: its folder or GGUF file, and its name with the commit as revision."""

    path: Path
    name: HubName


def hub_name_of(path: str | Path) -> HubName | None:
    """The Hub model that `path` names; None if the path exists on disk, or does not have the form of a name."""
    return None if Path(path).expanduser().exists() else HubName.parse(str(path))


def fetch_model(name: HubName, before_weights: Callable[[], object]) -> Fetched:
    """Fetches the files of a model that are read, unless they are in the cache.

    Args:
      before_weights: called after config.json is fetched and checked, before weights are fetched.

    Raises:
      ValueError: huggingface_hub is not installed; the repository, revision or file does not exist; access is denied;
        the model is not supported; or the Hub is offline and the cache incomplete.
    """
    if name.file is not None:
        before_weights()
        folder = _snapshot(name, [name.file])
        if not (folder / name.file).is_file():
            raise ValueError(_missing_file(name, name.file))
        return Fetched(path=folder / name.file, name=_at_commit(name, folder))
    folder = fetch_config(name).parent
    name = _at_commit(name, folder)
    model_config(without_drafts(read_config(folder / CONFIG)), f"{name}/{CONFIG}")
    before_weights()
    _snapshot(name, DESCRIPTION)
    weights = sorted(set(read_index(folder / INDEX).values())) if (folder / INDEX).is_file() else [SINGLE]
    _snapshot(name, weights)
    if missing := [file for file in weights if not (folder / file).is_file()]:
        raise ValueError(_missing_file(name, ", ".join(missing)))
    return Fetched(path=folder, name=name)


def fetch_config(name: HubName) -> Path:
    """Fetches only config.json; a GGUF file, which contains its config, must already be in the cache.

    Raises:
      ValueError: as `fetch_model`; or a GGUF file is not in the cache.
    """
    if name.file is None:
        folder = _snapshot(name, [CONFIG])
        if not (folder / CONFIG).is_file():
            raise ValueError(_missing_file(name, CONFIG))
        return folder / CONFIG
    hub = _library(name)
    try:
        return Path(hub.hf_hub_download(name.repo, name.file, revision=name.revision, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: a GGUF file contains its config, and this one is not in the cache; a plan downloads nothing "
            "large. Name the repository of the original model, or the model in its published size"
        ) from None


def _at_commit(name: HubName, folder: Path) -> HubName:
    """The name with its commit as revision; the cache names a snapshot's folder after its commit."""
    return dataclasses.replace(name, revision=folder.name)


def _snapshot(name: HubName, files: Sequence[str]) -> Path:
    """Fetches those of `files` that the repository has; returns their folder in the cache."""
    hub = _library(name)
    with _translated_errors(name, hub):
        return Path(hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=list(files)))


class _WithoutPasswords(logging.Filter):
    """Removes the user names and passwords of URLs, such as that of HF_ENDPOINT, from log records."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = without_passwords(record.getMessage()), ()
        return True


_WITHOUT_PASSWORDS = _WithoutPasswords()


def _library(name: HubName) -> types.ModuleType:
    return load_library(f"{name}: no such file or folder, and fetching a model by name")


def load_library(wanted: str) -> types.ModuleType:
    """Imports huggingface_hub, whose messages then have no passwords.

    Args:
      wanted: the beginning of the error, which names the user of the library.

    Raises:
      ValueError: it is not installed.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise ValueError(f'{wanted} requires huggingface_hub: pip install "qlora-jax[hub]"') from None
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_WITHOUT_PASSWORDS)  # once, however often it is added
    return huggingface_hub


@contextlib.contextmanager
def _translated_errors(name: HubName, hub: types.ModuleType) -> Iterator[None]:
    """Turns errors of huggingface_hub into a ValueError of one sentence that says what to do.

    The library's error is not chained, because its text may contain the password of the endpoint's URL.
    """
    errors, constants = hub.errors, hub.constants
    endpoint = without_passwords(constants.ENDPOINT)
    where = f"{endpoint}/{name.repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is gated. Accept its terms at {where}, and give that account's token: HF_TOKEN, or hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name}: no such file or folder, and no repository {where}; a private one requires a token: HF_TOKEN, or "
            "hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: {where} has no branch, tag or commit {name.revision!r}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{endpoint} does not answer"
        raise ValueError(
            f"{name}: no such file or folder; {why}, and the cache {constants.HF_HUB_CACHE} does not contain all of it "
            f"({_first_line(error)})"
        ) from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{name}: {where}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return without_passwords(next(iter(str(error).splitlines()), type(error).__name__))


def _missing_file(name: HubName, wanted: str) -> str:
    """Says what the repository contains instead of a file, and what to do about it."""
    hub = _library(name)
    with _translated_errors(name, hub):
        files = sorted(hub.HfApi().list_repo_files(name.repo, revision=name.revision))
    repo = dataclasses.replace(name, file=None)
    if ggufs := [file for file in files if file.endswith(".gguf")]:
        return f"{repo}: {wanted} is missing. It contains GGUF files; name one of them:" + "".join(
            f"\n  {repo}/{file}" for file in ggufs
        )
    if pickles := [file for file in files if file.endswith(PICKLES)]:
        return (
            f"{repo}: {wanted} is missing. It contains {pickles[0]}, a pickle, which is not fetched because it can run "
            "any code. Look for a revision with safetensors, or, if you trust it, convert it with transformers"
        )
    return f"{repo}: {wanted} is missing. It contains: {', '.join(files[:20]) or 'nothing'}"
