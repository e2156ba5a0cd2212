"""The loss curves: the drawn values, and the written file."""

import struct
from xml.sax.saxutils import escape

import pytest

from qlora_jax.training.report.curves import Chart, Line, smooth
from qlora_jax.training.report.plot import NARROW, chart_svg, loss_label, plot_loss


def test_smooth_is_a_weighted_mean_of_what_came():
    # m_3 = (w^2 v_1 + w v_2 + v_3) / (w^2 + w + 1)
    assert smooth([4.0, 2.0, 7.0], 0.5) == pytest.approx([4.0, (2.0 + 2.0) / 1.5, (1.0 + 1.0 + 7.0) / 1.75])
    assert smooth([1.0, 5.0], 0.0) == [1.0, 5.0]


@pytest.mark.parametrize("count", [1, 40])
def test_a_png_comes_out(tmp_path, count):
    records = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": None}]
    records += [{"step": 2 + i, "loss": 3.0 - i / count} for i in range(count)]
    plot_loss(records, tmp_path / "loss.png", "a run", loss_label("dpo"))
    header = (tmp_path / "loss.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", header[16:]) == (1200, 675)


@pytest.mark.parametrize("title", ["a$b", "a$^$b", "$x_$", r"cost \$5 to $6^2", "a_b {c} %d"])
def test_a_title_is_not_read_as_a_formula(tmp_path, title):
    records = [{"step": step, "loss": 1.0, "eval_loss": 2.0} for step in (1, 2)]
    plot_loss(records, tmp_path / "loss.png", title, loss_label("sft"))
    chart = Chart("caption", "", [Line(title, [1, 2], [3.0, 4.0])])
    assert escape(title) in unescape_spaces(chart_svg(chart, NARROW))


def unescape_spaces(svg):
    """Matplotlib writes spaces of SVG texts as they are, or as a no-break space."""
    return svg.replace("\u00a0", " ")
