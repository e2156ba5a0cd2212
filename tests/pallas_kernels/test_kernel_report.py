"""The report shows the op's own choices, in a table, in lines and in JSON, and starts no backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from pallas_kernels import aot, dispatch, kernel_report
from pallas_kernels.devices import Device
from pallas_kernels.dispatch import Capabilities, Implementation
from pallas_kernels.gpu_specs import CARDS
from pallas_kernels.native.library import problem as native_problem
from pallas_kernels.nf4_matmul import api, costs, reference
from pallas_kernels.nf4_matmul.preferred_layout import choose_layout
from pallas_kernels.nf4_matmul.shapes import REDUCED, SHAPES, TILE, reduced
from tests.pallas_kernels.nf4_matmul import contract as contract

ROOT = Path(__file__).resolve().parents[2]
DOWN = SHAPES["llama-2-7b/down"]


def lines_of(capsys, *argv: str) -> list[str]:
    assert kernel_report.main(argv) == 0
    return capsys.readouterr().out.splitlines()


def test_every_card_and_shape_has_a_line(capsys):
    others = ("head dim", "codes of files")
    lines = [line for line in lines_of(capsys, "--m", "1", "512") if not any(each in line for each in others)]
    assert len(lines) == (1 + len(CARDS)) * len(SHAPES) * 2 + 1
    assert "nothing here was measured" in lines[-1] and "M = 4096 (hopper, by reasoning), 2048 (ampere, by" in lines[-1]
    found = next(line for line in lines if line.startswith("h100: llama-2-7b/down 4096x11008 M=512"))
    assert "forward hopper, backward hopper; layout split_k" in found
    found = next(line for line in lines if line.startswith("l40s: llama-2-7b/down 4096x11008 M=1:"))
    assert "forward skinny, backward ampere; layout split_k" in found
    found = next(line for line in lines if line.startswith("b200: llama-2-7b/down 4096x11008 M=512"))
    assert "forward reference, backward reference; layout split_k" in found and "takes 1 to 256 rows, not 512" in found
    found = next(line for line in lines if line.startswith("rtx5090: llama-2-7b/down 4096x11008 M=512"))
    assert "forward ampere, backward ampere; layout split_k" in found
    found = next(line for line in lines if line.startswith("t4: llama-2-7b/down 4096x11008 M=512"))
    assert "forward reference, backward reference" in found and "not on Tesla T4 (sm_75)" in found


def test_the_codes_of_files_have_a_kernel_or_a_reason(capsys):
    lines = [line for line in lines_of(capsys, "--m", "1", "512", "--shape", DOWN.name) if ": codes of files" in line]
    taken, others = "Q4_0, IQ4_NL, MXFP4, NVFP4_256", "Q4_K, Q6_K, Q8_0, INT4_128, FP8_128"
    reason = "reference; not a table of 16 values times one scale per group of columns"
    for card in CARDS:
        fused, dequantized = [line for line in lines if line.startswith(f"{card}: ")]
        assert dequantized == f"{card}: codes of files, {others}: {reason}"
        many = {"h100": "hopper", "h200": "hopper"}.get(card, "ampere")
        both = f"skinny forward M=1; {many} forward M=512, backward M=1, backward M=512; "
        b200 = "skinny forward M=1; reference forward M=512, backward M=512; ampere backward M=1; "
        runs = {"t4": "reference; ", "b200": b200}.get(card, both)
        assert fused.startswith(f"{card}: codes of files, {taken}: {runs}")
    assert "not ampere forward: runs on sm_80" in next(line for line in lines if line.startswith("t4"))
    assert f"cpu: codes of files, {taken}, {others}: cpu" in lines or native_problem()


def test_attention_of_every_card_has_a_reason(capsys):
    lines = [line for line in lines_of(capsys, "--m", "1", "--shape", DOWN.name) if ": attention" in line]
    old = next(line for line in lines if line.startswith("t4:"))
    assert "tiles; mma kernels run on sm_80" in old and old.endswith("not Tesla T4 (sm_75)")
    for card in CARDS.keys() - {"t4"}:
        kernels, tiles = [line for line in lines if line.startswith(f"{card}:")]
        best = "wgmma" if card in ("h100", "h200") else "mma"
        assert kernels == f"{card}: attention, head dim 64, 80, 96, 128, 256: {best}"
        assert "head dim 100: tiles; " in tiles
        assert tiles.endswith("mma kernels take head dims 64, 80, 96, 128, 256, not 100")


def test_decoding_on_every_card_has_a_reason(capsys):
    lines = [line for line in lines_of(capsys, "--m", "1", "--shape", DOWN.name) if ": decoding" in line]
    assert not any(line.startswith("cpu") for line in lines)
    old = [line for line in lines if line.startswith("t4:")]
    assert all("reference; decode kernels run on sm_80" in line for line in old) and len(old) == 4
    for card in CARDS.keys() - {"t4"}:
        of_card = [line for line in lines if line.startswith(f"{card}:")]
        for pages, lines_of_dtype in (("bfloat16", of_card[:2]), ("int8", of_card[2:])):
            begin = f"{card}: decoding over pages in {pages}, head dim "
            assert lines_of_dtype[0] == f"{begin}64, 80, 96, 128, 256: mma"
            assert lines_of_dtype[1].startswith(f"{begin}100: reference; decode kernels take head dims 64, 80")


def test_numbers_of_one_line():
    """LLaMA-2-7B's down_proj, 45.1 M weights: 0.5 bytes of codes each, 1/64 + 4/(64 256) of constants, 2 in bf16."""
    line = kernel_report.report_row("a100", DOWN, 512)
    assert line.codes == 4096 * 11008 // 2 and line.dequantized == 0
    assert kernel_report.report_row("b200", DOWN, 512).dequantized == 2 * 4096 * 11008
    assert line.constants == 4096 * 11008 // 64 + 4 * (4096 * 11008 // 64 // 256) + 4
    expanded = 2 * 4096 * 11008 // 64
    moved = line.codes + line.constants + 2 * expanded + 2 * 512 * (4096 + 11008)
    assert line.intensity == pytest.approx(2 * 512 * 4096 * 11008 / moved)
    assert line.bound == "compute" and line.roof_seconds == pytest.approx(2 * 512 * 4096 * 11008 / 312e12)
    one = kernel_report.report_row("a100", DOWN, 1)
    assert one.bound == "memory" and one.roof_seconds > 2 * 4096 * 11008 / 312e12
    on_cpu = kernel_report.report_row("cpu", DOWN, 1)
    assert on_cpu.layout == "row_planar" and on_cpu.bound is None and on_cpu.roof_seconds is None


