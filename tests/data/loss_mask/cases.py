"""Conversations and rows of segments that are hard to mask."""

from hypothesis import strategies as st

from qlora_jax.data.loss_mask.spans import Segment

# SmolLM2's vocabulary lacks the bytes of some control characters, and of planes 4 to 15.
characters = st.characters(codec="utf-8", max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d")
text = st.text(characters, max_size=40) | st.sampled_from(
    [
        "    return 5",
        "\n\nx",
        "5",
        " 5",
        "'s",
        "é\u0301",
        "👍🏽",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "x\t",
        "\u2028",
    ]
)
answers = text.filter(lambda content: content.strip())

short_texts = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["    return", "é\u0301", " ", "<|im_end|>", "</s>", "<s>", "<table>", "fox jumps"]
)
segment_lists = st.lists(st.builds(Segment, short_texts, st.booleans()), min_size=1, max_size=5)


@st.composite
def conversations(draw: st.DrawFn, system: bool = True) -> list[dict[str, str]]:
    """Alternating turns, sometimes a system turn first, sometimes a last question without an answer."""
    messages = [{"role": "system", "content": draw(text)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        messages.append({"role": "assistant", "content": draw(answers)})
    return [*messages, {"role": "user", "content": draw(text)}] if draw(st.booleans()) else messages
