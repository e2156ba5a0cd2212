"""The table of cards, and XLA's text of a row."""

import re

import pytest

from pallas_kernels.gpu_specs import CARDS, find_card, target_config


def test_these_cards_are_there():
    assert set(CARDS) == {"h100", "h200", "b200", "a100", "a6000", "rtx4090", "rtx3090", "l40s", "rtx5090"}
    assert all(card.name == name for name, card in CARDS.items())


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("h100", "sm_90a"),
        ("b200", "sm_100a"),
        ("a100", "sm_80"),
        ("a6000", "sm_86"),
        ("l40s", "sm_89"),
        ("rtx5090", "sm_120a"),
    ],
)
def test_architecture(name, architecture):
    assert CARDS[name].architecture == architecture


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_a_row_is_of_the_right_order_of_magnitude(card):
    assert 20e9 < card.memory_bytes < 200e9
    assert 0.7e12 < card.bandwidth < 8e12
    # Tensor cores compute 512 (GeForce, f32 accumulation) to 8192 FLOP per clock and SM; data sheets use a lower clock.
    assert 400 < card.bf16_flops / (card.sm_count * card.clock_ghz * 1e9) < 8500
    assert card.shared_memory_per_block < card.shared_memory_per_sm
    assert card.source


def test_target_config_is_the_text_that_xla_reads():
    text = target_config(CARDS["h100"])
    assert "  core_count: 132\n" in text
    assert "  device_memory_size: 84942979072\n" in text
    assert "  memory_bandwidth: 3352320000000\n" in text
    assert "{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }" in text
    assert text.endswith('device_description_str: "NVIDIA H100 80GB HBM3"\n')
    assert text.count("{") == text.count("}")
    names = re.findall(r"^  (\w+):", text, re.MULTILINE)
    assert len(names) == len(set(names))


def test_a_family_of_cards_is_no_single_architecture():
    assert "{ major: 8 minor: 6 feature_extension: NONE }" in target_config(CARDS["a6000"])


@pytest.mark.parametrize(("name", "suggestion"), [("H100", "h100"), ("a600", "a6000"), ("4090", "rtx4090")])
def test_an_unknown_card_is_told_with_the_nearest(name, suggestion):
    with pytest.raises(ValueError, match=rf"'{name}' is unknown \(known: h100, .*Did you mean '{suggestion}'"):
        find_card(name)


def test_a_card_that_is_like_none_gets_no_suggestion():
    with pytest.raises(ValueError, match=r"known: h100, h200, b200, a100, a6000, rtx4090, rtx3090, l40s, rtx5090\)\.$"):
        find_card("voodoo")
