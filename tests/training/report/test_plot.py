"""The loss curves: the drawn values, and the written file."""

import struct

import pytest

from qlora_jax.training.report.plot import plot_loss, smooth


def test_smooth_is_a_weighted_mean_of_what_came():
    # m_3 = (w^2 v_1 + w v_2 + v_3) / (w^2 + w + 1)
    assert smooth([4.0, 2.0, 7.0], 0.5) == pytest.approx([4.0, (2.0 + 2.0) / 1.5, (1.0 + 1.0 + 7.0) / 1.75])
    assert smooth([1.0, 5.0], 0.0) == [1.0, 5.0]


@pytest.mark.parametrize("count", [1, 40])
def test_a_png_comes_out(tmp_path, count):
    records = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": None}]
    records += [{"step": 2 + i, "loss": 3.0 - i / count} for i in range(count)]
    plot_loss(records, tmp_path / "loss.png", "a run")
    header = (tmp_path / "loss.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1200, 675)
