"""A staged folder appears whole or not at all."""

from pathlib import Path

import pytest

from qlora_jax.io.folders import staged_folder


@pytest.mark.parametrize("there", [False, True])
def test_appears_at_the_end(tmp_path: Path, there: bool) -> None:
    target = tmp_path / "deep" / "out"
    if there:
        target.mkdir(parents=True)
    with staged_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not (target / "file").exists()
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    assert (target / "file").read_text() == "x"


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["out", "out/inside"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("precious")
    with pytest.raises(ValueError, match="out is there already and not empty"), staged_folder(tmp_path / "out"):
        raise AssertionError("entered")
    assert (tmp_path / name).read_text() == "precious"
