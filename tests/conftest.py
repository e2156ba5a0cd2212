"""Strict settings for every test, and fixtures for what lies outside: the oracle's Python, a real model, local data."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("QLORA_JAX_BUILD_LOOPS", "0")  # tests run what set-up has built

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

from scripts.fetch_gemma3 import gemma3_path
from scripts.fetch_smollm2 import fetch_smollm2
from tests.case_budget import mark_cases

ROOT = Path(__file__).resolve().parent.parent
SMALL_DISK_BYTES = 1 << 18

# A shell starts background jobs with SIGINT ignored; tests of Ctrl-C need the default handler.
signal.signal(signal.SIGINT, signal.default_int_handler)

# An int is accepted where a float is annotated, as in PEP 484.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
if os.environ.get("JAXTYPING_DISABLE") != "1":  # the variable of jaxtyping itself
    jaxtyping.install_import_hook(["qlora_jax", "pallas_kernels"], TYPECHECKER)
jax.config.update("jax_num_cpu_devices", 8)  # virtual devices for tests of meshes; other tests use the first
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles, so a deadline would measure the compiler.
hypothesis.settings.register_profile(
    "qlora_jax", deadline=None, max_examples=50, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("qlora_jax")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--first-cases", action="store_true", help="run only the first case of each parametrized test")


@pytest.hookimpl(wrapper=True)  # marks before -m deselects cases, first cases after it
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Marks cases beyond their test's budget; --first-cases leaves one case per test, which shows a broken library."""
    mark_cases(items)
    yield
    if not config.getoption("--first-cases"):
        return
    first = {item.nodeid.partition("[")[0]: item.nodeid for item in reversed(items)}
    kept = set(first.values())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in kept])
    items[:] = [item for item in items if item.nodeid in kept]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips tests marked `gpu` unless jax has an NVIDIA GPU; other GPUs have no compute capability of this form."""
    from pallas_kernels.devices import target_device  # after the import hook is installed

    if item.get_closest_marker("gpu") and target_device().compute_capability is None:
        platforms = os.environ["JAX_PLATFORMS"]
        pytest.skip(f"jax has no NVIDIA GPU with JAX_PLATFORMS={platforms}; on a card set JAX_PLATFORMS=cuda,cpu")


@pytest.fixture(autouse=True)
def no_global_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps commands from changing process settings, such as the user's cache of compiled programs."""
    monkeypatch.setattr("qlora_jax.runtime.start", lambda: None)


