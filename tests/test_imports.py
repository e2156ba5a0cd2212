"""Layers of the packages, read from the imports; and the side effects of `import qlora_jax`."""

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qlora_jax

ROOT = Path(__file__).resolve().parent.parent

# A unit is a top-level folder or file of qlora_jax. It imports from itself and from strictly lower layers.
LAYERS = {
    "pallas_kernels": 0,
    "qlora_jax.untrusted_json": 0,
    "qlora_jax.regex": 0,
    "qlora_jax.terminal": 0,
    "qlora_jax.allocator": 0,
    "qlora_jax.atomic_files": 0,
    "qlora_jax.bounded_request": 0,
    "qlora_jax.line_digests": 0,
    "qlora_jax.runtime": 0,
    "qlora_jax.sandbox": 0,
    "qlora_jax.sharding": 0,
    "qlora_jax.verifiers": 0,
    "qlora_jax.answer_text": 1,
    "qlora_jax.openai_client": 1,
    "qlora_jax.page_template": 1,
    "qlora_jax.config": 1,
    "qlora_jax.hosts": 1,
    "qlora_jax.measures": 2,
    "qlora_jax.model_source": 2,
    "qlora_jax.quant": 2,
    "qlora_jax.data": 2,
    "qlora_jax.optim": 3,
    "qlora_jax.nn": 3,
    "qlora_jax.models": 4,
    "qlora_jax.methods": 5,
    "qlora_jax.objectives": 5,
    "qlora_jax.io": 6,
    "qlora_jax.inference": 6,
    "qlora_jax.progress_reporter": 7,
    "qlora_jax.rewards": 7,
    "qlora_jax.evaluation": 8,
    "qlora_jax.rollouts": 8,
    "qlora_jax.training": 9,
    "qlora_jax.studies": 10,
    "qlora_jax.server": 10,
    "qlora_jax.api": 11,
}
COMMANDS = 12  # every other top-level file: train.py, generate.py, ...

Graph = dict[str, set[str]]


def unit(module: str) -> str:
    """`qlora_jax.nn.rope` -> `qlora_jax.nn`, `pallas_kernels.formats.qtensor` -> `pallas_kernels`."""
    return ".".join(module.split(".")[: 1 if module.startswith("pallas_kernels") else 2])


def layer(module: str) -> int:
    return LAYERS.get(unit(module), COMMANDS)


