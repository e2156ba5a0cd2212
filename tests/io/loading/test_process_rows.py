"""Rows by process: quantized alone and put together they are the whole weight, and its fingerprint, to the bit."""

import json
import pickle
import threading
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.formats.fsdp_parts import FsdpParts
from pallas_kernels.formats.layouts import convert_codes, layout_problem
from pallas_kernels.formats.qtensor import QTensor
from qlora_jax.io.loading import mesh_weights
from qlora_jax.io.loading.base_fingerprint import SUFFIX, new_digest
from qlora_jax.io.loading.loader import load_model, read_quantized, read_quantized_rows
from qlora_jax.io.loading.mesh_weights import Processes, ProcessRows, all_rows, rows_of_parts
from qlora_jax.io.open_model import open_model
from qlora_jax.model_source import ModelSource, TensorEntry
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.quant import quantize
from tests.hosts.processes import start, wait
from tests.io.tiny_models import random_weights, write_folder
from tests.marks import EXHAUSTIVE, SLOW, some_in_ci
from tests.training.mesh_models import CUT_VOCABULARY, mesh_config

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536), (1024, 4096), (4096, 1024), (2048, 192), (640, 2048)]
KINDS = ("normal", "small blocks", "bf16")
CASES = [
    (shape, kind, layout, parts)
    for shape in SHAPES
    for kind in KINDS
    for layout in ("bnb", "row_planar", "split_k")
    for parts in (2, 3, 4, 8, 16)
    if not layout_problem(layout, shape, 64) and shape[0] % (2 * parts if layout == "row_planar" else parts) == 0
]
IN_CI = {
    ((576, 576), "small blocks", "row_planar", 2),  # cuts go through strips and nested blocks
    ((192, 576), "bf16", "split_k", 3),
}


