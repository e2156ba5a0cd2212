"""The comparison of versions: its ratios, and that the rows with tools have all that they should measure."""

import gzip
from pathlib import Path

from qlora_jax.data.encoder import make_encoder
from qlora_jax.data.formats.detect import detect_format
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import load_tokenizer, with_chat_template
from scripts.bench import versions
from tests.data.conftest import ASSETS


def test_a_ratio_is_the_median_of_pairs_with_its_interval():
    before = [{"seconds": seconds} for seconds in (1.0, 2.0, 4.0, 1.0, 1.0)]
    after = [{"seconds": seconds} for seconds in (1.1, 2.2, 4.4, 1.1, 9.0)]
    median, low, high = versions.ratio({"before": before, "after": after}, "seconds")
    assert abs(median - 1.1) < 1e-9 and abs(low - 1.1) < 1e-9 and 1.1 <= high <= 9.0


def test_rows_with_tools_are_rendered_with_their_calls(tmp_path: Path):
    (tmp_path / "tools.jinja").write_text(versions.TOOL_TEMPLATE)
    text = gzip.decompress((ASSETS / "smollm2_tokenizer.json.gz").read_bytes()).decode()
    tokenizer = load_tokenizer({"tokenizer_json": text, "eos_token": "<|im_end|>"})
    tokenizer = with_chat_template(tokenizer, tmp_path / "tools.jinja")
    rows = [Row(Place(number + 1, number), versions.tool_row(number)) for number in range(2)]
    encoder, problems = make_encoder(detect_format("rows", rows), tokenizer), []
    for segments in encoder.segment_rows(rows, problems).segments:
        call, answer = (segment.text for segment in segments if segment.supervised)
        assert call.startswith('<tool_call>\n{"name": "weather"') and answer.endswith("<|im_end|>")
        assert '"description": "the city' in segments[0].text
    assert not problems
