"""Cases that spin, sleep, allocate or crash get a verdict, and the cases after them run."""

import subprocess
import sys

EXPECTED = """\
sound same
spins hang
sound same
sleeps hang
allocates memory
reserves memory
segfaults crash
exits crash
sound same
"""


def test_each_planted_fault_gets_its_verdict():
    done = subprocess.run([sys.executable, "-m", "tests.scripts.campaign.planted"], capture_output=True, text=True)
    assert done.stdout == EXPECTED, done.stderr
