"""The meshes that settings allow, and the errors for those that a run cannot use."""

import dataclasses

import pytest

from qlora_jax.config import Config, ConfigError, DataArgs, LoraArgs, MeshArgs, ModelArgs, TrainArgs, read_arguments
from qlora_jax.config.schema import mesh_sizes
from qlora_jax.config.validate import mesh_choices

NEEDED = ["--model", "m", "--data.train", "t", "--output", "o"]


def config(mesh: MeshArgs, **changes) -> Config:
    base = Config(model=ModelArgs(path="m"), data=DataArgs(train="t"), output="o", mesh=mesh)
    return dataclasses.replace(base, **changes)


def rows(micro_batch_size: int, accumulation: int = 1, **changes) -> TrainArgs:
    return TrainArgs(micro_batch_size=micro_batch_size, accumulation=accumulation, **changes)


@pytest.mark.parametrize(
    ("mesh", "devices", "sizes"),
    [
        (MeshArgs(), 1, [(1, 1)]),
        (MeshArgs(), 6, [(1, 1), (1, 2), (1, 3), (1, 6)]),
        (MeshArgs(data=2), 8, [(2, 1), (2, 2), (2, 4)]),
        (MeshArgs(data=16), 8, [(16, 1)]),
        (MeshArgs(fsdp=4), 8, [(1, 4)]),
        (MeshArgs(data="auto", fsdp=2), 8, [(4, 2)]),
        (MeshArgs(data="auto", fsdp=16), 8, [(1, 16)]),
        (MeshArgs(data="auto"), 4, [(4, 1), (2, 2), (1, 4)]),
    ],
)
def test_sizes_of_a_mesh_in_the_order_in_which_they_are_tried(mesh, devices, sizes):
    assert mesh_sizes(mesh, devices) == sizes


def test_auto_leaves_out_sizes_that_do_not_divide_the_micro_batch():
    usable, refused = mesh_choices(config(MeshArgs(), train=rows(4)), 6)
    assert usable == [(1, 1), (1, 2)] and [*refused] == [(1, 3), (1, 6)]
    assert mesh_choices(config(MeshArgs(), train=rows(4, remat="none")), 4).usable == [(1, 1)]


@pytest.mark.parametrize(
    ("mesh", "changes", "found"),
    [
        (
            MeshArgs(fsdp=2),
            dict(train=rows(1, 16)),
            "train.micro_batch_size: found 1, expected a multiple of 2 (mesh.data 1 x mesh.fsdp 2). Set "
            "train.micro_batch_size=2 and train.accumulation=8, which train on the same 16 rows per step",
        ),
        (
            MeshArgs(data=2, fsdp=2),
            dict(train=rows(6, 3)),
            "expected a multiple of 4 (mesh.data 2 x mesh.fsdp 2). Set train.micro_batch_size=8, or a smaller mesh",
        ),
        (MeshArgs(data=2, fsdp=2), dict(train=rows(6, 6)), "Set train.micro_batch_size=4 and train.accumulation=9"),
        (MeshArgs(data=4, fsdp=4), dict(train=rows(16)), "found 4 x 4 = 16 devices, but there are 8 devices. Set"),
        (MeshArgs(fsdp=2), dict(train=rows(2, remat="none")), "train.remat: found 'none' with mesh.fsdp=2, expected"),
        (MeshArgs(fsdp=2), dict(train=rows(2), lora=LoraArgs(method="full")), "lora.method: found 'full' on a mesh of"),
        (MeshArgs(data=2, fsdp=1), dict(train=rows(2), lora=LoraArgs(init="pissa")), "or lora.init=default"),
        (
            MeshArgs(data=2, fsdp=1),
            dict(train=rows(2), model=ModelArgs(path="m", experts="offload")),
            "model.experts: found 'offload' on a mesh of 2 devices",
        ),
        (MeshArgs(data="auto"), dict(train=rows(6)), "found 6, expected a multiple of 8 (mesh.data 8 x mesh.fsdp 1)"),
    ],
)
def test_one_problem(mesh, changes, found):
    with pytest.raises(ConfigError) as error:
        mesh_choices(config(mesh, **changes), 8)
    assert len(error.value.problems) == 1 and found in error.value.problems[0]


def test_all_problems_at_once():
    train, lora = rows(3, 2, remat="none"), LoraArgs(method="full", init="loftq")
    with pytest.raises(ConfigError) as error:
        mesh_choices(config(MeshArgs(data=2, fsdp=2), train=train, lora=lora), 2)
    keys = ["mesh.data, mesh.fsdp", "train.micro_batch_size", "train.remat", "lora.method", "lora.init"]
    assert [problem.partition(":")[0] for problem in error.value.problems] == keys
    # Rows over devices that hold the whole model need no rematerialization.
    assert mesh_choices(config(MeshArgs(data=2, fsdp=1), train=rows(2, remat="none")), 2).usable == [(2, 1)]


def test_other_problems_do_not_hide_those_of_a_given_mesh():
    words = ["--lora.method", "full", "--lora.init", "pissa", "--train.micro_batch_size", "3", "--train.remat", "none"]
    for mesh, more in (("2", ["train.micro_batch_size", "train.remat", "lora.method", "lora.init"]), ("auto", [])):
        with pytest.raises(ConfigError) as error:
            read_arguments([*NEEDED, *words, "--mesh.fsdp", mesh])
        keys = [problem.partition(":")[0] for problem in error.value.problems]
        assert keys == ["lora.init", "model.quant_type", *more]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh.fsdp", "0"], "mesh.fsdp: found 0, expected 1 or more, or auto"),
        (["--mesh.data", "many"], "mesh.data: found 'many', expected a whole number or auto"),
        (["--fsdp", "full_shard"], "fsdp: unknown setting; did you mean mesh.fsdp (a number of devices"),
        (["--hosts.devices", "0"], "hosts.devices: found 0, expected a list of a whole number or auto"),
    ],
)
def test_values_of_the_sections(words, message):
    assert read_arguments([*NEEDED, "--mesh.fsdp", "auto", "--mesh.data", "2"]).mesh == MeshArgs(data=2)
    assert read_arguments([*NEEDED, "--hosts.devices", "[0, 1]"]).hosts.devices == [0, 1]
    with pytest.raises(ConfigError) as error:
        read_arguments([*NEEDED, *words])
    assert message in str(error.value)
