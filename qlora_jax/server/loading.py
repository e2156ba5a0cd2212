"""Loads a base and the runs on it into one engine, and makes the server of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from qlora_jax.config.sizes import parse_bytes
from qlora_jax.data.readers.files import Place, Row
from qlora_jax.evaluation.heads.predictions import encode_texts, normalized
from qlora_jax.inference import prompts
from qlora_jax.inference.engine.engine import Engine
from qlora_jax.inference.fast_decoding import for_fast_decoding
from qlora_jax.io.loading.loader import Progress
from qlora_jax.io.pretrained import OpenedModel, apply_adapter, load_checked, open_pretrained, weight_settings
from qlora_jax.models.partition import ModelParts, combine, partition
from qlora_jax.server.app import make_app
from qlora_jax.server.engine_thread import EngineThread
from qlora_jax.server.metrics import Metrics
from qlora_jax.server.page import chat_page
from qlora_jax.server.run import Server
from qlora_jax.server.served_models import Embed, Embeddings, ServedModel, ServedModels, chat_format
from qlora_jax.server.service import Limits, Service
from qlora_jax.server.settings import ServeArgs, base_name, is_loopback, run_name
from qlora_jax.training.live.run_status import RunReader

EMBEDDED_TOGETHER = 8  # texts between two steps of the engine
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def make_server(args: ServeArgs, progress: Progress | None = None) -> Server:
    """Loads the models of the settings, and opens the port.

    Raises:
      ValueError: a model cannot be loaded, or runs have other bases.
      OSError: the port is taken.
    """
    loader = _Loader(args, progress)
    engine = Engine(
        # A smaller head is faster, where that changes no weight.
        for_fast_decoding(partition(loader.model), integer=False, head_bits=None),
        loader.tokenizer,
        adapters=loader.adapters,
        cache_bytes=parse_bytes(args.cache),
        cache_dtype=None if args.cache_dtype == "auto" else args.cache_dtype,
        max_rows=args.max_rows,
    )
    loader.adapters.clear()  # the engine has its own copies
    thread = EngineThread(engine, places=args.max_rows + args.queue)
    adapters = None if args.adapters is None else Path(args.adapters).expanduser()

    def limited(model: ServedModel) -> ServedModel:
        return dataclasses.replace(model, positions=min(model.positions, engine.positions))

    def load(name: str, folder: Path) -> tuple[ServedModel, Callable[[], None]]:
        model, parts = loader.load(name, str(folder))
        return limited(model), lambda: None if parts is None else engine.add_adapter(name, parts)

    def unload(model: ServedModel) -> None:
        if model.adapter is not None:
            engine.remove_adapter(model.adapter)

    service = Service(
        models=ServedModels([limited(model) for model in loader.served]),
        thread=thread,
        limits=Limits(max_body=parse_bytes(args.max_body), max_tokens=args.max_tokens, seconds=args.timeout),
        metrics=Metrics(),
        key=args.key,
        hosts=LOOPBACK_NAMES | {args.host} if args.key is None and is_loopback(args.host) else frozenset(),
        load=load,
        unload=unload,
        adapters=adapters,
        page=chat_page(),
    )
    return Server(make_app(service), service, args.host, args.port, args.stop_timeout)


class _Loader:
    """A loaded base, and what the runs on it add.

    Attributes:
      model: the base.
      tokenizer: of the base.
      served: a model per name.
      adapters: the parts of each run that writes text, which share the base's arrays.
    """

    def __init__(self, args: ServeArgs, progress: Progress | None):
        self._args = args
        runs = [(run_name(run), run, self._open(run)) for run in args.runs]
        path = args.model or str(runs[0][2].source.path)
        base = open_pretrained(model=path, chat_template=args.chat_template)
        trained = runs[0][2] if runs else base
        self._settings = weight_settings(trained, args.quant_type, args.compute_dtype)
        loaded = load_checked(base, self._settings, progress)
        self.model, self._fingerprint = loaded.model, loaded.fingerprint
        # Not `base` itself, whose lists of tokens have 16 MB.
        self.tokenizer, self._path, self._features = base.tokenizer, base.source.path, base.features
        self._name = base_name(args.model or (trained.source.hub_name or path))
        if self._name in [name for name, *_ in runs]:
            raise ValueError(f"run: {self._name!r} is the name of the base too. Rename the run's folder")
        self.served = [self._served(self._name, path, base, None)]
        self.adapters: dict[str, ModelParts] = {}
        for name, run, opened in runs:
            model, parts = self._adapted(name, run, opened)
            self.served.append(model)
            self.adapters |= {} if parts is None else {name: parts}

    def load(self, name: str, run: str) -> tuple[ServedModel, ModelParts | None]:
        """Returns a further run on the base, and its parts for the engine if it writes text."""
        return self._adapted(name, run, self._open(run))

    def _open(self, run: str) -> OpenedModel:
        return open_pretrained(model=self._args.model, run=run, chat_template=self._args.chat_template)

    def _adapted(self, name: str, run: str, opened: OpenedModel) -> tuple[ServedModel, ModelParts | None]:
        found = opened.run
        assert found is not None, "open_pretrained opens a run"
        if opened.source.path != self._path and opened.features != self._features:
            raise ValueError(f"{run}: its base is {opened.source.path}, and the server's {self._path}")
        same_codes = self._settings.quant_type == opened.args.quant_type
        if same_codes and found.fingerprint not in (None, self._fingerprint):
            raise ValueError(f"{run}: was trained on another base than {self._path}. Serve it by itself")
        if found.initial is not None:
            raise ValueError(
                f"{run}: lora.init={found.lora_args.init} changes the base, which runs share here. Export it with "
                "qlora-jax export --format peft, and serve that folder"
            )
        if found.lora_args.merge_into is not None:
            raise ValueError(
                f"{run}: its model is not this base with an adapter, but the two merged and rounded (lora.merge_into="
                f"{found.lora_args.merge_into}). Export it with qlora-jax export, and serve that model"
            )
        if found.head is not None and found.head.objective != "embedding":
            raise ValueError(f"{run}: has a head of objective={found.head.objective}. Use qlora-jax predict")
        parts = apply_adapter(combine(partition(self.model)), found)
        embed = None if found.head is None else _embedder(opened, parts)
        model = self._served(name, run, opened, embed)
        return model, parts if embed is None else None

    def _served(self, name: str, root: str, opened: OpenedModel, embed: Embed | None) -> ServedModel:
        tokenizer, listed = opened.tokenizer, opened.source.tokenizer["stop_token_ids"]
        if tokenizer.exported == self.tokenizer.exported:  # one copy in memory
            shared = self.tokenizer
            tokenizer = dataclasses.replace(tokenizer, backend=shared.backend, exported=shared.exported)
        is_adapter = opened.run is not None
        return ServedModel(
            name=name,
            adapter=name if is_adapter and embed is None else None,
            tokenizer=tokenizer,
            form=chat_format(tokenizer),
            stop_ids=prompts.stop_ids(tokenizer, listed, chat=False),
            turn_end_ids=prompts.stop_ids(tokenizer, listed, chat=tokenizer.chat_template is not None),
            positions=opened.features.max_positions,
            root=root,
            parent=self._name if is_adapter else None,
            embed=embed,
            status=_status_reader(Path(root)) if opened.run is not None and opened.run.step is not None else None,
        )


def _status_reader(folder: Path) -> Callable[[], Mapping[str, object]]:
    reader = RunReader(folder)
    return lambda: reader.read().to_json()


def _embedder(opened: OpenedModel, parts: ModelParts) -> Embed:
    assert opened.run is not None and opened.run.head is not None, "the caller asks"
    head, tokenizer, positions = opened.run.head, opened.tokenizer, opened.features.max_positions

    def embed(texts: Sequence[str]) -> tuple[list[Embeddings], int]:
        rows = [Row(Place(number + 1, number), {"text": text}) for number, text in enumerate(texts)]
        encoded = encode_texts("input", rows, head, tokenizer, positions)
        shares = [slice(first, first + EMBEDDED_TOGETHER) for first in range(0, len(rows), EMBEDDED_TOGETHER)]
        few = [dataclasses.replace(encoded, places=encoded.places[at], texts=encoded.texts[at]) for at in shares]
        return [lambda one=one: normalized(one.outputs(parts)) for one in few], sum(map(len, encoded.texts))

    return embed
