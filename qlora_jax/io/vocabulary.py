"""The tokenizer of a model with the new tokens of a run."""

from qlora_jax.config import ModelArgs
from qlora_jax.data.tokenizer import Tokenizer, load_tokenizer, with_new_tokens
from qlora_jax.io.entries import ModelSource


def open_tokenizer(source: ModelSource, args: ModelArgs, vocabulary: int) -> Tokenizer:
    """The tokenizer of `source`, with the settings' new tokens.

    Args:
      vocabulary: rows of the model's embedding.

    Raises:
      ValueError: it can't be read; a token that is not new; or, with new tokens, fewer rows than tokens before them.
    """
    tokenizer = load_tokenizer(source.tokenizer)
    grown = with_new_tokens(tokenizer, args.new_tokens, args.new_special_tokens)
    if grown.new_ids and min(grown.new_ids) > vocabulary:
        raise ValueError(
            f"{source.path}: its tokenizer has {tokenizer.vocab_size} tokens, its embedding {vocabulary} rows: new "
            "tokens would leave rows between them that nothing fills"
        )
    return grown