@pytest.fixture(autouse=True, scope="module")
def programs_let_go() -> Iterator[None]:
    """Frees compiled functions after each module: each has memory maps, and Linux allows a process 65,530.

    Beyond that, XLA for the CPU fails with "Failed to materialize symbols".
    """
    yield
    jax.clear_caches()


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder on a disk of SMALL_DISK_BYTES; the parameter "ro" makes it read-only. Skips without root."""
    folder, mode = tmp_path / "disk", getattr(request, "param", "rw")
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK_BYTES},{mode}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("the command mount is missing")
    if done.returncode:
        pytest.skip(f"mounting a tmpfs requires root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # a thread of orbax may still close a file


Oracle = Callable[..., dict[str, np.ndarray]]


def _python_of(folder: str, variable: str, holds: str) -> Path:
    named = os.environ.get(variable)
    python = Path(named) if named else ROOT / f".{folder}/bin/python"
    if named and not python.exists():
        raise FileNotFoundError(f"{variable}={named} does not exist")
    if not python.exists():
        pytest.skip(f"no {folder} environment ({holds}): bash scripts/setup_{folder}.sh")
    return python


def _write_inputs(path: Path, inputs: dict[str, object]) -> None:
    arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
    foreign = [f"{name}: {value.dtype}" for name, value in arrays.items() if value.dtype.kind not in "biufcU"]
    if foreign:
        raise ValueError(f"an .npz cannot hold {foreign}; send bfloat16 as .view(np.uint16)")
    rest = {name: value for name, value in inputs.items() if name not in arrays}
    np.savez(path, **arrays, json=np.array(json.dumps(rest)))


Launch = Callable[[list[str], Path], int]  # runs a script with arguments, and returns its status


def _runner(launch: Launch, folder: Path) -> Oracle:
    def run(script: Path, **inputs: object) -> dict[str, np.ndarray]:
        source, result, output = (folder / f"{script.stem}_{name}" for name in ("in.npz", "out.npz", "printed.txt"))
        _write_inputs(source, inputs)
        status = launch([str(each) for each in (script, source, result)], output)
        if status != 0:
            pytest.fail(f"{script.name} ended with status {status}:\n{output.read_text(errors='replace')[-8000:]}")
        with np.load(result) as arrays:
            return dict(arrays)

    return run


def _launch_process(argv: list[str], output: Path) -> int:
    python = _python_of("llama_cpp", "QLORA_LLAMA_CPP_PYTHON", "llama-cpp-python")
    with output.open("wb") as printed:
        return subprocess.run([python, *argv], stdout=printed, stderr=printed).returncode


class _ForkServer:
    """The process that forks for each script of the oracle (tests/oracle/fork_server.py); starts with the first."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def launch(self, argv: list[str], output: Path) -> int:
        """Runs a script with arguments, and returns its status."""
        if self._process is None:
            python = _python_of("oracle", "QLORA_ORACLE_PYTHON", "torch, transformers, peft, bitsandbytes")
            command = [python, ROOT / "tests/oracle/fork_server.py"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps({"argv": argv, "env": dict(os.environ), "output": str(output)}) + "\n")
        stdin.flush()
        status = stdout.readline()
        assert status, "the server of the oracle has ended"
        return int(status)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.communicate()


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """`oracle(script, **inputs) -> arrays`: runs a script of tests/oracle in the oracle's Python (see bridge.py there).

    NumPy arrays are passed as arrays, everything else as JSON. Skips if the oracle's Python is absent.
    """
    server = _ForkServer()
    yield _runner(server.launch, tmp_path_factory.mktemp("oracle"))
    server.close()


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Oracle:
    """`oracle` in the Python that has llama-cpp-python; skips if that is absent."""
    return _runner(_launch_process, tmp_path)


@pytest.fixture
def verifiers_python() -> Path:
    """The Python that has verifiers; skips if it is absent."""
    return _python_of("verifiers", "QLORA_JAX_VERIFIERS_PYTHON", "verifiers")


@pytest.fixture
def quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets this process and its children import llama-cpp-python; skips if it is absent or of another Python."""
    python = _python_of("llama_cpp", "QLORA_LLAMA_CPP_PYTHON", "llama-cpp-python")
    script = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_path('purelib'))"
    major, minor, site = subprocess.run([python, "-c", script], capture_output=True, text=True).stdout.split()
    if (int(major), int(minor)) != sys.version_info[:2]:
        pytest.skip(f"{python} is Python {major}.{minor}, whose packages this one cannot import")
    monkeypatch.setattr(sys, "path", [*sys.path, site])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), site])))


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct as GGUF, fetched once into the cache; skips if it cannot be fetched."""
    try:
        return fetch_smollm2()
    except OSError as error:
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """Path of Gemma 3 270M as GGUF; skips if scripts.fetch_gemma3 has not fetched it."""
    if not gemma3_path().exists():
        pytest.skip(f"{gemma3_path()} does not exist: python -m scripts.fetch_gemma3")
    return gemma3_path()


@pytest.fixture
def local_data() -> Callable[[str], Path]:
    """`local_data(name)`: the path of a data file that may not ship with the project; skips where it is absent."""
    folder = Path(os.environ.get("QLORA_JAX_LOCAL_DATA", ROOT.parent / "shared/data/local_only"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"local_only/{name} not present (set QLORA_JAX_LOCAL_DATA to the folder that holds it)")
        return folder / name

    return find


@pytest.fixture
def committable_data() -> Callable[[str], Path]:
    """`committable_data(name)`: the path of a data file that is not part of the project; skips where it is absent."""
    folder = Path(os.environ.get("QLORA_JAX_COMMITTABLE_DATA", ROOT.parent / "shared/data/committable"))

    def find(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"{name} not present (set QLORA_JAX_COMMITTABLE_DATA to the folder that holds it)")
        return folder / name

    return find
