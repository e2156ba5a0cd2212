"""Dispatch: the target device of a call, the implementation that runs it, and the reasons against others."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels import aot, devices, dispatch
from pallas_kernels.devices import Device, device_of, target_device
from pallas_kernels.dispatch import DIRECTIONS, Call, Capabilities, Implementation, choose, refusal
from pallas_kernels.grouped_matmul import api as grouped
from pallas_kernels.kernel_report import device_of_card
from pallas_kernels.nf4_matmul import api, nf4_matmul, reference
from tests.pallas_kernels.nf4_matmul.contract import weight

CPU = Device(platform="cpu", kind="cpu")


def grouped_choice(device, call):
    return choose(device, call, grouped.IMPLEMENTATIONS, dispatch.preference(device, grouped.PREFERENCE))


H100 = Device(platform="gpu", kind="NVIDIA H100 80GB HBM3", compute_capability=(9, 0))
A100 = Device(platform="gpu", kind="NVIDIA A100-SXM4-80GB", compute_capability=(8, 0))
CALL = Call.of("forward", 16, jnp.dtype(jnp.bfloat16), weight((64, 128)))


# The target device


def test_the_first_device_where_nothing_is_set():
    assert target_device() == device_of(jax.local_devices()[0])
    assert target_device() == CPU and str(CPU) == "cpu" and CPU.names == ("cpu",)


@pytest.mark.parametrize("default", ["cpu", jax.local_devices(backend="cpu")[0]])
def test_the_default_device_by_name_or_by_itself(default):
    with jax.default_device(default):
        assert target_device() == CPU


def test_a_default_device_that_is_not_here(monkeypatch):
    """A stand-in for a device of a compile-only topology."""
    absent = SimpleNamespace(platform="gpu", device_kind=H100.kind, compute_capability="9.0")
    monkeypatch.setattr(devices, "_default_device", lambda: absent)
    assert target_device() == H100
    assert str(H100) == "NVIDIA H100 80GB HBM3 (sm_90)" and H100.names == ("sm_90", "gpu")


def test_the_mesh_comes_before_the_default_device():
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice("Tesla K80", None, "cuda"))
    with jax.default_device("cpu"), jax.sharding.use_abstract_mesh(mesh):
        assert target_device() == Device(platform="gpu", kind="Tesla K80")
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        assert target_device() == CPU
        assert jax.jit(lambda x: x + len(target_device().names))(jnp.int32(0)) == 1
    without_device = AbstractMesh((1,), ("x",), (AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(without_device):
        assert target_device() == CPU


def test_a_mesh_of_the_default_devices_kind_has_its_compute_capability(monkeypatch):
    absent = SimpleNamespace(platform="gpu", device_kind=A100.kind, compute_capability="8.0")
    monkeypatch.setattr(devices, "_default_device", lambda: absent)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice(A100.kind, 108, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        assert target_device() == A100


def test_a_compute_capability_that_is_no_number_is_unknown():
    amd = SimpleNamespace(platform="gpu", device_kind="AMD MI300X", compute_capability="gfx942")
    assert device_of(amd).names == ("gpu",)


# The implementation


@pytest.mark.parametrize(
    ("capabilities", "part"),
    [
        (Capabilities(devices=("sm_80", "sm_86")), "runs on sm_80, sm_86, not on NVIDIA H100 80GB HBM3 (sm_90)"),
        (Capabilities(layouts=("row_planar",)), "takes layout row_planar, not bnb"),
        (Capabilities(dtypes=("float16", "float32")), "takes dtype float16 or float32, not bfloat16"),
        (Capabilities(quant_types=("fp4",)), "takes quant_type fp4, not nf4"),
        (Capabilities(block_sizes=(128,)), "takes block_size 128, not 64"),
        (Capabilities(directions=("backward",)), "takes direction backward, not forward"),
        (Capabilities(rows=(1, 8)), "takes 1 to 8 rows, not 16"),
        (Capabilities(multiples=(1, 256)), "takes K that is a multiple of 256, not 128"),
    ],
)
def test_a_refusal_says_what_was_given_and_what_is_possible(capabilities, part):
    assert refusal(capabilities, H100, CALL) == part
    assert refusal(Capabilities(), H100, CALL) is None


def test_a_device_may_have_its_own_maximum_of_rows():
    capabilities = Capabilities(rows=(2, 64), most_rows_on={"sm_90": 8})
    assert refusal(capabilities, H100, CALL) == "takes 2 to 8 rows, not 16"
    assert refusal(capabilities, A100, CALL) is refusal(capabilities, H100, dataclasses.replace(CALL, rows=8)) is None


@pytest.mark.parametrize(
    ("card", "rows", "forward", "backward"),
    [
        ("rtx5090", 16, "skinny", "ampere"),
        ("gb10", 2048, "ampere", "ampere"),
        ("rtxpro6000", 2049, "reference", "reference"),
        ("b200", 256, "ampere", "ampere"),
        ("b200", 257, "reference", "reference"),
        ("l4", 2048, "ampere", "ampere"),
        ("rtx3090", 17, "ampere", "ampere"),
    ],
)
def test_each_card_gets_the_fastest_kernel_that_it_runs(card, rows, forward, backward):
    call = dataclasses.replace(CALL, layout="split_k", rows=rows)
    ways = (dataclasses.replace(call, direction=direction) for direction in DIRECTIONS)
    assert [api.choose_implementation(device_of_card(card)[0], way).name for way in ways] == [forward, backward]


@pytest.mark.parametrize("choose_for", [api.choose_implementation, grouped_choice], ids=["product", "experts"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_t4_runs_no_fused_kernel_and_says_why(choose_for, dtype):
    call = dataclasses.replace(CALL, layout="split_k", dtype=dtype)
    choice = choose_for(device_of_card("t4")[0], call)
    assert choice.name in ("reference", "loop")
    devices = "sm_80, sm_86, sm_89, sm_100, sm_120, sm_121"
    assert choice.refusals["ampere"].startswith(f"runs on {devices}, not on Tesla T4 (sm_75)")
    assert choice.refusals["skinny"].startswith(f"runs on {devices}, sm_90, not on Tesla T4 (sm_75)")


def test_all_reasons_of_a_refusal_come_at_once():
    reason = refusal(Capabilities(devices=("cpu",), layouts=("row_planar",), rows=(1, 1)), H100, CALL)
    assert reason is not None and reason.count(";") == 2


def test_the_first_of_the_order_that_does_not_refuse():
    implementations = {
        "fused": _implementation(devices=("sm_90",), rows=(64, 4096)),
        "small": _implementation(devices=("gpu",), rows=(1, 16)),
        "any": _implementation(),
    }
    names = list(implementations)
    assert choose(H100, CALL, implementations, names) == ("small", {"fused": "takes 64 to 4096 rows, not 16"})
    many = dataclasses.replace(CALL, rows=64)
    assert choose(H100, many, implementations, names) == ("fused", {})
    assert choose(CPU, many, implementations, names).name == "any"
    assert choose(CPU, many, implementations, ["small"]).name is None


def _implementation(**capabilities) -> Implementation:
    return Implementation(reference.forward, reference.backward, Capabilities(**capabilities))


@pytest.mark.parametrize(
    "device", [CPU, H100, A100, Device(platform="gpu", kind="Tesla V100", compute_capability=(7, 0))]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_device_has_an_implementation_for_every_call(device, direction):
    call = dataclasses.replace(CALL, direction=direction, layout="flat", rows=1)
    assert api.choose_implementation(device, call).name == "reference"


def test_every_order_names_implementations_and_ends_with_one_that_does_everything():
    for order in dispatch.PREFERENCE.values():
        assert set(order) <= set(api.IMPLEMENTATIONS)
        assert order[-1] == "reference"
    assert api.IMPLEMENTATIONS["reference"].capabilities == Capabilities()


@pytest.fixture
def gpu_only(monkeypatch):
    """Registers an implementation for Hopper that records its runs."""
    ran = []

    def forward(rows, weights, layer):
        ran.append("forward")
        return reference.forward(rows, weights, layer)

    def backward(rows, weights, layer):
        ran.append("backward")
        return reference.backward(rows, weights, layer)

    monkeypatch.setitem(
        api.IMPLEMENTATIONS, "hopper", Implementation(forward, backward, Capabilities(devices=("sm_90",)))
    )
    monkeypatch.setitem(dispatch.PREFERENCE, "sm_90", ("hopper", "reference"))
    return ran


def test_naming_an_implementation_forces_it_or_fails(gpu_only):
    x = jnp.ones((16, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"forward on cpu: hopper runs on sm_90, not on cpu"):
        nf4_matmul(x, weight((64, 128)), implementation="hopper")
    assert not gpu_only


def test_the_device_at_tracing_chooses_even_where_the_function_was_traced_before(gpu_only, monkeypatch):
    w, x = weight((64, 128)), jnp.ones((16, 128), jnp.bfloat16)
    step = jax.jit(jax.grad(lambda x: nf4_matmul(x, w).astype(jnp.float32).sum()))
    expected = step(x)
    assert not gpu_only
    monkeypatch.setattr(api, "target_device", lambda: H100)
    mesh = AbstractMesh((1,), ("x",), (AxisType.Auto,), abstract_device=AbstractDevice(H100.kind, 132, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):  # part of jax's trace cache key
        step.trace(x)
    assert gpu_only == ["forward", "backward"]
    np.testing.assert_array_equal(step(x), expected)


@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
@pytest.mark.parametrize(("card", "ran"), [("h100", ["forward"]), ("a100", [])])
def test_compiling_for_an_absent_card_chooses_what_that_card_runs(gpu_only, card, ran):
    devices_seen = []

    def product(x, w):
        devices_seen.append(target_device())
        return nf4_matmul(x, w)

    jitted = jax.jit(product)
    w, x = weight((64, 128)), jnp.ones((16, 128), jnp.bfloat16)
    jitted(x, w)  # traced for the CPU first
    aot.compile_for(card, jitted, x, w)
    assert gpu_only == ran
    assert devices_seen == [CPU, device_of_card(card)[0]]


# Bad calls


def _bad_calls():
    w = weight((64, 128))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), w)
    x = jnp.zeros((2, 128))
    replace = dataclasses.replace
    yield "rank", jnp.zeros(()), w, None, r"x is a scalar"
    yield "ints", jnp.zeros((2, 128), jnp.int32), w, None, r"dtype int32, expected one of bfloat16, float16, float32"
    yield "f64", np.zeros((2, 128), np.float64), w, None, r"dtype float64, expected one of bfloat16"
    yield "f8", jnp.zeros((2, 128), jnp.float8_e4m3fn), w, None, r"dtype float8_e4m3fn"
    yield "K", jnp.zeros((2, 64)), w, None, r"K=64 as its last axis, the weight \(64, 128\) \(N, K\) has K=128"
    yield "layer past the end", x, stack, 2, r"layer=2 is out of range for a stack of 2 layers"
    yield "layer before the start", x, stack, -1, r"layer=-1 is out of range for a stack of 2 layers"
    yield "shape", x, replace(w, shape=(2, 32, 128)), None, r"expected a matrix \(N, K\)"
    yield "layout", x, replace(w, layout="col_planar"), None, r"layout 'col_planar' is unknown \(known: bnb"
    yield (
        "another layout",
        x,
        replace(w, layout="row_planar"),
        None,
        r"codes \[64, 64\]: layout 'row_planar'.*\[32, 128\]",
    )
    yield "block size", x, replace(w, block_size=32), None, r"absmax_codes \[64, 2\]: layout 'bnb'.*\[64, 4\]"
    yield "codes", x, replace(w, codes=w.codes.astype(jnp.int32)), None, r"codes have dtype int32, expected uint8"
    yield "quant type", x, replace(w, quant_type="nf5"), None, r"quant_type 'nf5' is unknown \(known: nf4, fp4"


@pytest.mark.parametrize(("x", "w", "layer", "message"), [pytest.param(*rest, id=name) for name, *rest in _bad_calls()])
def test_what_no_implementation_could_do_is_a_value_error(x, w, layer, message):
    with pytest.raises(ValueError, match=message):
        nf4_matmul.__wrapped__(x, w, layer)  # without run-time type checks


def test_all_problems_of_a_call_come_at_once():
    with pytest.raises(ValueError, match=r"dtype int32.*K=64.*layer=1 requires.*'nope'"):
        nf4_matmul.__wrapped__(jnp.zeros((2, 64), jnp.int32), weight((64, 128)), 1, "nope")
