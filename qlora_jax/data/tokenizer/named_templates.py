"""Chat templates by name, for base models, whose files have none; each is a file of chat_templates."""

from collections.abc import Callable, Mapping
from pathlib import Path

from qlora_jax.config.fields import TEMPLATE_CHOICES
from qlora_jax.data.tokenizer.chat_template import MAX_TEMPLATE

FOLDER = Path(__file__).parent / "chat_templates"
TOKENS: Mapping[str, tuple[str, ...]] = {  # a template's name: the tokens that it writes; zephyr writes eos
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "zephyr": (),
}


def read_template(name: str | Path, token_id: Callable[[str], int | None], eos: str | None) -> str:
    """Returns the template of a name in TOKENS, or else of a file.

    Args:
      token_id: returns the id of a token, or None if the vocabulary does not have it.
      eos: the token that ends a text, if there is one.

    Raises:
      ValueError: the file cannot be read, or the vocabulary lacks tokens of the named template.
    """
    missing = [token for token in TOKENS.get(str(name), ()) if token_id(token) is None]
    if missing:
        raise ValueError(
            f"chat_template: {name} needs tokens that this vocabulary lacks: {', '.join(missing)}. Add them to "
            "model.new_special_tokens in training, or use zephyr, which ends turns with eos."
        )
    if eos is None and name == "zephyr":
        raise ValueError("chat_template: zephyr ends turns with eos (found no eos_token). Add it to the model's files.")
    path = FOLDER / f"{name}.jinja" if str(name) in TOKENS else Path(name)
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(MAX_TEMPLATE + 1)  # a longer one is refused when it is used
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{name}: the chat template can't be read as UTF-8 text ({error}). Name {TEMPLATE_CHOICES}."
        ) from error
