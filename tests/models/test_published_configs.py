"""Configs as published on the Hugging Face Hub are read, and the catalog has their features.

`published_configs/` has one file per repository, as public repositories quote it, with the number of parameters where a
public source gives it. `source` says what else is known about a quotation, and which files are not quotations.
Attributes that do not describe the computation (torch_dtype and the like) are kept as well: they must not be refused.
"""

import json
from pathlib import Path
from typing import TypedDict

import pytest

from qlora_jax.io.open_model import open_model
from qlora_jax.models import catalog
from qlora_jax.models.families import model_config
from qlora_jax.models.families.multimodal import text_config, text_only


class Published(TypedDict):
    repository: str
    catalog_name: str | None
    parameters: int | None
    config: dict[str, object]


FILES = sorted((Path(__file__).parent / "published_configs").glob("*.json"))
PUBLISHED: dict[str, Published] = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in FILES}
IN_CATALOG = {name: one["catalog_name"] for name, one in PUBLISHED.items() if one["catalog_name"] is not None}


@pytest.mark.parametrize("name", IN_CATALOG)
def test_the_catalog_has_the_published_features(name: str) -> None:
    assert text_only(model_config(catalog.PUBLISHED[IN_CATALOG[name]])) == text_only(
        model_config(PUBLISHED[name]["config"])
    )


def test_the_catalog_has_the_features_of_a_published_file(gemma3_gguf: Path) -> None:
    assert model_config(catalog.PUBLISHED["gemma-3-270m"]) == model_config(open_model(gemma3_gguf).config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str) -> None:
    config, parameters = PUBLISHED[name]["config"], PUBLISHED[name]["parameters"]
    model = model_config(config)
    assert model.num_layers == text_config(config)["num_hidden_layers"]
    assert parameters is None or model.parameters() == parameters
