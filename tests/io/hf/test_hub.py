"""Models by name: the fetched files, their commit, the cache, and errors."""

import io
import json
import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from qlora_jax.io.hf.hub import HubName, fetch_config, fetch_model, hub_name_of
from qlora_jax.io.open_model import open_model
from qlora_jax.io.peft.reader import base_model_of
from qlora_jax.io.pretrained import open_pretrained
from qlora_jax.training.plan.target import model_features
from tests.e2e.project import write_model
from tests.io.hub_server import Hub, running
from tests.io.tiny_models import random_weights, tiny_config, write_folder, write_gguf

REPO = "org/tiny"
NEEDED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running(monkeypatch, tmp_path / "cache") as hub:
        yield hub


def set_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def names(text: str) -> HubName:
    name = HubName.parse(text)
    assert name is not None
    return name


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name-1.5_b@v1", ("org/name-1.5_b", "v1", None)),
        ("org/name@refs%2Fpr%2F1", ("org/name", "refs/pr/1", None)),
        ("org/name/file.Q4_0.gguf", ("org/name", None, "file.Q4_0.gguf")),
        ("org/name@main/sub/file.gguf", ("org/name", "main", "sub/file.gguf")),
    ],
)
def test_a_name_is_read_and_written(text: str, parts: tuple[Any, ...]) -> None:
    name = names(text)
    assert (name.repo, name.revision, name.file) == parts
    assert str(name) == text


@pytest.mark.parametrize("text", ["name", "./org/name", "~/org/name", "/org/name", "../name", "a/b/c", "org/name@a@b"])
def test_a_path_is_no_name(text: str) -> None:
    assert HubName.parse(text) is None


def test_what_lies_at_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/name").mkdir(parents=True)
    assert hub_name_of("org/name") is None
    assert hub_name_of("org/other") == names("org/other")


def test_only_what_is_read_is_fetched(hub: Hub, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "tiny")
    (folder / "original").mkdir()
    more = {"pytorch_model.bin": b"x", "consolidated.pth": b"x", "README.md": b"x", "consolidated.safetensors": b"x"}
    for name, body in more.items():
        (folder / name).write_bytes(body)
    (folder / "original/model.safetensors").write_bytes(b"x")
    commit = hub.push_folder(REPO, folder)
    source = open_model(REPO)
    assert hub.fetched == NEEDED
    assert source.hub_name == f"{REPO}@{commit}"
    assert source.tensors.keys() == open_model(folder).tensors.keys()
    hub.asked.clear()
    open_model(f"{REPO}@{commit}")
    assert hub.fetched == []  # a commit never changes


def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    config = tiny_config()
    folder = write_folder(tmp_path / "tiny", config, random_weights(config), shards=3)
    (folder / "model-00004-of-00003.safetensors").write_bytes(b"of no tensor")
    hub.push_folder(REPO, folder)
    assert open_model(REPO).tensors.keys() == random_weights(config).keys()
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert hub.fetched == ["config.json", *shards, "model.safetensors.index.json"]


def test_a_revision_is_the_one_named(hub: Hub, tmp_path: Path) -> None:
    first = hub.push_folder(REPO, write_model(tmp_path / "one"), tag="v1")
    second = hub.push_folder(REPO, write_model(tmp_path / "two", num_hidden_layers=1))
    found = {name: open_model(name) for name in (REPO, f"{REPO}@v1", f"{REPO}@{first}")}
    assert [source.hub_name for source in found.values()] == [f"{REPO}@{second}", *[f"{REPO}@{first}"] * 2]
    assert [source.config["num_hidden_layers"] for source in found.values()] == [1, 2, 2]


def test_a_plan_fetches_the_config_alone(hub: Hub, tmp_path: Path) -> None:
    hub.push_folder(REPO, write_model(tmp_path / "tiny", num_hidden_layers=3))
    assert model_features(REPO).num_layers == 3
    assert hub.fetched == ["config.json"]


def test_a_gguf_file(hub: Hub, tmp_path: Path) -> None:
    config = tiny_config()
    file = write_gguf(tmp_path / "tiny.gguf", config, random_weights(config)).read_bytes()
    commit = hub.push(REPO, {"q8/tiny.gguf": file, "other.gguf": b"x"})
    with pytest.raises(ValueError, match="not in the cache; a plan downloads nothing large"):
        fetch_config(names(f"{REPO}/q8/tiny.gguf"))
    source = open_model(f"{REPO}/q8/tiny.gguf")
    assert source.hub_name == f"{REPO}@{commit}/q8/tiny.gguf"
    assert hub.fetched == ["q8/tiny.gguf"]
    assert model_features(f"{REPO}/q8/tiny.gguf").num_layers == 2  # from the cache


@pytest.mark.parametrize(
    ("files", "name", "told"),
    [
        (
            ["a.gguf", "b.gguf"],
            REPO,
            r"config.json is missing.*one of them:\n  org/tiny/a.gguf\n  org/tiny/b.gguf",
        ),
        (["a.gguf", "config.json"], REPO, r"model.safetensors is missing.*\n  org/tiny@[0-9a-f]{40}/a.gguf"),
        (["config.json", "pytorch_model.bin"], REPO, r"model.safetensors is missing.*pytorch_model.bin, a pickle"),
        (["a.gguf"], f"{REPO}/c.gguf", r"c.gguf is missing.*\n  org/tiny/a.gguf"),
        (["config.json", "x.npz"], REPO, r"model.safetensors is missing. It contains: config.json, x.npz"),
    ],
)
def test_a_repository_without_it_tells_what_it_holds(hub: Hub, files: list[str], name: str, told: str) -> None:
    hub.push(REPO, dict.fromkeys(files, json.dumps(tiny_config()).encode()))
    with pytest.raises(ValueError, match=f"(?s){told}"):
        open_model(name)


