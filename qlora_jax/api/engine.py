"""`Engine`: replies to many requests at once, with the adapters of several runs on one base."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from qlora_jax.api.generate import stop_ids
from qlora_jax.api.provenance import parts_of
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.config.suggestions import suggests_arguments
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.data.tokenizer.tokenizer import Tokenizer
from qlora_jax.inference import prompts
from qlora_jax.inference.engine import engine as inference
from qlora_jax.inference.engine.grammar import Grammar
from qlora_jax.inference.engine.request import Request, Step
from qlora_jax.inference.sampling_params import Sampling
from qlora_jax.models.decoder import CausalLM

CACHE_DTYPES = ("float32", "bfloat16", "int8")
Prompt = str | Sequence[Mapping[str, object]]


class Engine:
    """A model that answers many prompts at once, each with the adapter that it asks for; one thread may use it.

    >>> engine = q.Engine(model, tokenizer, cache="16MiB")
    >>> engine.generate(["say sun 1", "say sun 2"], max_new_tokens=4) == [
    ...     q.generate_text(model, tokenizer, text, max_new_tokens=4) for text in ("say sun 1", "say sun 2")
    ... ]
    True
    """

    @suggests_arguments
    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        *,
        adapters: Mapping[str, CausalLM] = MappingProxyType({}),
        cache: str | int = "1GiB",
        cache_dtype: str | None = None,
        max_rows: int = 16,
    ):
        """Allocates the cache of keys and values.

        Args:
          model: a model without an adapter, if `adapters` are given.
          adapters: models on the same base, by the names that requests use; only their adapters are kept.
          cache: limit of the cache's bytes.
          cache_dtype: float32, bfloat16 or int8; None: the model's compute dtype.
          max_rows: 1, 2, 4, 8 or 16 replies that are decoded together.

        Raises:
          ValueError: the cache is too small or has another dtype, or an adapter's method cannot share a batch.
        """
        if cache_dtype not in (None, *CACHE_DTYPES):
            raise ValueError(f"cache_dtype: found {cache_dtype!r}, expected one of {', '.join(CACHE_DTYPES)}")
        self._model, self._tokenizer = model, tokenizer
        self._engine = inference.Engine(
            parts_of(model),
            tokenizer,
            adapters={name: parts_of(adapted) for name, adapted in adapters.items()},
            cache_bytes=cache if isinstance(cache, int) else parse_bytes(cache),
            cache_dtype=cache_dtype,
            max_rows=max_rows,
        )

    @suggests_arguments
    def request(
        self,
        prompt: Prompt,
        *,
        adapter: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        json_schema: str | None = None,
        system: str | None = None,
        raw: bool = False,
    ) -> Request:
        """Returns a request for `generate` and `stream`, for settings that differ between prompts.

        Args:
          prompt: a text or a conversation, as for `q.generate_text`.
          adapter: the name of one of the adapters; None: the model as it is.
          max_new_tokens, temperature, top_k, top_p, seed, system, raw: as for `q.generate_text`.
          min_p: sample from tokens with at least this share of the likeliest one's probability.
          stop: texts that end the reply, which they are not part of.
          json_schema: a JSON schema that the reply follows.

        Raises:
          ValueError: the prompt is empty or malformed, or leaves no room for a reply.
        """
        prompter = prompts.prompter(self._tokenizer, raw=raw, system=system)
        row = Row(Place(1, 0), {"prompt": prompt} if isinstance(prompt, str) else {"messages": [*prompt]})
        (ids,) = prompts.encode_prompts("prompt", [row], prompter, self._model.config.max_positions)
        return Request(
            prompt=ids,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed),
            stop_ids=stop_ids(self._model, self._tokenizer, chat=prompter.chat),
            stop_texts=tuple(stop),
            adapter=adapter,
            grammar=None if json_schema is None else Grammar(kind="json_schema", text=json_schema, field="json_schema"),
        )

    def stream(self, asked: Iterable[Prompt | Request], **settings: object) -> Iterator[Step]:
        """Yields the steps of all replies as they are generated; `Step.request` is the index in `asked`.

        Args:
          asked: prompts, or requests of `request`.
          settings: those of `request`, for the prompts.
        """
        requests = [one if isinstance(one, Request) else self.request(one, **settings) for one in asked]  # pyright: ignore[reportArgumentType]
        return self._engine.stream(requests)

    def generate(self, asked: Sequence[Prompt | Request], **settings: object) -> list[str]:
        """Returns the texts of the replies, in the order of `asked`; see `stream`."""
        texts = [""] * len(asked)
        for step in self.stream(asked, **settings):
            texts[step.request] += step.text
        return texts

    def usage(self) -> inference.Usage:
        """Returns the numbers of requests, pages and tokens so far."""
        return self._engine.usage()
