"""The command line of a campaign: runs the cases that its ledger lacks, and prints its summary."""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from scripts.campaign.isolation import FORK, CaseRunner, Limits, run_isolated
from scripts.campaign.ledger import Case, Ledger, Verdict, summary

ROOT = Path(__file__).resolve().parent.parent.parent
SOUND = "sound"  # the folder of undamaged files
SHARED_MEMORY, ROOM = Path("/dev/shm"), 4 << 30


class Kind(Protocol):
    """A kind of case."""

    @property
    def shared(self) -> str | None:
        """Name of sound files that several kinds share; None for files that no other kind has."""
        ...

    def write_sound(self, folder: Path) -> None:
        """Writes the files that all cases of this kind start from, into a new folder."""
        ...

    def start(self, sound: Path, scratch: Path) -> CaseRunner:
        """Returns the function that runs a case; called in the process that runs cases.

        Args:
          scratch: an empty folder for that process.
        """
        ...


class Campaign(NamedTuple):
    """A campaign.

    Fields:
      name: names its files and its command.
      kinds: kinds of cases.
      limits: limits of a case.
      prepare: called with the campaign's folder in each process that runs cases.
    """

    name: str
    kinds: Mapping[str, Kind]
    limits: Limits
    prepare: Callable[[Path], None] = lambda output: None


def run_campaign(campaign: Campaign, argv: Sequence[str], description: str | None) -> int:
    """Runs the command of a campaign; returns its exit status, which is 1 if a case has failed."""
    args = _parser(campaign, description).parse_args(argv)
    ledger = Ledger(args.output / f"{campaign.name}.jsonl")
    if args.case is not None:
        print(_show(campaign, Case(args.kinds[0], args.seed, args.case), args.output))
        return 0
    if not args.summary:
        cases = ledger.failures() if args.failures else ledger.open_cases(args.kinds, args.seed, args.cases)
        _run([case for case in cases if case.kind in args.kinds], campaign, ledger, args.output, args.hours)
    entries = [entry for case, entry in ledger.entries.items() if case.kind in args.kinds]
    print(summary(campaign.name, entries))
    return int(any(case.kind in args.kinds for case in ledger.failures()))


def _parser(campaign: Campaign, description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m scripts.campaign.{campaign.name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the ledger and of the sound files")
    parser.add_argument("--cases", type=int, default=100, help="cases per kind in all; judged ones are not repeated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=list(campaign.kinds), default=list(campaign.kinds))
    parser.add_argument("--hours", type=float, default=2.0, help="stop after this time; started again, it continues")
    parser.add_argument("--failures", action="store_true", help="run the failed cases again, such as after a mend")
    parser.add_argument("--case", type=int, help="run one case of the first of --kinds and print its verdict")
    parser.add_argument("--summary", action="store_true", help="run nothing; print the totals")
    return parser


def _run(cases: Sequence[Case], campaign: Campaign, ledger: Ledger, output: Path, hours: float) -> None:
    version, deadline = commit(), time.monotonic() + 3600 * hours
    for name in dict.fromkeys(case.kind for case in cases):
        kind, own = campaign.kinds[name], [case for case in cases if case.kind == name]
        sound = sound_files(name, kind, output)
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=scratch_folder()) as scratch:
            start = functools.partial(_start, campaign, kind, sound, Path(scratch), output)
            for case, verdict in run_isolated(own, start, campaign.limits):
                ledger.record(case, verdict, version)
                if time.monotonic() > deadline:
                    return


def scratch_folder() -> Path | None:
    """Returns a folder in memory, where files are written at once; None where it is absent or small."""
    roomy = SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > ROOM
    return SHARED_MEMORY if roomy else None


def _start(campaign: Campaign, kind: Kind, sound: Path, scratch: Path, output: Path) -> CaseRunner:
    shutil.rmtree(scratch, ignore_errors=True)  # files of the process that ran the cases before
    scratch.mkdir(exist_ok=True)
    campaign.prepare(output)
    return kind.start(sound, scratch)


def sound_files(name: str, kind: Kind, output: Path) -> Path:
    """Returns the folder of a kind's sound files; a separate process writes them, since it may start a jax backend."""
    folder = (output / SOUND / (kind.shared or name)).absolute()
    if not folder.exists():
        part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
        part.mkdir(parents=True)
        _in_a_process(lambda: kind.write_sound(part))
        part.rename(folder)
    return folder


def _in_a_process(function: Callable[[], None]) -> None:
    process = FORK.Process(target=function)
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"sound files cannot be written (exit status {process.exitcode}, see above)")


def _show(campaign: Campaign, case: Case, output: Path) -> str:
    """Runs one case in this process, for a debugger; its damaged files stay in the folder that is printed."""
    kind = campaign.kinds[case.kind]
    sound, scratch = sound_files(case.kind, kind, output), Path(tempfile.mkdtemp(prefix=f"{case.kind}-"))
    try:
        verdict = _start(campaign, kind, sound, scratch, output)(case)
    except Exception:
        verdict = Verdict("traceback", traceback.format_exc())
    return f"{case}\nfiles: {scratch}\n{verdict.outcome}: {verdict.detail}"


def commit() -> str:
    """Returns the commit that runs, marked if files differ from it."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def main_of(campaign: Callable[[], Campaign], description: str | None) -> None:
    """Runs the campaign with the arguments of the process."""
    sys.exit(run_campaign(campaign(), sys.argv[1:], description))
