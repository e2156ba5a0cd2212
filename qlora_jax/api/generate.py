"""`generate_text`: a model's reply to a prompt or a conversation."""

from collections.abc import Mapping, Sequence

from qlora_jax.api.provenance import Provenance, parts_of
from qlora_jax.config.suggestions import suggests_arguments
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference import prompts
from qlora_jax.inference.decode import generate
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.decoder import CausalLM


@suggests_arguments
def generate_text(
    model: CausalLM,
    tokenizer: Tokenizer,
    prompt: str | Sequence[Mapping[str, object]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    system: str | None = None,
    raw: bool = False,
) -> str:
    """Returns the model's reply, without the prompt.

    >>> reply = q.generate_text(model, tokenizer, "say sun 1", max_new_tokens=8)
    >>> reply == q.generate_text(model, tokenizer, "say sun 1", max_new_tokens=8)  # the likeliest tokens, each time
    True

    Args:
      prompt: a text, which becomes a user's turn if the tokenizer has a chat template; or a conversation, a list of
        messages such as {"role": "user", "content": "Hello"}.
      max_new_tokens: maximum tokens of the reply.
      temperature: 0 for the most likely token each time; 1 for sampling from the model's distribution.
      top_k: sample from the k most likely tokens only; 0 for all.
      top_p: sample from the most likely tokens that reach this probability.
      seed: random seed of sampling.
      system: a system message for the chat template.
      raw: no chat template: the model continues the text.

    Raises:
      ValueError: the prompt is empty or malformed, or leaves no room for a reply.
    """
    prompter = prompts.prompter(tokenizer, raw=raw, system=system)
    column = "prompt" if isinstance(prompt, str) else "messages"
    row = Row(Place(1, 0), {column: prompt if isinstance(prompt, str) else [*prompt]})
    ids = prompts.encode_prompts("prompt", [row], prompter, model.config.max_positions)
    (reply,) = generate(
        parts_of(model),
        ids,
        sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids(model, tokenizer, chat=prompter.chat),
    )
    return tokenizer.decode(reply.ids)


def stop_ids(model: CausalLM, tokenizer: Tokenizer, *, chat: bool) -> frozenset[int]:
    """Ids that end a reply: eos, the end of a turn, and those that the model's files list."""
    provenance = getattr(model, "provenance", None)
    listed = provenance.opened.source.tokenizer["stop_token_ids"] if isinstance(provenance, Provenance) else []
    return prompts.stop_ids(tokenizer, listed, chat=chat)
