"""Cached scores are found again only for the same inputs, and also after SIGKILL at any moment."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from qlora_jax.evaluation.loglikelihood import score_rows
from qlora_jax.evaluation.tasks.letters import LetterQuestion, score_letters
from qlora_jax.inference.result_cache import ResultCache, code_digest, digest, model_digest, open_cache
from tests.e2e.project import write_model
from tests.inference.tiny import VOCAB, tiny_parts


@pytest.fixture(scope="module")
def parts():
    return tiny_parts()


def rows_of(seed: int):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, VOCAB, n).astype(np.int32), np.arange(n) > 2) for n in (20, 500, 44)]


def test_a_digest_distinguishes_dtype_shape_and_bytes():
    zeros = np.zeros(4, np.int32)
    others = [zeros.astype(np.float32), zeros.reshape(2, 2), np.arange(4, dtype=np.int32), None, "0", 0]
    digests = {digest([value]) for value in (zeros, *others)}
    assert len(digests) == 1 + len(others) and digest([zeros.copy()]) in digests


def test_cached_results_are_bit_identical_and_not_computed_again(tmp_path):
    results = [np.float32([0.1, np.nan, -0.0]), np.array([True, False])]
    first = ResultCache(tmp_path, "model").get_or_compute([1, "a"], lambda: results)
    again = ResultCache(tmp_path, "model")
    found = again.get_or_compute([1, "a"], lambda: pytest.fail("computed again"))
    for result in (first, found):
        assert [(x.dtype, x.tobytes()) for x in result] == [(x.dtype, x.tobytes()) for x in results]
    assert (again.hits, again.misses) == (1, 0)


@pytest.mark.parametrize(("model", "inputs"), [("other", [1]), ("model", [2])])
def test_another_model_or_other_inputs_find_nothing(tmp_path, model, inputs):
    ResultCache(tmp_path, "model").get_or_compute([1], lambda: [np.zeros(1)])
    other = ResultCache(tmp_path, model)
    assert other.get_or_compute(inputs, lambda: [np.ones(1)])[0] == 1 and other.misses == 1


def test_damaged_files_are_reported_and_computed_again(tmp_path):
    results = [np.float32([0.1, np.nan, -0.0]), np.array([True, False])]
    ResultCache(tmp_path, "model").get_or_compute([1, "a"], lambda: results)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    flipped = [
        content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :] for at in range(0, len(content), 11)
    ]
    others = [b"", content[:-1], content[:20], content + b"\0", content[:50] + content[40:]]
    for damaged in (*flipped, *others):
        file.write_bytes(damaged)
        cache = ResultCache(tmp_path, "model")
        with pytest.warns(UserWarning) as shown:
            found = cache.get_or_compute([1, "a"], lambda: results)
        assert [(x.dtype, x.tobytes()) for x in found] == [(x.dtype, x.tobytes()) for x in results]
        assert (cache.hits, cache.misses) == (0, 1) and file.read_bytes() == content
        (message,) = (str(one.message) for one in shown)
        assert message == f"{file}: damaged (other content than was written). The result is computed again."


def test_a_result_under_the_name_of_another_is_damaged(tmp_path):
    cache = ResultCache(tmp_path, "model")
    cache.get_or_compute([1], lambda: [np.zeros(1)])
    (first,) = tmp_path.iterdir()
    cache.get_or_compute([2], lambda: [np.ones(1)])
    (second,) = {*tmp_path.iterdir()} - {first}
    second.write_bytes(first.read_bytes())
    with pytest.warns(UserWarning, match="damaged"):
        assert cache.get_or_compute([2], lambda: [np.ones(1)])[0] == 1


def test_models_differ_by_any_array_and_by_structure(parts):
    more = jax.tree.map(lambda leaf: leaf, parts.lora)
    leaves, tree = jax.tree.flatten(more)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].add(1e-6)
    other = parts.with_lora(jax.tree.unflatten(tree, leaves))
    longer = tiny_parts(max_positions=601)
    assert len({model_digest(each) for each in (parts, other, longer)}) == 3
    assert model_digest(parts) == model_digest(tiny_parts())


def test_other_code_finds_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    before = code_digest((tmp_path,))
    (tmp_path / "folder/new.py").write_text("x = 1\n")
    after = code_digest.__wrapped__((tmp_path,))
    (tmp_path / "folder/new.py").write_text("x = 2\n")
    assert len({before, after, code_digest.__wrapped__((tmp_path,)), code_digest()}) == 4


def test_scores_of_rows_and_letters_are_cached(parts, tmp_path):
    question = LetterQuestion(ids=np.arange(1, 9, dtype=np.int32), letters=[3, 4, 5], answer=1)
    plain = score_rows(parts, rows_of(0)), score_letters(parts, [question])
    for computed in (True, False):
        cache = open_cache(tmp_path / "new", parts)
        rows = score_rows(parts, rows_of(0), cache=cache)
        letters = score_letters(parts, [question], cache=cache)
        assert (cache.misses > 0, cache.hits > 0) == (computed, not computed)
        assert rows.nll.tobytes() == plain[0].nll.tobytes() and rows.exact.tolist() == plain[0].exact.tolist()
        assert letters.right.tolist() == plain[1].right.tolist()
    cache = open_cache(tmp_path / "new", parts)
    score_rows(parts, rows_of(1), cache=cache)
    assert cache.hits == 0


def start(folder, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "qlora_jax.evaluate", "--model", str(folder / "model"), *words]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "QLORA_JAX_CACHE": str(folder / "cache")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_again_and_again_it_ends_as_one_that_was_not(tmp_path):
    write_model(tmp_path / "model")
    words = np.random.default_rng(0).choice(["sun", "moon", "rain", "wind"], 20_000)
    (tmp_path / "text.txt").write_text(" ".join(words))
    questions = [{"question": f"{a} {n}?", "options": ["sun", "moon"], "answer": n % 2} for n, a in enumerate(words)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in questions[:300]))
    tasks = [f"--text={tmp_path}/text.txt", "--window=64", "--stride=32", f"--choices={tmp_path}/q.jsonl"]

    def ended(*more: str) -> str:
        process = start(tmp_path, *tasks, *more)
        _, printed = process.communicate(timeout=300)
        assert process.returncode == 0, printed
        return printed

    ended(f"--json={tmp_path}/whole.json")
    stored, kills = tmp_path / "kept", 0
    for _ in range(3):
        before = len([*stored.glob("*.result")])
        process = start(tmp_path, *tasks, f"--keep={stored}")
        while process.poll() is None and len([*stored.glob("*.result")]) < before + 3:
            time.sleep(0.005)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += process.wait() == -signal.SIGKILL
        assert process.stderr is not None
        process.stderr.close()
    assert kills >= 2
    made = {path.name: path.stat().st_mtime_ns for path in stored.glob("*.result")}
    printed = ended(f"--keep={stored}", f"--json={tmp_path}/again.json")
    assert {name: (stored / name).stat().st_mtime_ns for name in made} == made
    cached = [int(hits) for hits in re.findall(r": (\d+) of \d+ batches cached", printed)]
    assert cached and cached[0] > 0
    whole, again = (json.loads((tmp_path / f"{name}.json").read_text())["tasks"] for name in ("whole", "again"))
    assert again == whole
