"""The package works where it is installed: in an empty environment, from a folder outside the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.e2e.project import write_model, write_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("qlora_jax", "pallas_kernels")
# Without the checkout's own paths.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run([*map(str, words)], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def uv() -> str:
    return run("bash", "scripts/find_uv.sh", cwd=ROOT).strip()


@pytest.fixture(scope="module")
def wheel(uv: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: without what a checkout has compiled, and without writing to it."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    run(uv, "build", "--quiet", "--wheel", "--out-dir", folder / "dist", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")  # uv adds a .gitignore
    return built


@pytest.fixture(scope="module")
def installed(uv: str, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with nothing but the wheel and the locked versions of its dependencies."""
    folder = tmp_path_factory.mktemp("environment")
    locked = (
        "export",
        "--quiet",
        "--frozen",
        "--no-emit-project",
        "--no-hashes",
        "--output-file",
        folder / "locked.txt",
    )
    run(uv, *locked, cwd=ROOT)
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "env", cwd=folder)
    python = folder / "env/bin/python"
    run(uv, "pip", "install", "--quiet", "--python", python, "--constraints", folder / "locked.txt", wheel, cwd=folder)
    return python.parent


def test_the_wheel_has_every_file_of_the_packages(wheel: Path):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    sources = wheel.parents[1]
    files = [path for name in PACKAGES for path in (sources / name).rglob("*") if path.is_file()]
    assert names == {str(path.relative_to(sources)) for path in files}
    assert {"qlora_jax/py.typed", "pallas_kernels/py.typed", "pallas_kernels/native/nf4_cpu.cc"} <= names


def test_the_commands_run_from_another_folder(installed: Path, tmp_path: Path):
    printed = run(installed / "qlora-jax", "--help", cwd=tmp_path)
    assert "\n  train " in printed
    place = "import pathlib, qlora_jax, pallas_kernels; print(*[m.__file__ for m in (qlora_jax, pallas_kernels)])"
    assert all(str(installed.parent) in file for file in run(installed / "python", "-c", place, cwd=tmp_path).split())


def test_a_run_trains_from_another_folder(installed: Path, tmp_path: Path):
    write_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 8)
    settings = {"data.max_length": 160, "data.buckets": 1, "lora.rank": 4, "train.steps": 1, "train.accumulation": 1}
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    run(
        installed / "qlora-jax", "train", "--model", "model", "--data.train", "rows.jsonl", "--output", "run", *words,
        cwd=tmp_path,
    )  # fmt: skip
    assert "<html" in (tmp_path / "run/report.html").read_text()
    assert '"step": 1' in (tmp_path / "run/metrics.jsonl").read_text()