def _weight(shape: tuple[int, int], kind: str) -> np.ndarray:
    weight = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    if kind == "small blocks":  # blocks that XLA would flush: zero, subnormal, tiny
        weight[3, :64] = 0
        weight[5, :64] *= 1e-41
        weight[shape[0] // 2, -64:] *= 1e-36
    return weight.astype(ml_dtypes.bfloat16) if kind == "bf16" else weight


def _entry(weight: np.ndarray, read: list[tuple[int, int]]) -> TensorEntry:
    def read_rows(first: int, end: int) -> np.ndarray:
        read.append((first, end))
        return weight[first:end]

    return TensorEntry(
        name="w",
        shape=weight.shape,
        file_type="F32",
        nbytes=weight.nbytes,
        read_rows=read_rows,
        ranges_of=lambda *_: (),
    )


class _Gather:
    """process_allgather among threads, each of which stands for a process."""

    def __init__(self, count: int):
        self._barrier = threading.Barrier(count, timeout=60)
        self._given: dict[int, np.ndarray] = {}
        self.this = threading.local()

    def __call__(self, array: np.ndarray) -> np.ndarray:
        self._given[self.this.number] = array
        self._barrier.wait()
        found = np.stack([self._given[number] for number in sorted(self._given)])
        self._barrier.wait()
        return found


def _as_processes(count: int, work, monkeypatch: pytest.MonkeyPatch) -> list:
    gather, found = _Gather(count), [None] * count
    monkeypatch.setattr(mesh_weights.multihost_utils, "process_allgather", gather)

    def run(number: int) -> None:
        gather.this.number = number
        found[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(("shape", "kind", "layout", "parts"), some_in_ci(CASES, lambda index: CASES[index] in IN_CI))
def test_rows_of_each_process_are_the_weight_to_the_bit(shape, kind, layout, parts, tmp_path, monkeypatch) -> None:
    weight = _weight(shape, kind)
    source = ModelSource(path=tmp_path, config={}, tokenizer={}, tensors={})
    spec = quantize(weight)
    whole = jax.tree.map(np.asarray, read_quantized(source, _entry(weight, []), spec))
    cut = FsdpParts(layout, shape, 0, parts)
    places = tuple(frozenset({part}) for part in range(parts))
    read: list[list[tuple[int, int]]] = [[] for _ in range(parts)]

    def process(number: int) -> tuple[np.ndarray, dict[str, np.ndarray], str]:
        rows = rows_of_parts(shape[0], Processes(places, number), cut.rows)
        codes, constants = read_quantized_rows(source, _entry(weight, read[number]), spec, rows)
        own = rows.take(codes, cut.rows(number))
        part = convert_codes(own, (len(own), shape[1]), "bnb", layout)
        return np.asarray(part), constants, _fingerprint(codes, rows, constants)

    found = _as_processes(parts, process, monkeypatch)
    expected = convert_codes(whole.codes, shape, "bnb", layout)
    np.testing.assert_array_equal(np.concatenate([part for part, _, _ in found]), expected, strict=True)
    one = _fingerprint(whole.codes, all_rows(shape[0]), _constants(whole))
    for number, (_, constants, fingerprint) in enumerate(found):
        for name, leaf in _constants(whole).items():
            np.testing.assert_array_equal(constants[name], leaf, strict=True)
        assert fingerprint == one and one.endswith(SUFFIX)
        wanted = sum(end - first for first, end in cut.rows(number))
        assert sum(end - first for first, end in read[number]) <= wanted + 2 * 63 * len(cut.rows(number))


@pytest.mark.parametrize("count", [pytest.param(4, marks=SLOW), pytest.param(2, marks=EXHAUSTIVE)])
def test_real_processes_read_their_share_and_hold_the_parts_of_one(count: int, tmp_path: Path) -> None:
    """On 2 x 4 devices; every matrix has whole strips for each process, so each of its bytes is read once in all."""
    config = mesh_config(CUT_VOCABULARY, num_key_value_heads=8)
    folder, weights = tmp_path / "model", random_weights(config)
    source = open_model(write_folder(folder, config, weights))
    one = load_model(source, model_config(source.config), WeightFormat(dtype="float32"))
    ended = wait({"run": start(tmp_path, count, devices=8 // count, model=str(folder))})["run"]
    assert [each.code for each in ended] == [0] * count, ended
    found = [json.loads(each.out.splitlines()[-1]) for each in ended]
    matrices, vectors = (sum(each.nbytes for each in weights.values() if each.ndim == ndim) for ndim in (2, 1))
    assert [each["read"] for each in found] == [matrices // count + vectors] * count
    assert {each["fingerprint"] for each in found} == {one.fingerprint}
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(one.model))
    whole = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    parts = [part for process in range(count) for part in pickle.loads((tmp_path / f"parts.{process}").read_bytes())]
    assert {name for name, _, _ in parts} == whole.keys() and len(parts) == 8 * len(whole)
    for name, place, part in parts:
        np.testing.assert_array_equal(part, whole[name][place], strict=True, err_msg=name)


def _constants(weight: QTensor) -> dict[str, np.ndarray]:
    return {name: getattr(weight, name) for name in ("absmax_codes", "nested_absmax", "nested_offset")}


def _fingerprint(codes: np.ndarray, rows: ProcessRows, constants: dict[str, np.ndarray]) -> str:
    digest = new_digest(b"settings", None)
    digest.name("w")
    digest.add(codes, rows)
    for leaf in constants.values():
        digest.add_whole(leaf)
    return digest.fingerprint()


def test_a_process_reads_the_strips_of_its_devices() -> None:
    cut = FsdpParts("row_planar", (1024, 64), 0, 8)  # 64 rows of each half a part
    halves = Processes((frozenset({0, 1, 2, 3}), frozenset({4, 5, 6, 7})), 1)
    rows = rows_of_parts(1024, halves, cut.rows)
    assert rows.by_process == (((0, 256), (512, 768)), ((256, 512), (768, 1024)))
    assert rows.strips().by_process == (((0, 4), (8, 12)), ((4, 8), (12, 16)))
    ragged = rows_of_parts(120, Processes((frozenset({0}), frozenset({1}))), FsdpParts("bnb", (120, 64), 0, 2).rows)
    assert ragged.by_process == (((0, 64),), ((0, 120),))  # the strip in which the cut lies is read by both
    assert rows_of_parts(1024, Processes((frozenset(range(8)),)), cut.rows).read_by_all


def test_processes_that_hold_the_same_rows_share_the_reading() -> None:
    pairs = Processes((frozenset({0}), frozenset({1}), frozenset({0}), frozenset({1})), 2)
    rows = rows_of_parts(1000, pairs, FsdpParts("bnb", (1000, 64), 0, 2).rows)
    assert rows.by_process == (((0, 256),), ((448, 704),), ((256, 512),), ((704, 1000),)) and rows.shared
    whole = rows_of_parts(256, pairs.of_whole(), FsdpParts("bnb", (256, 64)).rows)
    assert whole.by_process == (((0, 64),), ((64, 128),), ((128, 192),), ((192, 256),)) and whole.shared
    crossed = Processes((frozenset({0}), frozenset({0, 1}), frozenset({1})))
    each = rows_of_parts(192, crossed, FsdpParts("bnb", (192, 64), 0, 2).rows)
    assert each.by_process == (((0, 64),), ((64, 128),), ((128, 192),)) and each.shared
    few = rows_of_parts(32, pairs.of_whole(), FsdpParts("bnb", (32, 64)).rows)
    assert few.read_by_all and not few.shared


def test_the_earlier_form_of_a_fingerprint_is_refused_among_several_processes() -> None:
    rows = rows_of_parts(128, Processes((frozenset({0}), frozenset({1}))), FsdpParts("bnb", (128, 64), 0, 2).rows)
    with pytest.raises(ValueError, match="in the form of an earlier version"):
        new_digest(b"", "ab" * 32).add(np.zeros((64, 32), np.uint8), rows)
