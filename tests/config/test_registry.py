"""Names that settings take: built in, registered, or of an installed package; and which of them an error explains."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import pytest

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import setting
from qlora_jax.config.parse import from_dict
from qlora_jax.config.registry import Registry


@dataclasses.dataclass(frozen=True)
class Colour:
    code: int


def colours() -> Registry[Colour]:
    return Registry("test.colours", Colour, {"red": Colour(1), "green": Colour(2)})


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package with entry points of the group test.colours, as pip would; returns nothing."""

    def add(package: str, entries: dict[str, str], code: str) -> None:
        (tmp_path / f"{package}.py").write_text(code)
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in entries.items())
        (info / "entry_points.txt").write_text(f"[test.colours]\n{lines}")
        monkeypatch.setitem(sys.modules, package, None)
        del sys.modules[package]

    monkeypatch.syspath_prepend(str(tmp_path))
    return add


def test_a_setting_takes_names_and_errors_list_them():
    known = colours()

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Settings:
        colour: Annotated[str, known] = setting("a colour", "red")

    assert from_dict(Settings, {"colour": "green"}).colour == "green"
    with pytest.raises(ConfigError, match=r"colour: found 'gren', expected one of red, green; did you mean green\?"):
        from_dict(Settings, {"colour": "gren"})
    known.register("grey", Colour(3))
    assert known[from_dict(Settings, {"colour": "grey"}).colour] == Colour(3)
    with pytest.raises(ConfigError, match="expected one of red, green, grey"):
        from_dict(Settings, {"colour": 3})


def test_a_taken_name_is_refused():
    known = colours()
    with pytest.raises(ValueError, match=r"test\.colours: 'red' is taken"):
        known.register("red", Colour(4))
    assert known["red"] == Colour(1)


def test_installed_packages_are_found_when_a_name_is_unknown(install):
    install("paints", {"blue": "paints:BLUE"}, f"from {__name__} import Colour\nBLUE = Colour(7)\n")
    known = colours()
    assert known.names() == ("red", "green") and known["red"] == Colour(1)
    assert "paints" not in sys.modules  # a built-in name asks no package
    assert "blue" in known and known["blue"] == Colour(7)
    assert known.names() == ("red", "green", "blue")
    with pytest.raises(ValueError, match="'blue' is taken"):
        known.register("blue", Colour(8))


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("raise OSError('no such library')", "cannot be loaded .OSError: no such library.. Repair or uninstall"),
        ("OTHER = 1", "cannot be loaded .AttributeError: "),
        ("BLUE = 'blue'", "is not a declaration .found str, expected Colour"),
    ],
)
def test_a_broken_package_is_named_and_does_not_stop_others(install, code: str, problem: str):
    install("broken", {"blue": "broken:BLUE"}, code)
    known = colours()
    with pytest.raises(ValueError, match=f"test.colours: 'blue' of package broken {problem}"):
        known["blue"]
    assert known["green"] == Colour(2)


def test_an_unknown_name_says_what_other_processes_need():
    with pytest.raises(ValueError, match=r"found 'blue', expected one of red, green.*another process does not see"):
        colours()["blue"]


def test_an_entry_point_with_a_taken_name_is_reported(install):
    install(
        "paints", {"red": "paints:RED", "blue": "paints:BLUE"}, f"from {__name__} import Colour\nBLUE = Colour(7)\n"
    )
    known = colours()
    with pytest.warns(
        UserWarning, match=r"test\.colours: 'red' of package paints is ignored, because the name is taken"
    ):
        assert known["blue"] == Colour(7)
    assert known["red"] == Colour(1)
