"""Processes that have not started are named; files of an earlier start do not count."""

import time
from pathlib import Path

from qlora_jax.hosts.join import RollCall


def test_processes_that_count_are_here_and_leave_no_file(tmp_path: Path):
    calls = [RollCall(tmp_path / "run", process, 4) for process in (0, 2)]
    with calls[0].taken(), calls[1].taken():
        (calls[0].folder).mkdir(exist_ok=True)
        (calls[0].folder / "3").write_text("17")  # left by an earlier start
        deadline = time.monotonic() + 60
        while [call.missing() for call in calls] != ["processes 1, 3"] * 2:
            assert time.monotonic() < deadline, [call.missing() for call in calls]
            time.sleep(0.05)
    (calls[0].folder / "3").unlink()
    calls[0].folder.rmdir()  # empty
    assert RollCall(tmp_path / "run", 0, 1).missing() is None


def test_other_files_do_not_hide_a_process(tmp_path: Path):
    call = RollCall(tmp_path / "run", 0, 3)
    call.folder.mkdir()
    (call.folder / ".nfs00000000026a").touch()  # NFS leaves such a name for a removed file that is still open
    (call.folder / "2").mkdir()  # cannot be read
    for count in ("1", "2"):
        (call.folder / "1").write_text(count)
        call._read()
    assert call.missing() == "process 2"