def test_a_fused_implementation_moves_no_dequantized_weight(monkeypatch):
    fused = Implementation(
        reference.forward, reference.backward, Capabilities(devices=("sm_90",), rows=(16, 4096)), True
    )
    monkeypatch.setitem(api.IMPLEMENTATIONS, "fused", fused)
    monkeypatch.setitem(dispatch.PREFERENCE, "sm_90", ("fused", "reference"))
    many, one = kernel_report.report_row("h100", DOWN, 512), kernel_report.report_row("h100", DOWN, 1)
    assert many.runs == {"forward": "fused", "backward": "fused"} and many.dequantized == 0 and not many.refused
    assert many.intensity > 3 * kernel_report.report_row("b200", DOWN, 512).intensity
    assert one.runs["forward"] == "reference"
    assert one.refused["fused forward"] == "takes 16 to 4096 rows, not 1"
    assert "not fused forward: takes 16 to 4096 rows, not 1" in kernel_report.row_text(one)


def test_the_table_fits_100_columns(monkeypatch, capsys):
    odd = Implementation(reference.forward, reference.backward, Capabilities(devices=("sm_80",), rows=(1, 16)))
    monkeypatch.setitem(api.IMPLEMENTATIONS, "small", odd)
    monkeypatch.setitem(dispatch.PREFERENCE, "cpu", ("small", "reference"))
    console = Console(force_terminal=True, width=100, color_system=None)
    kernel_report.report(kernel_report._arguments([]), console)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for name in (*SHAPES, *CARDS, "no fused kernel", "not small forward: runs on sm_80, not on cpu"):
        assert name in text
    assert "…" not in text


