"""Builds the sdist, and wheels with the compiled C++ loops: python -m scripts.build_wheels [--out dist]

One machine builds for all platforms: Zig, a package on PyPI, is a C++ compiler for each of them. The first call
downloads 200 MB into .cache/wheels and takes ten minutes on two cores. A wheel has every variant of its platform, built
for the oldest jaxlib that pyproject.toml allows. Only tracked files go into it, as they are in the working tree.
"""

import argparse
import importlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.native.build import HEADERS, SOURCES, VARIANTS, compile_library, interface_version, library_name
from pallas_kernels.native.library import HANDLERS

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache/wheels"
TOOLS = ("ziglang==0.17.1", "lief==1.0.0")  # lief reads the symbols of ELF and Mach-O files
NATIVE = "pallas_kernels/native"
# Zig's names of the variants' instruction sets. Clang would split vectors of 512 bits on server processors.
CPUS = {
    "amx_bf16": "x86_64_v4-prefer_256_bit+avx512bf16+avx512vnni+amx_tile+amx_bf16",
    "avx512_bf16": "x86_64_v4-prefer_256_bit+avx512bf16+avx512vnni",
    "avx512": "x86_64_v4-prefer_256_bit",
    "avx2": "x86_64_v3",
    "neon_bf16": "generic+v8_2a+bf16+dotprod",
    "neon": "generic",
}
# Libraries of every system.
LIBRARIES = re.compile(r"lib(c|m|pthread|dl)\.so\.\d|ld-linux-.*|/usr/lib/libSystem\.B\.dylib")
# Zig links libc++ into the library, and on Macs it cannot hide these: new and delete, and two names of the linker.
OF_MAC_LINKER = re.compile(r"_Z(n[wa]m|d[la]Pv).*|_mh_dylib_header|__dso_handle")


class Platform(NamedTuple):
    """A kind of machine that gets a wheel.

    Attributes:
      tag: the wheel's tag, that of jaxlib's wheel: it has the lowest version of glibc or of macOS.
      machine: the processor's architecture, as in VARIANTS.
      target: Zig's name.
    """

    tag: str
    machine: str
    target: str

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(name for name, variant in VARIANTS.items() if variant.machine == self.machine)

    @property
    def version(self) -> tuple[int, ...]:
        return tuple(map(int, re.findall(r"\d+", self.tag)[:2]))


PLATFORMS = (
    Platform("manylinux_2_27_x86_64", "x86_64", "x86_64-linux-gnu.2.27"),
    Platform("manylinux_2_27_aarch64", "aarch64", "aarch64-linux-gnu.2.27"),
    Platform("macosx_11_0_arm64", "aarch64", "aarch64-macos.11.0"),
)


class Symbols(NamedTuple):
    """The names that a library exports, and its needs: libraries, and versions of glibc or of macOS."""

    defined: frozenset[str]
    libraries: frozenset[str]
    versions: frozenset[str]


def run(*words: str | Path, folder: Path = ROOT) -> str:
    """Returns what a command prints. SystemExit: it failed, with its errors."""
    done = subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"build_wheels: {' '.join(map(str, words))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def oldest_jaxlib(pyproject: str) -> str:
    """Returns the oldest version of jax, and so of jaxlib, that the text of a pyproject.toml allows."""
    (version,) = re.findall(r"^jax>=([\d.]+)", "\n".join(tomllib.loads(pyproject)["project"]["dependencies"]), re.M)
    return version


def install(uv: str, name: str, *packages: str) -> Path:
    """Returns a folder of the cache in which packages are installed, without their dependencies."""
    folder = CACHE / name
    run(uv, "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder, *packages)
    return folder


def with_libraries(pyproject: str) -> str:
    """Returns the text of a pyproject.toml whose wheel has libraries, too; a checkout's own must not go into one."""
    without = 'pallas_kernels = ["native/*.cc", "native/*.h"]'
    if pyproject.count(without) != 1:
        sys.exit(f"build_wheels: pyproject.toml: found no line {without}")
    return pyproject.replace(without, without[:-1] + ', "native/*.so"]')


def copy_tracked(to: Path) -> Path:
    """Copies the files that git tracks, and returns the new folder."""
    for name in run("git", "ls-files", "-z").split("\0"):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, to / name)
    if missing := [path.name for path in SOURCES + HEADERS if not (to / NATIVE / path.name).exists()]:
        sys.exit(f"build_wheels: git does not track {', '.join(missing)} in {NATIVE}. Add them.")
    return to


def zig_command(zig: Path, platform: Platform, folder: Path) -> tuple[str, ...]:
    """Returns the command that compiles and links for a platform; it exports the handlers and nothing else."""
    exports = folder / "exports.map"
    exports.write_text(f"{{ global: {'; '.join(HANDLERS)}; local: *; }};")
    words = (str(zig), "c++", "-target", platform.target, "-O3", "-s")  # -O3 is for libc++, too
    if "macos" in platform.target:
        return (*words, "-Wl,-install_name,@rpath/loops")
    return (*words, f"-Wl,--version-script={exports}")


