"""The declarations of methods give the tables that the settings were checked by before there were declarations."""

import dataclasses
import re
from pathlib import Path

import pytest

from qlora_jax.config import LoraArgs
from qlora_jax.config.methods import CONDITIONAL, METHODS, methods_with, uses

LOW_RANK, BOTTLENECKS = ("lora", "lora_fa", "dora"), ("houlsby", "pfeiffer")
USED_BY = {
    "init": ("lora", "dora"),
    "layers_to_transform": ("lora", "lora_fa"),
    "target_parameters": ("lora",),
    "share_experts": ("lora",),
    "rank": (*LOW_RANK, "vera", *BOTTLENECKS),
    "alpha": LOW_RANK,
    "dropout": (*LOW_RANK, "vera"),
    "rank_pattern": LOW_RANK,
    "alpha_pattern": LOW_RANK,
    "use_rslora": LOW_RANK,
    "dtype": (*LOW_RANK, "oft", *BOTTLENECKS, "full"),
    "feedforward_modules": ("ia3",),
    "oft_block_size": ("oft",),
    "oft_blocks": ("oft",),
    "block_share": ("oft",),
    "use_cayley_neumann": ("oft",),
    "num_cayley_neumann_terms": ("oft",),
    "projection_prng_key": ("vera",),
    "d_initial": ("vera",),
    "bottleneck_activation": BOTTLENECKS,
    "target_modules": (*LOW_RANK, "ia3", "oft", "vera", "ln_tuning", "bitfit"),
    "modules_to_save": (*LOW_RANK, "ia3", "oft", "vera", "ln_tuning", "bitfit", *BOTTLENECKS),
    "start": (*LOW_RANK, "ia3", "oft", "vera", "ln_tuning"),
    "merge_into": (*LOW_RANK, "ia3", "oft", "vera"),
    "merge_types": (*LOW_RANK, "ia3", "oft", "vera"),
    "merge_from": (*LOW_RANK, "ia3", "oft", "vera"),
}
BUILT_IN = (*LOW_RANK, "ia3", "oft", "vera", "ln_tuning", "bitfit", *BOTTLENECKS, "full")


def test_methods_read_the_settings_that_they_read_before():
    assert METHODS.names() == BUILT_IN and tuple(USED_BY) == CONDITIONAL
    assert {name: tuple(m for m in BUILT_IN if uses(m, name)) for name in CONDITIONAL} == USED_BY
    assert all(uses(method, "svd_niter") for method in BUILT_IN)


def test_conditional_settings_exist():
    names = {field.name for field in dataclasses.fields(LoraArgs)}
    assert {*CONDITIONAL} <= names
    assert all(declared.uses <= {*CONDITIONAL} for _, declared in METHODS.items())


def test_properties_select_the_methods_that_they_selected_before():
    assert methods_with("fast_leaves") == ("lora", "dora")
    assert methods_with("some_layers") == ("lora", "lora_fa")
    assert [m for m in BUILT_IN if not METHODS[m].of_linears] == ["ln_tuning", "bitfit"]
    assert [m for m in BUILT_IN if not METHODS[m].on_mesh] == ["full"]
    refused = {name: tuple(declared.refused_exports) for name, declared in METHODS.items() if declared.refused_exports}
    adapters, every = ("peft", "gguf-lora"), ("peft", "gguf-lora", "hf", "gguf")
    assert refused == {"bitfit": adapters, **dict.fromkeys(BOTTLENECKS, every), "full": adapters}


def test_the_order_of_settings_stays_because_records_of_tournaments_are_keyed_by_it():
    assert repr(LoraArgs()) == (
        "LoraArgs(method='lora', init='default', svd_niter=0, loftq_iterations=1, rank=16, alpha=32.0, dropout=0.0, "
        "target_modules='auto', target_parameters=[], share_experts=False, layers_to_transform=None, "
        "feedforward_modules=None, bottleneck_activation='gelu', oft_block_size=32, oft_blocks=0, block_share=False, "
        "use_cayley_neumann=True, num_cayley_neumann_terms=5, projection_prng_key=0, d_initial=0.1, rank_pattern={}, "
        "alpha_pattern={}, use_rslora=False, modules_to_save=[], start=None, dtype='float32')"
    )


@pytest.mark.parametrize("name", ["oft", "vera", "dora"])
def test_few_files_name_a_method(name: str):
    """Its own, its declaration, and for DoRA those of the PEFT form that it shares; other trainers' names aside."""
    root = Path(__file__).parent.parent.parent
    files = [file for folder in ("qlora_jax", "pallas_kernels") for file in sorted((root / folder).rglob("*.py"))]
    word = re.compile(rf"\b{name}\b|\b{name}_|_{name}\b", re.IGNORECASE)
    naming = [file.name for file in files if word.search(file.read_text(encoding="utf-8"))]
    assert len([each for each in naming if each != "other_trainers.py"]) <= 4, naming