def imported(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """Yields (module, imported name) of every import, including those inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what is imported"
            yield from ((str(node.module), alias.name) for alias in node.names)


def read_graph() -> Graph:
    """{module: the modules of this repository that it imports}."""
    files = [f for package in ("pallas_kernels", "qlora_jax") for f in sorted((ROOT / package).rglob("*.py"))]
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    ours = set(names.values())
    graph: Graph = {name: set() for name in ours}
    for file, name in names.items():
        for module, attribute in imported(ast.parse(file.read_text(encoding="utf-8"))):
            # `from package import module` imports the module, too.
            target = f"{module}.{attribute}" if f"{module}.{attribute}" in ours else module
            if target in ours:
                graph[name].add(target)
    return graph


def wrong_imports(graph: Graph) -> list[str]:
    """Imports from other units of the same layer, or from a higher layer."""
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
        ("qlora_jax.io.loading.loader", "qlora_jax.inference.decode"),
        ("qlora_jax.quant.blockwise", "qlora_jax.data.rows"),
        ("qlora_jax.train", "qlora_jax.generate"),
        ("qlora_jax.training.loop", "qlora_jax.train"),
    ],
)
def test_an_upward_or_sideways_import_is_found(name, target):
    assert len(wrong_imports({name: {target}})) == 1


def installed_with(extra: str) -> set[str]:
    """The names of all distributions that qlora-jax and one of its extras require, directly or not."""
    found: set[tuple[str, frozenset[str]]] = set()
    waiting = [("qlora-jax", frozenset([extra]))]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) not in found:
            found.add((name, extras))
            required = map(Requirement, importlib.metadata.requires(name) or [])
            waiting += [
                (canonicalize_name(each.name), frozenset(each.extras))
                for each in required
                if each.marker is None or any(each.marker.evaluate({"extra": one}) for one in extras | {""})
            ]
    return {name for name, _ in found}


def test_tests_import_what_the_dev_extra_installs_or_skip():
    """scripts/test.sh installs only that extra; an import of another package must follow its pytest.importorskip."""
    installed, distributions = installed_with("dev"), importlib.metadata.packages_distributions()
    ours = {"tests", "scripts", "qlora_jax", "pallas_kernels"} | sys.stdlib_module_names
    ours |= {file.stem for file in (ROOT / "examples/extensions").glob("*.py")}
    missing = {
        (str(file.relative_to(ROOT)), module)
        for file in (ROOT / "tests").rglob("test_*.py")
        if (text := file.read_text(encoding="utf-8"))
        for module, _ in imported(ast.parse(text))
        if (root := module.split(".")[0]) not in ours
        if not re.search(rf'importorskip\("{root}[".]', text)
        if not installed & {canonicalize_name(name) for name in distributions.get(root, [])}
    }
    assert not missing


def test_there_is_no_import_cycle():
    graphlib.TopologicalSorter(read_graph()).prepare()  # raises CycleError with its modules


def longest_chain(graph: Graph) -> list[str]:
    """The most modules that import each other in a row, from the highest to the lowest."""
    chains: dict[str, list[str]] = {}
    for name in graphlib.TopologicalSorter(graph).static_order():
        chains[name] = [name, *max((chains[target] for target in graph[name]), key=len, default=[])]
    return max(chains.values(), key=len)


def test_a_reader_follows_few_modules_in_a_row():
    chain = longest_chain(read_graph())
    assert len(chain) <= 25, " imports ".join(chain)


def test_the_longest_chain_is_found():
    graph: Graph = {"a": {"b", "c"}, "b": {"c"}, "c": {"d"}, "d": set(), "e": {"d"}}
    assert longest_chain(graph) == ["a", "b", "c", "d"]


def parts_of(package: str, graph: Graph) -> Graph:
    """{a folder or file in a package: those in the same package that it imports}."""
    inside = {name: name[len(package) + 1 :].split(".")[0] for name in graph if name.startswith(f"{package}.")}
    parts: Graph = {part: set() for part in inside.values()}
    for name, part in inside.items():
        parts[part] |= {inside[target] for target in graph[name] if target in inside} - {part}
    return parts


def knots(graph: Graph) -> list[str]:
    """Packages whose folders and files import each other in a circle, although their modules do not."""
    packages = {
        ".".join(parts[:depth]) for name in graph for parts in [name.split(".")] for depth in range(2, len(parts))
    }
    found = []
    for package in sorted(packages):
        try:
            graphlib.TopologicalSorter(parts_of(package, graph)).prepare()
        except graphlib.CycleError as error:
            found.append(f"{package}: {' imports '.join(reversed(error.args[1]))}")
    return found


def test_the_folders_of_a_unit_have_an_order():
    assert knots(read_graph()) == []


def test_a_knot_of_folders_is_found():
    graph: Graph = {"q.unit.a.one": {"q.unit.b.two"}, "q.unit.b.two": set(), "q.unit.b.three": {"q.unit.a.four"}}
    assert knots(graph | {"q.unit.a.four": set()}) == ["q.unit: a imports b imports a"]
    assert knots(graph | {"q.unit.b.three": set()}) == []


def test_every_folder_has_a_layer():
    folders = {f"qlora_jax.{path.parent.name}" for path in (ROOT / "qlora_jax").glob("*/__init__.py")}
    assert folders <= set(LAYERS)


def test_the_package_imports_neither_jax_nor_numpy():
    code = "import sys, qlora_jax, qlora_jax.config; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_server_imports_orbax_only_to_read_a_run():
    code = "import sys, qlora_jax.server.loading; print('jax' in sys.modules, 'orbax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True False"


def test_public_names_do_not_initialize_a_backend():
    code = (
        "import qlora_jax\n"
        "for name in qlora_jax.__all__: getattr(qlora_jax, name)\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_survive_the_import_of_every_submodule():
    modules = sorted(name for name in read_graph() if name.startswith("qlora_jax.") and name.count(".") == 1)
    code = (
        "import importlib, qlora_jax\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "found = {name: getattr(qlora_jax, name) for name in qlora_jax.__all__}\n"
        "print([name for name, value in found.items() if not callable(value)])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['nn']"  # a submodule itself; the others can be called


def test_an_unknown_name_raises_with_the_known_ones():
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qlora_jax.quantise  # noqa: B018
