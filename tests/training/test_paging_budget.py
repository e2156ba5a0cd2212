"""Room for pages: the memory that the compiled program and the device leave."""

from types import SimpleNamespace

import jax
import pytest

from qlora_jax.optim.page_pool import Memory
from qlora_jax.training.compiled_programs import CompiledGradients
from qlora_jax.training.optimizer_state import KIB, Room, agreed_budget, measured_budget
from tests.optim.memory_pressure import SimulatedMemory

MIB = 2**20
SHAPE = (1, 1, 64)


class Analysed(CompiledGradients):
    """Gradients whose program needs: arguments 300, output 50, of which 10 are arguments, scratch by length."""

    def __init__(self):
        pass

    @property
    def parts(self):
        return None, {}, jax.ShapeDtypeStruct((300 * MIB,), "uint8")

    def compiled(self, shape):
        numbers = dict(argument_size_in_bytes=300, output_size_in_bytes=50, alias_size_in_bytes=10)
        numbers |= dict(temp_size_in_bytes=2 * shape[-1])
        analysis = SimpleNamespace(**{name: size * MIB for name, size in numbers.items()})
        return SimpleNamespace(memory_analysis=lambda: analysis)


def device(total: int, others: int) -> SimulatedMemory:
    return SimulatedMemory(jax.devices()[0], "pinned_host", total_bytes=total * MIB, others=[others * MIB])


@pytest.mark.parametrize(
    ("others", "length", "room"),
    [
        (300, 64, (970 - 300 - 40 - 128, 970 - 300 - 40)),  # 3% of 1000 MiB are kept
        (0, 64, (970 - 300 - 40 - 128, 970 - 300 - 40)),  # the program knows of more than the device: of itself
        (500, 64, (970 - 500 - 40 - 128, 970 - 500 - 40)),  # the device knows of more
        (300, 400, (0, 970 - 300 - 40)),  # a batch that leaves nothing
    ],
)
def test_room_is_what_the_program_and_others_leave(others, length, room):
    budget, words = measured_budget(Analysed(), device(1000, others))
    assert budget((1, 1, length), 0) == Room(*(mib * MIB for mib in room))
    assert "room for, of 1,000.00 MiB" in words


@pytest.mark.parametrize(("others", "held"), [(0, 300), (500, 500)])
def test_an_evaluation_has_no_gradients(others, held):
    budget, _ = measured_budget(Analysed(), device(1000, others))
    assert budget(150 * MIB, 0) == Room((970 - held - 150) * MIB, (970 - held) * MIB)
    assert budget(900 * MIB, 0).gradients == 0


def test_pages_on_the_device_are_not_counted_against_pages():
    memory = device(1000, 500)
    memory.ledger.device_bytes = 200 * MIB
    budget, _ = measured_budget(Analysed(), memory)
    assert budget(SHAPE, 200 * MIB) == measured_budget(Analysed(), device(1000, 500))[0](SHAPE, 0)


def test_a_device_that_tells_nothing_has_the_memory_of_the_machine():
    budget, words = measured_budget(Analysed(), Memory.of(jax.devices()[0]))
    assert "because this backend reports no limit" in words
    assert budget(SHAPE, 0).gradients > 100 * MIB


def test_processes_agree_on_the_least_room_in_whole_kib():
    budget = agreed_budget(lambda work, resident: Room(5 * KIB + 1, 7 * KIB), lambda a, b: (min(a, 6), min(b, 4)))
    assert budget(SHAPE, 0) == Room(5 * KIB, 4 * KIB)
