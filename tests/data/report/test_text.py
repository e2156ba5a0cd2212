"""Characters that would move the cursor or change the direction of text appear as visible characters."""

from qlora_jax.data.report.text import VISIBLE


def test_what_would_change_a_display_is_shown_instead():
    shown = "a\u202eb\u2066c\x1b[31m\x7f\x85\tline\n".translate(VISIBLE)
    assert shown == "a<U+202E>b<U+2066>c\u241b[31m\u2421\ufffd\tline\n"
