"""Wheels: their libraries, what these may export and need, and that a run from one equals a source build's run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_kernels.native import build
from pallas_kernels.native.library import HANDLERS
from scripts import build_wheels as wheels
from tests.e2e.project import write_model, write_rows
from tests.marks import EXHAUSTIVE

ROOT = Path(__file__).resolve().parents[2]
LINUX, ARM, MAC = wheels.PLATFORMS


def symbols(names=HANDLERS, libraries=("libc.so.6", "libm.so.6"), versions=("GLIBC_2.2.5", "GLIBC_2.27")):
    return wheels.Symbols(*map(frozenset, (names, libraries, versions)))


def test_every_variant_is_in_a_wheel():
    assert set(wheels.CPUS) == set(build.VARIANTS) == {*LINUX.variants, *ARM.variants}
    assert ARM.variants == MAC.variants


def test_a_wheel_has_a_library_under_the_name_that_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_HERE", tmp_path)
    assert build.library_path("avx2").name == build.library_name("avx2", build.interface_version())
    older = tmp_path / build.library_name("avx2", build.interface_version() - 1)  # from a wheel for the oldest jaxlib
    older.touch()
    assert build.library_path("avx2") == older


def test_a_library_exports_the_handlers_and_needs_what_its_tag_promises():
    assert wheels.problems(symbols(), LINUX) == []
    assert wheels.problems(symbols((*HANDLERS, "_Znwm")), LINUX) == ["exports _Znwm"]
    assert wheels.problems(symbols(HANDLERS[1:]), LINUX) == [f"lacks {HANDLERS[0]}"]
    assert wheels.problems(symbols(libraries=["libstdc++.so.6"]), LINUX) == ["needs libstdc++.so.6"]
    assert wheels.problems(symbols(versions=["GLIBC_2.32", "GLIBCXX_3.4"]), ARM) == ["needs GLIBCXX_3.4, GLIBC_2.32"]


def test_a_mac_library_may_export_new_and_delete_but_needs_no_newer_system():
    of_mac = {"libraries": ["/usr/lib/libSystem.B.dylib"], "versions": ["macOS_11.0"]}
    names = (*HANDLERS, "_ZnwmSt11align_val_t", "_ZdaPv", "_mh_dylib_header", "__dso_handle")
    assert wheels.problems(symbols(names, **of_mac), MAC) == []
    assert wheels.problems(symbols((*names, "_ZNSt3__1"), **of_mac), MAC) == ["exports _ZNSt3__1"]
    assert wheels.problems(symbols(names, **of_mac | {"versions": ["macOS_12.0"]}), MAC) == ["needs macOS_12.0"]


def test_the_oldest_jaxlib_and_the_libraries_are_read_from_and_put_into_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"jax>={wheels.oldest_jaxlib(pyproject)},' in pyproject
    data = wheels.tomllib.loads(wheels.with_libraries(pyproject))["tool"]["setuptools"]["package-data"]
    assert data["pallas_kernels"] == ["native/*.cc", "native/*.h", "native/*.so"]


# ---- the real thing


def run(*words: str | Path, cwd: Path = ROOT, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CXX")}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=inherited | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and all wheels, whose libraries the script has checked."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "scripts.build_wheels", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def environments(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Pythons of an environment with the wheel and of one with the sdist, both with the locked dependencies."""
    folder = tmp_path_factory.mktemp("environments")
    uv = run("bash", "scripts/find_uv.sh").strip()
    locked = folder / "locked.txt"
    run(uv, "export", "--quiet", "--frozen", "--no-emit-project", "--no-hashes", "--output-file", locked)
    found = {}
    for name, pattern in {"wheel": f"*{LINUX.tag}.whl", "sdist": "*.tar.gz"}.items():
        (package,) = dist.glob(pattern)
        run(uv, "venv", "--quiet", "--python", sys.executable, folder / name)
        found[name] = folder / name / "bin/python"
        run(uv, "pip", "install", "--quiet", "--python", found[name], "--constraints", locked, package)
    run(found["sdist"], "-m", "pallas_kernels.native.build", cwd=folder)
    return found


def adapter(python: Path, folder: Path, dtype: str, **environment: str) -> bytes:
    """Trains a tiny model, and returns the exported adapter."""
    folder.mkdir()
    write_model(folder / "model", head_dim=32)
    write_rows(folder / "rows.jsonl", 24)
    settings = {"data.max_length": 160, "data.buckets": 1, "lora.rank": 4, "train.steps": 4, "train.accumulation": 1}
    settings |= {"train.micro_batch_size": 4, "model.compute_dtype": dtype}
    words = [word for key, value in settings.items() for word in (f"--{key}", value)]
    command = (python, "-m", "qlora_jax")
    inputs = ("--model", "model", "--data.train", "rows.jsonl", "--output", "run")
    printed = run(*command, "train", *inputs, *map(str, words), cwd=folder, **environment)
    assert "attention  C++" in printed
    run(*command, "export", "--run", "run", "--format", "peft", "--output", "peft", cwd=folder, **environment)
    return (folder / "peft/adapter_model.safetensors").read_bytes()


@pytest.mark.skipif(not build.supported_variants() or sys.platform != "linux", reason="no wheel's loops run here")
@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=EXHAUSTIVE) for dtype in ("bfloat16", "float32")])
def test_a_run_from_the_wheel_without_a_compiler_equals_a_source_build(environments, dtype, tmp_path):
    """Zig's Clang built the wheel's loops and this machine's compiler the others; the adapters have the same bits."""
    from_wheel = adapter(environments["wheel"], tmp_path / "wheel", dtype, PATH="/nowhere", QLORA_JAX_BUILD_LOOPS="0")
    from_source = adapter(environments["sdist"], tmp_path / "sdist", dtype, QLORA_JAX_BUILD_LOOPS="0")
    assert from_wheel == from_source
