"""Runs planted cases in isolation and prints the outcomes; a separate process, because it forks."""

import os
import signal
import sys
import time

from scripts.campaign.isolation import CaseRunner, Limits, run_isolated
from scripts.campaign.ledger import Case, Verdict


def start() -> CaseRunner:
    return run


def run(case: Case) -> Verdict:
    match case.kind:
        case "spins":
            while True:
                pass
        case "sleeps":
            time.sleep(60)
        case "allocates":
            block = b"x" * (32 << 20)
            return Verdict("same", f"{len(block)}")
        case "reserves":
            return Verdict("same", f"{len(bytearray(1 << 40))}")
        case "segfaults":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exits":
            os._exit(3)
    return Verdict("same")


if __name__ == "__main__":
    names = ("sound", "spins", "sound", "sleeps", "allocates", "reserves", "segfaults", "exits", "sound")
    cases = [Case(name, 0, number) for number, name in enumerate(names)]
    # The first use of a page may cost a virtual machine tens of microseconds of processor time: few pages, much time.
    limits = Limits(cpu_seconds=1.0, wall_seconds=5.0, memory=16 << 20)
    for case, verdict in run_isolated(cases, start, limits):
        print(case.kind, verdict.outcome)
        print(case.kind, *verdict, file=sys.stderr)
