"""The table of cards, and XLA's text of a row."""

import re

import pytest

from pallas_kernels.gpu_specs import CARDS, find_card, target_config

OF_HBM, OF_GDDR = ["h100", "h200", "b200", "a100"], ["a6000", "rtx4090", "rtx3090", "l40s", "l4", "t4"]
NAMES = [*OF_HBM, *OF_GDDR, "rtx5090", "rtxpro6000", "gb10"]


def test_cards_of_every_generation_are_there():
    assert list(CARDS) == NAMES
    assert all(card.name == name for name, card in CARDS.items())


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("h100", "sm_90a"),
        ("b200", "sm_100a"),
        ("a100", "sm_80"),
        ("a6000", "sm_86"),
        ("l40s", "sm_89"),
        ("t4", "sm_75"),
        ("rtx5090", "sm_120a"),
        ("gb10", "sm_121a"),
    ],
)
def test_architecture(name, architecture):
    assert CARDS[name].architecture == architecture


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_a_row_is_of_the_right_order_of_magnitude(card):
    assert 15e9 < card.memory_bytes < 200e9
    assert 0.25e12 < card.bandwidth < 8e12
    # Tensor cores compute 512 (GeForce, f32 accumulation) to 8192 FLOP per clock and SM; data sheets use a lower clock.
    assert 400 < card.peak_flops("float16") / (card.sm_count * card.clock_ghz * 1e9) < 8500
    assert card.shared_memory_per_block <= card.shared_memory_per_sm
    assert card.source


# NVIDIA's data sheets: FLOP per clock and SM of the tensor cores, at the clock of the row, within 4 %.
PER_CLOCK = {"h100": 4096, "b200": 8192, "a100": 2048, "a6000": 1024, "rtx4090": 512, "rtx3090": 512, "l40s": 1024}
PER_CLOCK |= {"l4": 1024, "rtx5090": 512, "rtxpro6000": 1024}


@pytest.mark.parametrize(("name", "rate"), PER_CLOCK.items())
def test_peaks_are_a_power_of_two_per_clock_and_sm(name, rate):
    card = CARDS[name]
    # NVIDIA states the peaks of H100, B200 at lower clocks than the highest.
    tolerance = {"h100": 0.1, "b200": 0.1}.get(name, 0.04)
    assert card.bf16_flops == pytest.approx(rate * card.sm_count * card.clock_ghz * 1e9, rel=tolerance)


def test_a_t4_has_tensor_cores_for_float16_only():
    t4 = CARDS["t4"]
    fp32 = 2 * t4.sm_count * t4.fp32_cores_per_sm * t4.clock_ghz * 1e9
    assert t4.peak_flops("bfloat16") == pytest.approx(fp32, rel=0.01)
    assert t4.peak_flops("float16") == pytest.approx(8 * fp32, rel=0.01) and t4.peak_flops("float32") is None
    assert all(card.peak_flops("float16") == card.bf16_flops for card in CARDS.values() if card is not t4)


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
    with pytest.raises(ValueError, match=rf"known: {', '.join(NAMES)}\)\.$"):
        find_card("voodoo")