def test_json_holds_everything(capsys):
    assert kernel_report.main(["--card", "l40s", "cpu", "--shape", "smollm2*", "--m", "7", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "nothing here was measured" in found["note"]
    assert [(line["device"], line["shape"]) for line in found["lines"]] == [
        (card, name) for card in ("l40s", "cpu") for name in SHAPES if name.startswith("smollm2")
    ]
    assert found["lines"][0]["runs"] == {"forward": "skinny", "backward": "ampere"}


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--card", "cpu", "h10"], "card 'h10' is unknown (known: h100,"),
        (["--shape", "llama-4/*"], "shape 'llama-4/*' matches none of: smollm2-135m/q,o,"),
    ],
)
def test_an_unknown_name_is_one_line_and_exit_code_2(argv, part, capsys):
    assert kernel_report.main(argv) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and part in err


@pytest.mark.parametrize("m", ["0", "-3", "many"])
def test_rows_are_positive_numbers(m, capsys):
    with pytest.raises(SystemExit) as caught:
        kernel_report.main(["--m", m])
    assert caught.value.code == 2 and "--m" in capsys.readouterr().err


def test_compiling_where_it_can_not_be_done_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(aot, "problem", lambda: "packages missing: nvidia-cuda-nvcc; install them: somehow")
    assert kernel_report.main(["--card", "h100", "--compile"]) == 2
    assert "--compile: packages missing: nvidia-cuda-nvcc" in capsys.readouterr().err


@pytest.mark.skipif(aot.problem() is not None, reason=str(aot.problem()))
def test_compiled_products_use_tensor_cores(capsys):
    argv = ["--card", "a100", "--shape", "smollm2-135m/k,v", "--m", "512", "--json", "--compile"]
    assert kernel_report.main(argv) == 0
    compiled = json.loads(capsys.readouterr().out)["lines"][0]["compiled"]
    for way in ("forward", "backward"):
        assert compiled[way]["tensor-core instructions"] > 0 and compiled[way]["registers"] > 0
        assert compiled[way]["temporary bytes"] < 2 * 192 * 576  # no dequantized weight


def test_no_backend_is_started():
    code = (
        "import sys\n"
        "from pallas_kernels import kernel_report\n"
        "assert kernel_report.main(['--m', '1']) == 0\n"
        "from jax._src import xla_bridge\n"
        "print(xla_bridge.backends_are_initialized(), file=sys.stderr)"
    )
    environment = os.environ | {"JAX_PLATFORMS": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr.strip() == "False", done.stderr


def test_a_cards_device_is_what_jax_would_say():
    for name, card in CARDS.items():
        device, same = kernel_report.device_of_card(name)
        assert same is card
        assert device == Device(platform="gpu", kind=card.description, compute_capability=card.compute_capability)


# Shapes and costs


def test_reduced_shapes_keep_the_remainders_of_real_ones():
    assert {reduced(size) % TILE for size in (576, 192, 896, 4864, 11008)} == {64, 192, 128, 0}
    for shape in SHAPES.values():
        for size in shape.nk:
            assert reduced(size) % TILE == size % TILE and reduced(size) <= min(size, 2 * TILE)
    assert all(k % 64 == 0 for _, k in REDUCED)


@pytest.mark.parametrize("shape", REDUCED, ids=str)
def test_reduced_shapes_are_right(shape):
    layout, _ = choose_layout("cpu", shape, 64)
    contract.check("reference", layout, 17, shape, contract.DTYPES[1], "nf4", True)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (96, 192), (64, 192), (5, 7)])
def test_held_bytes_are_those_of_a_quantized_weight(shape, double_quant):
    layout = {(5, 7): "flat", (64, 192): "split_k"}.get(shape, "bnb")
    w = contract.weight(shape, layout=layout, double_quant=double_quant)
    stored = costs.weight_bytes(shape, layout, double_quant=double_quant)
    assert stored.codes == w.codes.nbytes and stored.codes + stored.constants == w.nbytes


def test_a_fused_product_reads_and_writes_its_expanded_constants():
    stored, activations = costs.weight_bytes((128, 192), "split_k"), 2 * 5 * (128 + 192)
    scales = 2 * 128 * 4  # 192 columns are three runs of 64, and one past the end
    moved = stored.codes + stored.constants + activations
    assert costs.traffic(5, (128, 192), "split_k", fused=True) == moved + 2 * scales
    assert costs.traffic(5, (128, 192), "split_k", fused=False) == moved + 2 * 2 * 128 * 192


def test_which_roof_is_lower():
    square = (4096, 4096)
    under = costs.roofline(1, square, "split_k", fused=True, peak=1e15, bandwidth=1e12)
    assert under.bound == "memory" and under.seconds == costs.traffic(1, square, "split_k", fused=True) / 1e12
    under = costs.roofline(4096, square, "split_k", fused=True, peak=1e15, bandwidth=1e12)
    assert under.bound == "compute" and under.seconds == 2 * 4096**3 / 1e15 and under.ridge == 1000
