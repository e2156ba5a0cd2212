"""The library is found or built for the instruction sets that XLA may use: one switch hides them from both."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from pallas_kernels.native import build, library

# Compilers that count their calls: one leaves the file that it is asked for, the other fails.
COMPILES = 'echo >> "$0.calls"; for last; do :; done; echo library > "$last"'
FAILS = 'echo >> "$0.calls"; echo "error: no such flag" >&2; exit 1'


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The path of the compiler, which the test writes, and which builds into the user's cache."""
    path = tmp_path / "compiler"
    for name, value in {"CXX": str(path), "QLORA_JAX_CACHE": str(tmp_path / "cache"), library.SWITCH: "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build, "_HERE", tmp_path / "package")
    monkeypatch.setattr(library, "register", lambda variant: None)
    library.problem.cache_clear()
    yield path
    library.problem.cache_clear()


def write_compiler(path: Path, words: str) -> None:
    path.write_text(f"#!/bin/sh\n{words}\n")
    path.chmod(0o755)


def test_the_first_use_builds_once_into_a_folder_that_can_be_written(compiler, capsys):
    write_compiler(compiler, COMPILES)
    assert library.problem() is None
    library.problem.cache_clear()  # as another process would find it
    assert library.problem() is None
    built = build.library_path(library.variant())
    assert built.parent == compiler.parent / "cache" and built.read_text() == "library\n"
    assert [*built.parent.iterdir()] == [built]
    assert capsys.readouterr().err.count("building the C++ loops") == 1
    assert len(Path(f"{compiler}.calls").read_text()) == len(build.SOURCES) + 1


def test_a_failed_build_is_one_warning_with_its_reason(compiler, recwarn):
    write_compiler(compiler, FAILS)
    assert "error: no such flag" in library.problem()
    calls = Path(f"{compiler}.calls").read_text()
    assert "error: no such flag" in library.problem() and Path(f"{compiler}.calls").read_text() == calls
    assert [str(warning.message).splitlines()[-1] for warning in recwarn] == ["error: no such flag"]


def test_nothing_is_built_where_that_is_switched_off(compiler, monkeypatch):
    monkeypatch.setenv(library.SWITCH, "0")
    assert build.BUILD in library.problem() and not compiler.parent.joinpath("cache").exists()


def test_the_users_cache_is_where_the_system_has_it(monkeypatch, tmp_path):
    monkeypatch.delenv("QLORA_JAX_CACHE", raising=False)
    monkeypatch.setattr(build, "_HERE", tmp_path / "absent")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library_path("neon").parent == tmp_path / "qlora_jax"
    monkeypatch.setattr(build, "_HERE", tmp_path)
    assert build.library_path("neon").parent == tmp_path


LIMITS = [
    ("", "amx_bf16"),
    ("--xla_cpu_max_isa=AMX_FP16", "amx_bf16"),
    ("--xla_cpu_max_isa=AVX512_BF16", "avx512_bf16"),
    ("--xla_dump_to=x --xla_cpu_max_isa=avx2", "avx2"),
    ("--xla_cpu_max_isa=AVX512 --xla_cpu_max_isa=AVX2", "avx2"),  # XLA uses the last one, too
    ("--xla_cpu_max_isa=AVX512", "avx512"),
    ("--xla_cpu_max_isa=AVX", None),
]


@pytest.mark.parametrize(("flags", "expected"), LIMITS)
def test_instruction_sets_that_xla_does_not_use_are_hidden(monkeypatch, flags, expected):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build, "features", lambda: build.VARIANTS["amx_bf16"].features)
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert library.variant() == expected


@pytest.mark.parametrize(("allows", "expected"), [(True, "amx_bf16"), (False, "avx512_bf16")])
def test_registers_of_amx_are_asked_for(monkeypatch, tmp_path, allows, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"flags\t\t: {' '.join(sorted(build.VARIANTS['amx_bf16'].features))}\n")
    monkeypatch.setattr(build, "Path", lambda path: cpuinfo)
    monkeypatch.setattr(build, "_allows_tiles", lambda: allows)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setattr(build, "features", build.features.__wrapped__)
    assert library.variant() == expected


def test_a_library_for_an_older_interface_is_loaded_and_one_for_a_newer_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "_HERE", tmp_path)
    monkeypatch.setattr(build, "interface_version", lambda: 3)
    wanted = build.library_path("avx2")
    for version, found in ((4, 3), (1, 1), (2, 2)):
        path = wanted.with_name(wanted.name.replace("ffi3", f"ffi{version}"))
        path.touch()
        assert build.library_path("avx2") == wanted.with_name(wanted.name.replace("ffi3", f"ffi{found}"))