def read_symbols(path: Path) -> Symbols:
    """Reads an ELF or Mach-O library with lief, which `install` has put into the cache."""
    lief = importlib.import_module("lief")
    lief.logging.disable()
    binary = lief.parse(str(path))
    names = frozenset(str(symbol.name) for symbol in binary.exported_symbols)
    if isinstance(binary, lief.MachO.Binary):
        libraries = frozenset(library.name for library in binary.libraries if not library.name.startswith("@rpath/"))
        oldest = ".".join(map(str, binary.build_version.minos[:2]))
        return Symbols(frozenset(name.removeprefix("_") for name in names), libraries, frozenset({f"macOS_{oldest}"}))
    needed = (one.name for file in binary.symbols_version_requirement for one in file.get_auxiliary_symbols())
    return Symbols(names, frozenset(binary.libraries), frozenset(needed))


def problems(symbols: Symbols, platform: Platform) -> list[str]:
    """Returns why a library must not go into the wheel of a platform; nothing if it may."""
    extra, missing = symbols.defined - set(HANDLERS), set(HANDLERS) - symbols.defined
    if platform.tag.startswith("macosx"):
        extra = {name for name in extra if not OF_MAC_LINKER.fullmatch(name)}
    unknown = {name for name in symbols.libraries if not LIBRARIES.fullmatch(name)}
    found = (("exports", extra), ("lacks", missing), ("needs", unknown | _newer(symbols.versions, platform.version)))
    return [f"{verb} {', '.join(sorted(names))}" for verb, names in found if names]


def _newer(versions: Iterable[str], limit: tuple[int, ...]) -> set[str]:
    """Returns the versions above the limit, and those of something else than glibc or macOS."""
    parsed = {one: re.fullmatch(r"(?:GLIBC|macOS)_(\d+)\.(\d+)(?:\.\d+)?", one) for one in versions}
    return {one for one, found in parsed.items() if found is None or tuple(map(int, found.groups())) > limit}


def add_loops(stage: Path, platform: Platform, zig: Path, include: Path) -> int:
    """Compiles a platform's variants into a copy of the sources, checks them, and returns the number of exports."""
    exports, project = 0, stage / "pyproject.toml"
    project.write_text(with_libraries(project.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        command = zig_command(zig, platform, Path(folder))
        for variant in platform.variants:
            path = stage / NATIVE / library_name(variant, interface_version(include))
            compile_library(variant, path, command, str(include), (f"-mcpu={CPUS[variant]}",))
            symbols = read_symbols(path)
            if found := problems(symbols, platform):
                sys.exit(f"build_wheels: {platform.tag}: {path.name} {'; '.join(found)}")
            exports = len(symbols.defined & set(HANDLERS))
    return exports


def pack(uv: str, stage: Path, out: Path, *words: str) -> Path:
    """Builds a wheel or an sdist of a copy of the sources, and returns its path."""
    with tempfile.TemporaryDirectory() as folder:
        run(uv, "build", "--quiet", *words, "--out-dir", folder, folder=stage)
        (built,) = (path for path in Path(folder).iterdir() if path.suffix in (".whl", ".gz"))
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(built, out / built.name))


def report(built: Path, *notes: str) -> None:
    """Prints a file's row of the table."""
    print(f"{built.name:<52} {built.stat().st_size / 1e6:>4.1f} MB  {'  '.join(notes)}", flush=True)


def main() -> None:
    """Builds everything and prints a table."""
    parser = argparse.ArgumentParser(description=f"{__doc__}".splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the files (default: dist)")
    tags = [platform.tag for platform in PLATFORMS]
    parser.add_argument("--platform", choices=tags, help="build this wheel only (default: all, and the sdist)")
    args = parser.parse_args()
    uv, out = run("bash", "scripts/find_uv.sh").strip(), args.out.absolute()
    tools = install(uv, "tools", *TOOLS)
    sys.path.append(str(tools))
    oldest = oldest_jaxlib((ROOT / "pyproject.toml").read_text())
    include = install(uv, f"jaxlib-{oldest}", f"jaxlib=={oldest}") / "jaxlib/include"
    with tempfile.TemporaryDirectory() as folder:
        if args.platform is None:
            report(pack(uv, copy_tracked(Path(folder) / "sdist"), out, "--sdist"), "sources")
        for platform in PLATFORMS:
            if args.platform in (None, platform.tag):
                stage = copy_tracked(Path(folder) / platform.tag)
                exports = add_loops(stage, platform, tools / "ziglang/zig", include)
                # Setuptools' own option: a wheel without extension modules would be one for any platform.
                tag = f"--config-setting=--build-option=--plat-name={platform.tag}"
                report(pack(uv, stage, out, "--wheel", tag), ", ".join(platform.variants), f"{exports} symbols each")


if __name__ == "__main__":
    main()
