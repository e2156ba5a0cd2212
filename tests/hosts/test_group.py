"""The private names of JAX that groups need; a change of JAX fails here by name."""

import pytest
from jax._src import distributed
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]  # a library without declarations

from qlora_jax.hosts.group import client

ARGUMENTS = {
    "key_value_set": "key: str, value: str, allow_overwrite: bool",
    "blocking_key_value_get": "key: str, timeout_in_ms: int",
    "key_value_dir_get": "key: str",
}


@pytest.mark.parametrize("method", ARGUMENTS)
def test_jaxlibs_client_has_the_methods(method: str):
    assert ARGUMENTS[method] in (getattr(_jax.DistributedRuntimeClient, method).__doc__ or "")


def test_jax_notes_its_client(monkeypatch: pytest.MonkeyPatch):
    made = object()
    monkeypatch.setattr(distributed.State(), "client", made)  # the class has the attribute
    monkeypatch.setattr(distributed.global_state, "client", made)
    assert client() is made
