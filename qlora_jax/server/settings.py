"""Declares the settings of `serve`."""

import dataclasses
import ipaddress
import os
from pathlib import Path
from typing import Literal

from qlora_jax.config import ConfigError
from qlora_jax.config.fields import AT_LEAST_ONE, NON_NEGATIVE, NOT_EMPTY, POSITIVE, TEMPLATE_CHOICES, Bound, setting
from qlora_jax.config.sizes import parse_bytes
from qlora_jax.inference.settings import ComputeDtype, QuantType

CacheDtype = Literal["auto", "float32", "bfloat16", "int8"]
KEY_VARIABLE = "QLORA_JAX_API_KEY"
MOST_ROWS = Bound("one of 1, 2, 4, 8 and 16", lambda value: value in (1, 2, 4, 8, 16))
PORT = Bound("from 0 to 65535", lambda value: 0 <= value < 1 << 16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeArgs:
    """Answers requests of OpenAI's and Anthropic's clients with a model and runs on it."""

    model: str | None = setting(
        "a Hugging Face folder, a GGUF file, or org/name on the Hub, which is served too; null: the base of the runs",
        None,
        NOT_EMPTY,
        common="folder, GGUF file, or org/name on the Hub",
    )
    run: list[str] | None = setting(
        "folders of training runs or adapters; each is a model by the name of its folder. Give --run once for each",
        None,
        NOT_EMPTY,
        common="folder of a training run; may be given several times",
        repeated=True,
    )
    adapters: str | None = setting(
        "folder of further runs and adapters, which clients may load and unload by their names", None, NOT_EMPTY
    )
    host: str = setting(
        "address to listen on; another than this machine's own requires api_key", "127.0.0.1", NOT_EMPTY
    )
    port: int = setting("port to listen on; 0: one that is free", 8000, PORT, common="port to listen on")
    api_key: str | None = setting(
        f"key that clients have to send (null: the value of {KEY_VARIABLE}, if it is set)", None, NOT_EMPTY
    )
    cache: str = setting(
        "limit of the bytes of keys and values of all requests", "2GiB", NOT_EMPTY, common="bytes of keys and values"
    )
    cache_dtype: CacheDtype = setting("how keys and values are stored; auto: as they are computed", "auto")
    max_rows: int = setting("requests that are answered at the same time; others wait", 16, MOST_ROWS)
    queue: int = setting("requests that may wait; further ones get status 429", 64, NON_NEGATIVE)
    max_tokens: int = setting("limit and default of the tokens of a reply", 4096, AT_LEAST_ONE)
    max_body: str = setting("largest body of a request", "4MiB", NOT_EMPTY)
    timeout: float = setting(
        "seconds after which a request ends with an error, its time in the queue included", 600.0, POSITIVE
    )
    stop_timeout: int = setting("seconds that running requests have to finish when the server stops", 30, NON_NEGATIVE)
    chat_template: str | None = setting(
        f"{TEMPLATE_CHOICES}, to use instead of the models' chat templates", None, NOT_EMPTY
    )
    quant_type: QuantType = setting("4-bit code of the base; auto: as in training, or nf4; none: 16 bit", "auto")
    compute_dtype: ComputeDtype = setting("auto: bfloat16 if the device computes it fast, else float32", "auto")

    @property
    def runs(self) -> list[str]:
        """The folders of runs."""
        return self.run or []

    @property
    def key(self) -> str | None:
        """The key that clients have to send."""
        return self.api_key or os.environ.get(KEY_VARIABLE) or None


def run_name(path: str) -> str:
    """Returns the name by which a run is served: that of its folder."""
    return Path(path).expanduser().absolute().name


def base_name(path: str) -> str:
    """Returns the name by which a base is served: that of its folder or file, or its name on a Hub."""
    return run_name(path).removesuffix(".gguf") if Path(path).expanduser().exists() else path


def is_loopback(host: str) -> bool:
    """Returns True for an address that only this machine reaches."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_serve(args: ServeArgs) -> None:
    """Raises ConfigError if settings contradict each other; the message lists all contradictions."""
    problems = []
    if args.model is None and not args.runs:
        problems.append("model, run: found neither. Set model to a model's path, or run to a run's folder")
    names = [*([base_name(args.model)] if args.model else []), *map(run_name, args.runs)]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        problems.append(f"run: found {names.count(name)} models named {name!r}, expected one. Rename a folder")
    if not is_loopback(args.host) and args.key is None:
        problems.append(
            f"host: {args.host} can be reached from other machines (found no api_key). Set api_key or {KEY_VARIABLE}"
        )
    if args.adapters is not None and not Path(args.adapters).expanduser().is_dir():
        problems.append(f"adapters: not a folder (found {args.adapters!r}). Create it, or name another one")
    problems += [problem for name in ("cache", "max_body") for problem in _size_problems(name, getattr(args, name))]
    if problems:
        raise ConfigError(problems)


def _size_problems(name: str, text: str) -> list[str]:
    try:
        size = parse_bytes(text)
    except ValueError as error:
        return [f"{name}: {error}"]
    return [] if size else [f"{name}: found {text!r}, expected more than 0"]
