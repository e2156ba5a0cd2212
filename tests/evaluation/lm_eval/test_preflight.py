"""The harness before a model is loaded: connection to the Hub, and errors about missing data sets."""

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from qlora_jax.evaluation.lm_eval.preflight import check_ready, connection_problem


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that refuses everything."""
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of a port at which nothing listens."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_a_server_that_refuses_is_there(server: str):
    assert connection_problem(server) is None  # BaseHTTPRequestHandler: 501


def test_a_missing_server_is_reported_unless_there_is_a_proxy(nobody: str, monkeypatch: pytest.MonkeyPatch):
    assert "refused" in str(connection_problem(nobody))
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    assert connection_problem(nobody) is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness and its libraries warn
def test_a_data_set_that_is_nowhere_ends_it_at_once(nobody: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'qlora-jax[lm-eval]'")
    pytest.importorskip("datasets", reason="datasets comes with lm-eval")
    import datasets.config
    import huggingface_hub.constants as hub

    for library, name, value in (
        (hub, "ENDPOINT", nobody),
        (hub, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_HUB_OFFLINE", False),
        (datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache")),
    ):
        monkeypatch.setattr(library, name, value)
    (tmp_path / "far_away.yaml").write_text(
        "task: far_away\ndataset_path: nobody/has_it\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{o}}"\ndoc_to_target: "{{a}}"\n'
    )
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"cannot load a data set: .*nobody/has_it") as error:
        check_ready(["far_away"], str(tmp_path), lines.append)
    for words in (f"{nobody} does not respond", str(tmp_path / "cache"), "--harness_folder"):
        assert words in str(error.value)
    assert any("does not respond" in line and "only from the cache" in line for line in lines)
    assert hub.HF_HUB_OFFLINE
