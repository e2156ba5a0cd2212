"""Uploads an exported folder to a new repository on a Hugging Face Hub.

huggingface_hub does the work, so its login and environment apply: HF_TOKEN, HF_ENDPOINT. Files appear in one commit.
After a failure, parts that the Hub has are not sent again.
"""

import contextlib
import shlex
import types
from collections.abc import Iterator
from pathlib import Path

from qlora_jax.io.hf.hub import NAME, load_library
from qlora_jax.terminal.visible import without_passwords

OF_THE_HUB = ".gitattributes"  # the Hub writes it into each new repository
LOGIN = "Give a token that may write: HF_TOKEN, or hf auth login"
FIXES = {
    401: LOGIN,
    403: LOGIN,
    413: "Free storage of this account, or make the model smaller",
    429: "Wait as long as the Hub asks for",
}


def check_name(repo: str) -> None:
    """Raises ValueError if a repository's name is not org/name."""
    match = NAME.fullmatch(repo)
    if match is None or match["repo"] != repo:
        raise ValueError(f"push: found {repo!r}, expected org/name. Give the name of a new repository")


def check_vacant(repo: str) -> None:
    """Checks that a repository does not exist or is empty, and that the Hub answers.

    Raises:
      ValueError: it has files, or the Hub cannot be asked.
    """
    if files := _files_of(repo):
        shown = ", ".join(files[:3])
        raise ValueError(f"push: {repo} exists (found {shown}, expected no files). Choose another name")


def push_folder(folder: Path, repo: str) -> str:
    """Uploads a folder to a private repository, which is created if it does not exist; returns its address.

    Raises:
      ValueError: the Hub refuses it or does not answer; says how to continue.
    """
    hub = load_library(f"push: {repo}")
    api = hub.HfApi()
    with _translated(hub, f"push: {repo}: {{}}. The export is complete: {upload_command(folder, repo)} continues"):
        api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload an export of qlora_jax")
    return f"{without_passwords(hub.constants.ENDPOINT)}/{repo}"


def upload_command(folder: Path, repo: str) -> str:
    """Returns the command that continues an upload; it sends no file again that the Hub has."""
    return shlex.join(["hf", "upload", repo, str(folder), ".", "--private"])


def _files_of(repo: str) -> list[str]:
    hub = load_library(f"push: {repo}")
    with _translated(hub, f"push: {repo}: {{}}"):
        try:
            return [name for name in hub.HfApi().list_repo_files(repo) if name != OF_THE_HUB]
        except hub.errors.RepositoryNotFoundError:  # also the answer for a private repository of somebody else
            return []


@contextlib.contextmanager
def _translated(hub: types.ModuleType, text: str) -> Iterator[None]:
    """Turns errors of the Hub into a ValueError, which is not chained: their texts may have the password of a URL.

    Args:
      text: the error, with {} for the problem.
    """
    try:
        yield
    except (hub.errors.HTTPError, OSError) as error:
        raise ValueError(text.replace("{}", _problem(error))) from None
    except RuntimeError as error:  # huggingface_hub's for a large file; the cause is the Hub's answer
        raise ValueError(text.replace("{}", _problem(error.__cause__ or error))) from None


def _problem(error: BaseException) -> str:
    """Returns the Hub's answer in a line, with what to do."""
    response = getattr(error, "response", None)
    if response is None:
        said = without_passwords(next(iter(str(error).splitlines()), type(error).__name__))
        return f"the Hub does not answer ({said}). Try again later"
    said = getattr(error, "server_message", None) or response.reason_phrase
    return f"the Hub answers {response.status_code} ({said}). {FIXES.get(response.status_code, 'Try again later')}"
