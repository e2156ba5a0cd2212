"""The private names of JAX that the callback for lost processes needs; a change of JAX fails here by name."""

import pytest
from jax._src import distributed
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]  # a library without declarations

from qlora_jax.hosts.watchdog import calls_when_lost

CALLBACK = "missed_heartbeat_callback"


class Made(Exception):
    """Has the arguments with which JAX would have made its client."""


def test_jaxlibs_client_takes_the_callback():
    assert f"{CALLBACK}: collections.abc.Callable" in (_jax.get_distributed_runtime_client.__doc__ or "")


def test_jax_makes_its_client_by_the_name_that_is_replaced(monkeypatch: pytest.MonkeyPatch):
    def make(*args: object, **options: object) -> None:
        raise Made(options)

    monkeypatch.setattr(_jax, "get_distributed_runtime_client", make)
    lost: list[bool] = []
    with calls_when_lost(lambda: lost.append(True)), pytest.raises(Made) as made:
        distributed.State().initialize("127.0.0.1:1", 2, 1, local_device_ids=[], cluster_detection_method="deactivate")
    made.value.args[0][CALLBACK]("a status")
    assert lost == [True] and _jax.get_distributed_runtime_client is make
