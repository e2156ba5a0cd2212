"""The house's layers, read from the source: who may import whom, and what `import qlora_jax` brings along."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import qlora_jax

ROOT = Path(__file__).resolve().parent.parent

# A unit is a folder or a file at the top of qlora_jax. It imports from itself and from strictly lower layers.
LAYERS = {
    "pallas_kernels": 0,
    "qlora_jax.config": 0,
    "qlora_jax.allocator": 0,
    "qlora_jax.runtime": 0,
    "qlora_jax.sharding": 0,
    "qlora_jax.quant": 1,
    "qlora_jax.data": 1,
    "qlora_jax.optim": 2,
    "qlora_jax.nn": 2,
    "qlora_jax.models": 3,
    "qlora_jax.io": 4,
    "qlora_jax.inference": 4,
    "qlora_jax.evaluation": 5,
    "qlora_jax.training": 6,
    "qlora_jax.api": 7,
}
MAINS = 8  # every other file at the top: train.py, generate.py, ...

Graph = dict[str, set[str]]


def unit(module: str) -> str:
    """`qlora_jax.nn.rope` -> `qlora_jax.nn`, `pallas_kernels.formats.qtensor` -> `pallas_kernels`."""
    return ".".join(module.split(".")[: 1 if module.startswith("pallas_kernels") else 2])


def layer(module: str) -> int:
    return LAYERS.get(unit(module), MAINS)


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(module, name taken from it) of every import, also those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from ((str(node.module), alias.name) for alias in node.names)


def read_graph() -> Graph:
    """{module: the modules of ours that it imports}."""
    files = [f for package in ("pallas_kernels", "qlora_jax") for f in sorted((ROOT / package).rglob("*.py"))]
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    ours = set(names.values())
    graph: Graph = {name: set() for name in ours}
    for file, name in names.items():
        for module, attribute in imported(ast.parse(file.read_text(encoding="utf-8"))):
            # `from package import module` imports the module.
            target = f"{module}.{attribute}" if f"{module}.{attribute}" in ours else module
            if target in ours:
                graph[name].add(target)
    return graph


def wrong_imports(graph: Graph) -> list[str]:
    """Imports of the own layer's other units, or of a higher layer."""
    return [
        f"{name} (layer {layer(name)}) imports {target} (layer {layer(target)})"
        for name, targets in sorted(graph.items())
        for target in sorted(targets)
        if unit(name) != unit(target) and layer(target) >= layer(name)
    ]


def test_imports_go_down():
    assert wrong_imports(read_graph()) == []


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("pallas_kernels.formats.tables", "qlora_jax.config"),
        ("qlora_jax.nn.linear", "qlora_jax.models.decoder"),
        ("qlora_jax.io.loader", "qlora_jax.inference.decode"),
        ("qlora_jax.quant.blockwise", "qlora_jax.data.rows"),
        ("qlora_jax.train", "qlora_jax.generate"),
        ("qlora_jax.training.loop", "qlora_jax.train"),
    ],
)
def test_an_import_upwards_or_sideways_is_found(name, target):
    assert len(wrong_imports({name: {target}})) == 1


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter(read_graph()).prepare()  # raises CycleError with the modules of the cycle


def test_every_folder_has_a_layer():
    folders = {f"qlora_jax.{path.parent.name}" for path in (ROOT / "qlora_jax").glob("*/__init__.py")}
    assert folders <= set(LAYERS)


def test_import_brings_neither_jax_nor_numpy():
    code = "import sys, qlora_jax, qlora_jax.config; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_start_no_backend():
    code = (
        "import qlora_jax\n"
        "for name in qlora_jax.__all__: getattr(qlora_jax, name)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_name_is_told():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qlora_jax.quantise  # noqa: B018
