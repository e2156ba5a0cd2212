"""Models by their name on a Hugging Face Hub: `org/name`, `org/name@revision`, `org/name/file.gguf`.

huggingface_hub does the work, so its cache, token and switches hold: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE. Of a repository only what is read here is fetched: no pickles, no second copy of the weights.
"""

import contextlib
import dataclasses
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qlora_jax.io.hf.reader import INDEX, SINGLE, read_index

# The grammar of hf:// addresses: a revision follows the name, and a slash in it is written %2F.
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[^/@]+))?(/(?P<file>.+\.gguf))?")
CONFIG = "config.json"
DESCRIPTION = (
    *(CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "chat_template.jinja", INDEX),
)
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on the Hub.

    Attributes:
      repo: "org/name".
      revision: a branch, a tag or a commit; None for the repository's own default.
      file: a GGUF file in it; None for a folder of safetensors.
    """

    repo: str
    revision: str | None
    file: str | None

    @classmethod
    def of(cls, text: str) -> "HubName | None":
        """What `text` names; None where it does not have the form of such a name."""
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
    """A model in the cache: its folder or GGUF file there, and its name with the commit that this is."""

    path: Path
    name: HubName


def named(path: str | Path) -> HubName | None:
    """The model on the Hub that `path` names; None where something lies at that path, or it can be no such name."""
    return None if Path(path).expanduser().exists() else HubName.of(str(path))


def fetch_model(name: HubName) -> Fetched:
    """All that is read of a model, fetched unless it is in the cache.

    Raises:
      ValueError: huggingface_hub is not installed; no such repository, revision or file; no permission; offline, and
        not whole in the cache.
    """
    if name.file is not None:
        folder = _snapshot(name, [name.file])
        if not (folder / name.file).is_file():
            raise ValueError(_absent(name, name.file))
        return Fetched(path=folder / name.file, name=_at(name, folder))
    folder = _described(name)
    name = _at(name, folder)
    weights = sorted(set(read_index(folder / INDEX).values())) if (folder / INDEX).is_file() else [SINGLE]
    _snapshot(name, weights)
    if not all((folder / file).is_file() for file in weights):
        raise ValueError(_absent(name, ", ".join(file for file in weights if not (folder / file).is_file())))
    return Fetched(path=folder, name=name)


def fetch_config(name: HubName) -> Path:
    """config.json alone; of a GGUF file the file itself, which has to be in the cache.

    Raises:
      ValueError: as `fetch_model`, or a GGUF file that is not in the cache.
    """
    if name.file is None:
        return _described(name, [CONFIG]) / CONFIG
    hub = _library(name)
    try:
        return Path(hub.hf_hub_download(name.repo, name.file, revision=name.revision, local_files_only=True))
    except hub.errors.LocalEntryNotFoundError:
        raise ValueError(
            f"{name}: a GGUF file tells of its model within, and it is not in the cache; nothing large is downloaded "
            "for a plan. Name the repository of the original model, or the model in its published size"
        ) from None


def _described(name: HubName, files: Sequence[str] = DESCRIPTION) -> Path:
    """The folder in the cache that holds what the repository has of `files`, its config at least."""
    folder = _snapshot(name, files)
    if not (folder / CONFIG).is_file():
        raise ValueError(_absent(name, CONFIG))
    return folder


def _at(name: HubName, folder: Path) -> HubName:
    """The name with its commit, which is what the cache calls a snapshot's folder."""
    return dataclasses.replace(name, revision=folder.name)


def _snapshot(name: HubName, files: Sequence[str]) -> Path:
    """The snapshot's folder, in which there are those of `files` that the repository has."""
    hub = _library(name)
    with _told(name, hub):
        return Path(hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=list(files)))


def _library(name: HubName) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise ValueError(
            f"{name}: no such file or folder, and models are fetched by name only where huggingface_hub is installed: "
            'pip install "qlora-jax[hub]"'
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _told(name: HubName, hub: Any) -> Iterator[None]:
    """What huggingface_hub raises, in one sentence with the way out."""
    errors, constants = hub.errors, hub.constants
    where = f"{constants.ENDPOINT}/{name.repo}"
    try:
        yield
    except errors.GatedRepoError:
        raise ValueError(
            f"{name} is gated: accept its terms at {where}, and give a token of that account: HF_TOKEN, or hf auth "
            "login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ValueError(
            f"{name}: no such file or folder, and no repository {where}; a private one needs a token: HF_TOKEN, or hf "
            "auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ValueError(f"{name}: {where} has no branch, tag or commit {name.revision!r}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} gives no answer"
        raise ValueError(
            f"{name}: no such file or folder; {why}, and the cache {constants.HF_HUB_CACHE} does not hold it, or not "
            f"all of it ({_first_line(error)})"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ValueError(f"{name}: {where}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _absent(name: HubName, wanted: str) -> str:
    """What the repository holds instead, and what to do about it."""
    hub = _library(name)
    with _told(name, hub):
        held = sorted(hub.HfApi().list_repo_files(name.repo, revision=name.revision))
    whole = dataclasses.replace(name, file=None)
    if ggufs := [file for file in held if file.endswith(".gguf")]:
        return f"{whole} has no {wanted}. It holds GGUF files; name one of them:" + "".join(
            f"\n  {whole}/{file}" for file in ggufs
        )
    if pickles := [file for file in held if file.endswith(PICKLES)]:
        return (
            f"{whole} has no {wanted}. It holds {pickles[0]}, a pickle: reading such a file can run any code, so it is "
            "not fetched. Look for a revision with safetensors, or convert it, if you trust it, with transformers."
        )
    return f"{whole} has no {wanted}. It holds: {', '.join(held[:20]) or 'nothing'}."
