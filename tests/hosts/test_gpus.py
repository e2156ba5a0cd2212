"""GPUs of a machine, divided among its processes."""

import pytest

from qlora_jax.hosts.gpus import Seen, divide

EIGHT = tuple(f"gpu{index}" for index in range(8))


def seen(*processes: tuple[tuple[str, ...], tuple[int, ...] | None]) -> list[Seen]:
    return [Seen(f"process {index}", gpus, wanted) for index, (gpus, wanted) in enumerate(processes)]


def test_one_process_per_machine_drives_all():
    assert divide(seen((EIGHT, None), (("other0", "other1"), None))) == [tuple(range(8)), (0, 1)]


def test_processes_that_see_the_same_gpus_share_them():
    assert divide(seen((EIGHT, None), (EIGHT, None))) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert divide(seen(*[(EIGHT, None)] * 8)) == [(index,) for index in range(8)]


def test_gpus_that_a_launcher_gave_to_each_are_not_divided_again():
    assert divide(seen((EIGHT[:4], None), (EIGHT[4:], None))) == [(0, 1, 2, 3), (0, 1, 2, 3)]


def test_without_gpus_there_is_nothing_to_divide():
    assert divide(seen(((), None), ((), None))) == [(), ()]


def test_named_gpus_are_driven():
    assert divide(seen((EIGHT, (0, 3)), (EIGHT, (1,)))) == [(0, 3), (1,)]


@pytest.mark.parametrize(
    ("processes", "problem"),
    [
        (
            ((EIGHT, (0, 3)), (EIGHT, (3,))),
            r"claimed by process 0 \(its GPU 3\) and by process 1 \(its GPU 3\)",
        ),
        (((EIGHT[:2], None), (EIGHT[1:3], None)), r"process 0 \(its GPU 1\) and by process 1 \(its GPU 0\)"),
        (((EIGHT[:1], (1,)), (EIGHT[1:2], None)), r"hosts.devices: found \[1\] in process 0, which sees 1 GPUs"),
        ((((), (0,)), ((), None)), r"found \[0\] in process 0, which sees 0 GPUs"),
        (((EIGHT[:3], None), (EIGHT[:3], None)), r"2 processes see the same 3 GPUs, which do not divide"),
        (((EIGHT[:1], None), (EIGHT[:1], None)), r"2 processes see the same 1 GPUs, which do not divide"),
    ],
)
def test_gpus_that_cannot_be_shared(processes: tuple, problem: str):
    with pytest.raises(ValueError, match=problem):
        divide(seen(*processes))


def test_all_problems_are_reported_at_once():
    with pytest.raises(ValueError, match=r"found \[9\] in process 0[\s\S]*claimed by process 0"):
        divide(seen((EIGHT, (0, 9)), (EIGHT, (0,))))