def test_weights_are_fetched_last(hub: Hub, tmp_path: Path) -> None:
    def refuse() -> None:
        raise ValueError(f"asked after {hub.fetched}")

    folder = write_model(tmp_path / "tiny")
    hub.push_folder(REPO, folder)
    hub.push(f"{REPO}-gguf", {"tiny.gguf": b"GGUF"})
    for name in (REPO, f"{REPO}-gguf/tiny.gguf"):
        with pytest.raises(ValueError, match=r"^asked after \['config.json'\]$"):
            open_model(name, refuse)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    commit = hub.push_folder(f"{REPO}-bert", folder)
    hub.asked.clear()
    named = rf"^{REPO}-bert@{commit}/config\.json: model_type='bert' is not supported.*known are .*'llama'"
    with pytest.raises(ValueError, match=named):
        open_model(f"{REPO}-bert", refuse)
    assert hub.fetched == ["config.json"]


def test_no_such_repository_or_revision(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"org/tiny: no such file or folder, and no repository {hub.url}/org/tiny"):
        open_model(REPO)
    hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    with pytest.raises(ValueError, match="has no branch, tag or commit 'v7'"):
        open_model(f"{REPO}@v7")


def test_a_gated_repository_wants_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    hub.gated.add(REPO)
    with pytest.raises(ValueError, match=f"org/tiny is gated. Accept its terms at {hub.url}/org/tiny.*HF_TOKEN"):
        open_model(REPO)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert open_model(REPO).config["num_hidden_layers"] == 2


def test_offline_and_never_fetched(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    set_offline(monkeypatch)
    with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, and the cache .* does not contain all of it"):
        open_model(REPO)


def test_offline_after_a_plan_and_after_all(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    model_features(REPO)
    with monkeypatch.context() as offline:
        set_offline(offline)
        assert model_features(REPO).num_layers == 2
        with pytest.raises(ValueError, match=r"HF_HUB_OFFLINE is set, and the cache .* does not contain all of it"):
            open_model(REPO)
    whole = open_model(REPO)
    hub.asked.clear()
    set_offline(monkeypatch)
    again = open_model(REPO)
    assert (again.hub_name, again.tensors.keys()) == (f"{REPO}@{commit}", whole.tensors.keys())
    assert hub.asked == []


def test_a_hub_that_is_away(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"http://127.0.0.1:9 does not answer, and the cache"):
        open_model(REPO)


def test_a_password_in_the_endpoint_is_not_shown(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, expected in (
        (hub.url.replace("://", "://ann:secret@"), "no repository http://***@127.0.0.1:"),
        ("http://ann:secret@127.0.0.1:9", "http://***@127.0.0.1:9 does not answer"),
    ):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        with pytest.raises(ValueError) as caught:
            open_model(REPO)
        assert expected in str(caught.value)
        assert "secret" not in "".join(traceback.format_exception(caught.value))


def test_a_password_in_the_endpoint_is_not_logged(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError):
        open_model(REPO)
    (handler,) = logging.getLogger("huggingface_hub").handlers
    assert isinstance(handler, logging.StreamHandler)
    monkeypatch.setattr(handler, "stream", out := io.StringIO())
    logging.getLogger("huggingface_hub.utils._http").warning("'%s' of GET https://ann:secret@hub/x", "timed out")
    assert out.getvalue() == "'timed out' of GET https://***@hub/x\n"


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r'org/tiny: no such file or folder, and .*pip install "qlora-jax\[hub\]"'):
        fetch_model(names(REPO), lambda: None)


def test_an_adapter_names_its_base_and_the_commit(hub: Hub, tmp_path: Path) -> None:
    commit = hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": REPO, "revision": commit, "r": 4})
    )
    assert base_model_of(tmp_path) == f"{REPO}@{commit}"
    assert open_pretrained(model=f"{REPO}@{commit}").source.hub_name == f"{REPO}@{commit}"


@pytest.mark.slow  # another process
def test_the_environment_is_honoured(hub: Hub, tmp_path: Path) -> None:
    hub.push_folder(REPO, write_model(tmp_path / "tiny"))
    hub.gated.add(REPO)
    code = f"from qlora_jax.io.open_model import open_model; print(open_model({REPO!r}).path)"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": hub.token}

    def path(**more: str) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | settings | more
        return subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True, text=True).stdout

    assert path().startswith(f"{tmp_path}/home/hub/models--org--tiny/snapshots/")
    assert path(HF_HUB_CACHE=str(tmp_path / "there")).startswith(f"{tmp_path}/there/models--org--tiny/")
    hub.asked.clear()
    assert path(HF_HUB_OFFLINE="1", HF_TOKEN="").startswith(str(tmp_path))
    assert hub.asked == []
