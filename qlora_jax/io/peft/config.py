"""The settings in a PEFT adapter's adapter_config.json."""

from pathlib import Path
from typing import Annotated, TypedDict

from pydantic import Field, with_config

from qlora_jax.metadata import read_json

MAX_PATTERNS = 10_000  # each is compiled

type Rank = Annotated[int, Field(ge=1, le=1 << 16)]
type Alpha = Annotated[float, Field(allow_inf_nan=False)]
type TokenId = Annotated[int, Field(ge=0, lt=2**31)]


@with_config(extra="allow")
class AdapterConfig(TypedDict, total=False):
    """The settings that are used; other keys are kept, because one that is not supported is an error.

    Keys:
      r, lora_alpha: required for LoRA; (IA)^3 has neither. r is the rank of VeRA too, and OFT's number of blocks, where
        0 means that oft_block_size applies.
    """

    peft_type: str | None
    task_type: str | None
    base_model_name_or_path: str | None
    revision: str | None
    bias: str
    target_modules: object
    exclude_modules: object
    layers_to_transform: int | list[int] | None
    target_parameters: Annotated[list[str], Field(max_length=MAX_PATTERNS)] | None
    r: Annotated[int, Field(ge=0, le=1 << 16)]
    lora_alpha: Alpha
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    use_rslora: bool | None
    use_dora: bool | None
    rank_pattern: Annotated[dict[str, Rank], Field(max_length=MAX_PATTERNS)] | None
    alpha_pattern: Annotated[dict[str, Alpha], Field(max_length=MAX_PATTERNS)] | None
    init_lora_weights: bool | str | None
    oft_block_size: Annotated[int, Field(ge=0, le=1 << 16)]
    block_share: bool | None
    use_cayley_neumann: bool | None
    num_cayley_neumann_terms: Annotated[int, Field(ge=2, le=1 << 8)]
    peft_version: str | None
    vera_dropout: Annotated[float, Field(ge=0, lt=1)] | None
    projection_prng_key: Annotated[int, Field(ge=0, lt=1 << 32)]
    save_projection: bool
    modules_to_save: list[str] | None
    trainable_token_indices: list[TokenId] | dict[str, list[TokenId]] | None
    ensure_weight_tying: bool | None


def read_adapter_config(path: Path) -> AdapterConfig:
    """Reads adapter_config.json.

    Raises:
      MetadataError: not JSON, or settings have other types; all of them are named.
    """
    return read_json(path, AdapterConfig)
