"""Pages on a mesh of eight virtual devices: the bits of the update without pages, and one device's bytes."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from qlora_jax.config import OptimArgs
from qlora_jax.models.partition import lora_specs
from qlora_jax.optim import make_elementwise, make_optimizer
from qlora_jax.optim import page_pool as page_pool_module
from qlora_jax.optim.optax_chain import from_optax, init_state, page_out_all, to_optax, unpage
from qlora_jax.optim.page_layout import layer_pages
from qlora_jax.optim.page_pool import Memory, ShardedMemory, memory_of, on_device, page_bytes
from qlora_jax.optim.pager import PagedUpdate, paged_init, resident_bytes
from qlora_jax.sharding import make_mesh
from qlora_jax.training.step import update
from tests.marks import first_always
from tests.optim.mesh_lora import LAYERS, assert_same_bits, lora_of, on_mesh

ARGS = OptimArgs(name="adamw_8bit", max_grad_norm=0.3, weight_decay=0.1)
STEPS = 3


class Run:
    """A paged run on a mesh, with a page for each layer."""

    def __init__(self, args: OptimArgs = ARGS, data: int = 1):
        self.args, self.mesh = args, make_mesh(data, 8 // data)
        self.memory, transform = memory_of(self.mesh), make_elementwise(args, 10)
        self.lora = on_mesh(lora_of(0), self.mesh)
        specs = lora_specs(self.lora, self.mesh)
        self.layout = layer_pages(transform, self.lora, 1, specs=specs, mesh=self.mesh)
        self.update = PagedUpdate(transform, self.layout, self.memory, args.max_grad_norm)
        self.state = paged_init(transform, self.lora, self.layout, self.memory)
        self.norms = []

    def go(self, share: float) -> "Run":
        budget = int(share * self.layout.total_bytes)
        for step in range(STEPS):
            grads = on_mesh(lora_of(100 + step, 0.01), self.mesh)
            self.lora, self.state, norm, _ = self.update(self.lora, self.state, grads, budget)
            self.norms.append(norm)
        return self

    def optax(self):
        return to_optax(self.state, self.layout, self.memory)


def plain(args: OptimArgs, data: int = 1):
    """(parameters, state, norms) of the same steps without pages."""
    mesh, optimizer = make_mesh(data, 8 // data), make_optimizer(args, 10)
    lora = on_mesh(lora_of(0), mesh)
    state, norms = init_state(optimizer, lora, lora_specs(lora, mesh), mesh), []
    for step in range(STEPS):
        lora, state, norm = update(optimizer, lora, state, on_mesh(lora_of(100 + step, 0.01), mesh), mesh=mesh)
        norms.append(norm)
    return lora, state, norms


@pytest.mark.parametrize(
    ("name", "data", "share"), first_always([("adamw_8bit", 2, 0.5), ("adamw_8bit", 1, 0.0), ("lion_32bit", 1, 1.0)])
)
def test_pages_on_a_mesh_change_no_bit(name, data, share):
    args = dataclasses.replace(ARGS, name=name)
    run = Run(args, data).go(share)
    assert run.layout.count == LAYERS
    assert sum(map(on_device, run.state.pages)) == int(share * LAYERS)
    assert resident_bytes(run.state) == int(share * run.layout.total_bytes)
    assert_same_bits((run.lora, run.optax(), run.norms), plain(args, data))


def test_pages_on_the_host_keep_their_cut_and_bytes_are_one_devices():
    run = Run()
    pages = run.state.pages
    assert not any(map(on_device, pages))
    assert {leaf.sharding.memory_kind for page in pages for leaf in page} == {"pinned_host"}
    assert any(leaf.sharding.spec == P(None, "fsdp") for leaf in pages[0])
    of_a_device = [sum(leaf.addressable_shards[0].data.nbytes for leaf in page) for page in pages]
    assert [page_bytes(page) for page in pages] == of_a_device == [run.layout.page_bytes(i) for i in range(LAYERS)]
    assert sum(of_a_device) == run.layout.total_bytes < sum(leaf.nbytes for page in pages for leaf in page) / 2


def test_a_whole_state_on_the_mesh_becomes_pages_and_pages_become_whole():
    run = Run()
    structure, rng = jax.tree.structure(run.optax()), np.random.default_rng(0)
    values = [rng.integers(0, 200, leaf.shape).astype(leaf.dtype) for leaf in run.layout.leaves]
    shardings = [run.memory.device_sharding(run.layout.spec(index)) for index in range(len(values))]
    state, moved = page_out_all(
        jax.tree.unflatten(structure, jax.device_put(values, shardings)), run.layout, run.memory
    )
    assert moved.bytes_out == run.layout.total_bytes and not any(map(on_device, state.pages))
    on_host = to_optax(state, run.layout, run.memory)
    again = from_optax(on_host, run.layout, run.memory)  # as from a checkpoint, which is restored to the host
    assert_same_bits((on_host, again.pages, again.shared), (values, state.pages, state.shared))
    whole, moved = unpage(state, structure, run.layout, run.memory)
    assert moved.bytes_in == run.layout.total_bytes
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(whole)} == {"device"}
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(whole)} == {8}
    assert_same_bits(whole, values)


class Reporting:
    """A device that reports its memory."""

    def __init__(self, limit: int, in_use: int):
        self._numbers = {"bytes_limit": limit, "bytes_in_use": in_use}

    def memory_stats(self):
        return self._numbers


def test_room_is_the_least_over_devices(monkeypatch):
    memory = memory_of(make_mesh(1, 8))
    assert isinstance(memory, ShardedMemory) and len(memory.devices) == 8
    devices = [Reporting(100, 10), Reporting(90, 20), Reporting(100, 30)]
    monkeypatch.setattr(ShardedMemory, "devices", devices)
    assert memory.statistics() == {"bytes_limit": 90, "bytes_in_use": 30}
    monkeypatch.setattr(ShardedMemory, "devices", jax.devices())
    assert memory.statistics() is None  # as on a CPU


def test_a_mesh_without_pinned_memory_is_refused(monkeypatch):
    monkeypatch.setattr(page_pool_module, "host_kind", lambda device: "numpy")
    with pytest.raises(ValueError, match=r"optim\.paging: this backend has no pinned host memory.*paging=off"):
        memory_of(make_mesh(1, 8))
    assert memory_of(None) == Memory(jax.local_devices()[0], "numpy")


def test_parts_of_a_replicated_array_are_read_once():
    mesh = make_mesh(2, 4)
    memory = memory_of(mesh)
    values = np.arange(4 * 8, dtype=np.float32).reshape(4, 8)
    cut = jax.device_put(values, memory.device_sharding(P(None, "fsdp")))
    whole = jax.device_put(values, memory.device_sharding(P()))
    assert (len(memory.parts(cut)), len(memory.parts(whole))) == (4, 1)
    for leaf, spec in ((cut, P(None, "fsdp")), (whole, P())):
        joined = memory.joined(memory.parts(leaf), leaf.shape, spec)
        assert joined.sharding.memory_kind == "pinned_host"
        np.testing.assert_array_equal(joined, values)
