"""Uploads of exports to a local stand-in for the Hub: files, failures, and names that exist."""

import hashlib
import importlib
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qlora_jax.io.hf.push import check_name, check_vacant, push_folder
from tests.io.hub_server import Hub, running

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # huggingface_hub's own
REPO, TOKEN = "me/mine", "hf_written_nowhere"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with running(monkeypatch, tmp_path / "cache") as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out/base").mkdir(parents=True)
    (tmp_path / "out/model.gguf").write_bytes(b"GGUF" + bytes(5000))
    (tmp_path / "out/base/config.json").write_text("{}")
    (tmp_path / "out/README.md").write_text("---\nlicense: mit\n---\ncard\n")
    return tmp_path / "out"


def _files(hub: Hub) -> dict[str, bytes]:
    return hub.repos[REPO][hub.commit(REPO, "main") or ""]


def test_files_appear_in_one_commit_of_a_private_repository(hub: Hub, folder: Path) -> None:
    check_vacant(REPO)
    assert push_folder(folder, REPO) == f"{hub.url}/{REPO}"
    expected = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert _files(hub) == expected | {".gitattributes": b""}
    assert hub.private == {REPO} and len(hub.repos[REPO]) == 2
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert not any(TOKEN.encode() in body for body in _files(hub).values())


@pytest.mark.parametrize(
    ("path", "status", "problem"),
    [
        ("/api/repos/create", 403, "the Hub answers 403 .*Give a token that may write: HF_TOKEN, or hf auth login"),
        ("/commit/main", 429, "the Hub answers 429 .*Wait as long as the Hub asks for"),
        ("/commit/main", 413, "the Hub answers 413 .*Free storage"),
    ],
)
def test_a_failure_says_how_to_continue_and_then_continues(
    hub: Hub, folder: Path, path: str, status: int, problem: str
) -> None:
    hub.failures[path] = [status] * 20
    with pytest.raises(ValueError, match=f"push: {REPO}: {problem}.*hf upload {REPO} .*continues") as error:
        push_folder(folder, REPO)
    assert TOKEN not in str(error.value) and error.value.__cause__ is None
    sent = hub.puts
    assert REPO not in hub.repos or _files(hub).keys() == {".gitattributes"}  # nothing half-written
    hub.failures.clear()
    check_vacant(REPO)
    push_folder(folder, REPO)
    assert _files(hub)["model.gguf"] == (folder / "model.gguf").read_bytes()
    assert hub.puts == 1 and sent == (path == "/commit/main")  # stored files are not sent again


def test_rate_limits_of_large_files_are_waited_for(hub: Hub, folder: Path) -> None:
    hub.failures["objects/batch"] = [429, 503]
    push_folder(folder, REPO)
    assert "model.gguf" in _files(hub)


def test_a_name_that_exists(hub: Hub) -> None:
    hub.push(REPO, {"model.safetensors": b"other"})
    with pytest.raises(ValueError, match=r"push: me/mine exists \(found model.safetensors, expected no files\)"):
        check_vacant(REPO)
    for name in ("mine", "me/mine@main", "me/mine/x.gguf", "/me/mine", "me/mi ne"):
        with pytest.raises(ValueError, match="expected org/name"):
            check_name(name)


def test_a_hub_that_does_not_answer(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://user:password@127.0.0.1:9")
    for call in (lambda: check_vacant(REPO), lambda: push_folder(folder, REPO)):
        with pytest.raises(ValueError, match="push: me/mine: the Hub does not answer") as error:
            call()
        assert "password" not in str(error.value)


def test_an_interrupted_upload_continues_by_the_command_in_the_error(hub: Hub, folder: Path) -> None:
    """The Hub fails at one of two large files. The command sends that file alone, and nothing was in the repository."""
    (folder / "other.gguf").write_bytes(b"GGUF" + bytes(9000))
    failing = hashlib.sha256((folder / "other.gguf").read_bytes()).hexdigest()
    hub.failures[f"/lfs/{failing}"] = [500] * 20
    with pytest.raises(ValueError, match=f"push: {REPO}: the Hub answers 500 ") as error:
        push_folder(folder, REPO)
    assert hub.puts == 1 and failing not in hub.stored and _files(hub).keys() == {".gitattributes"}
    hub.failures.clear()
    found = re.search(r"(hf upload .* --private) continues", str(error.value))
    assert found is not None
    program, *arguments = found[1].split()
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_CACHE": str(folder.parent / "cache")}
    command = [str(Path(sys.executable).with_name(program)), *arguments]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert hub.puts == 2 and {"model.gguf", "other.gguf"} <= _files(hub).keys() and hub.private == {REPO}


def test_progress_is_shown_and_the_token_is_not_logged(
    hub: Hub,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    bars = importlib.import_module("huggingface_hub.utils.tqdm")  # the package's attribute of this name is a class
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    with caplog.at_level(logging.DEBUG):
        push_folder(folder, REPO)
    shown = capfd.readouterr()
    assert "model.gguf" in shown.err and "100%" in shown.err and hub.tokens == {f"Bearer {TOKEN}"}
    assert caplog.records and TOKEN not in shown.out + shown.err + caplog.text
