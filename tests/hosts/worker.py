"""One process of a run of several, for tests/hosts/processes.py: joins, takes steps, and comes to some end."""

import contextlib
import json
import os
import pickle
import signal
import sys
import time
import unittest.mock
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import qlora_jax.train
from qlora_jax.config import run_main
from qlora_jax.config.command_line import SIGNALLED, report_error
from qlora_jax.hosts.group import AgreedMinimum
from qlora_jax.hosts.join import joined
from qlora_jax.hosts.launchers import PORT_VARIABLE, Place, find_place, sees_first
from qlora_jax.hosts.watchdog import StopSignal, Watchdog
from qlora_jax.io.hf import reader as hf_reader
from qlora_jax.io.loading.loader import load_model
from qlora_jax.io.open_model import open_model
from qlora_jax.models.config import WeightFormat
from qlora_jax.models.families import model_config
from qlora_jax.sharding import make_mesh
from qlora_jax.training import loop
from tests.hosts.processes import ACTS_AT, STEPS


def act(action: str) -> None:
    """Ends, stops or stalls this process."""
    print(f"acts at {time.time()}", flush=True)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    if action == "fail":
        raise OSError("disk of this machine alone: no space left")
    if action == "stall":
        time.sleep(1e6)


def train(watchdog: Watchdog, options: dict[str, Any]) -> int:
    """Takes steps, whose only product is the stop signal; returns the signal that stopped the processes, or 0."""
    asked: list[int] = []
    mesh = jax.make_mesh((2, len(jax.devices()) // 2), ("data", "fsdp"))
    stop, least = StopSignal(lambda: asked[0] if asked else 0, mesh), AgreedMinimum(mesh, 2)
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    watchdog.group.barrier("compiled")
    with watchdog.limited(options.get("stuck_after", 60)):
        for step in range(STEPS):
            _act_before(options, step)
            watchdog.passes(f"step {step}")
            if number := stop():
                print(f"stopped before step {step}")
                return number
    agreed = least(watchdog.group.process + 7, -watchdog.group.process)
    print(f"trained on {len(jax.devices())} devices, {len(jax.local_devices())} here, agreed on {agreed}")
    return 0


def run(folder: Path, options: dict[str, Any]) -> None:
    """Runs one process, with its output in files of the folder."""
    for descriptor, kind in ((1, "out"), (2, "err")):
        file = os.open(folder / f"{kind}.{options['process']}", os.O_WRONLY | os.O_CREAT, 0o644)
        os.dup2(file, descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
    jax.config.update("jax_num_cpu_devices", options.get("devices", 2))
    work = train_command if "command" in options else load if "model" in options else join_and_train
    run_main(lambda _: work(options), [])


def train_command(options: dict[str, Any]) -> None:
    """Runs the command `train`, without the user's cache of compiled programs; acts before one of its steps."""
    step = unittest.mock.Mock(wraps=loop.train_step)
    step.side_effect = lambda *args: _act_before(options, step.call_count) or unittest.mock.DEFAULT
    with unittest.mock.patch("qlora_jax.runtime.start"), unittest.mock.patch.object(loop, "train_step", step):
        qlora_jax.train.main([*options["command"], *by_hand(options)])


def _act_before(options: dict[str, Any], step: int) -> None:
    if step == ACTS_AT and options["process"] == options.get("actor"):
        act(options["action"])


def by_hand(options: dict[str, Any]) -> list[str]:
    """Returns the settings of a process that is started without a launcher; none for a single one."""
    place = {"coordinator": f"127.0.0.1:{options['port']}", "processes": options["processes"]}
    place |= {"process": options["process"], "heartbeat": 5}
    return (
        [] if options["processes"] == 1 else [word for name in place for word in (f"--hosts.{name}", str(place[name]))]
    )


def join(options: dict[str, Any]) -> contextlib.AbstractContextManager[Watchdog]:
    """Joins the other processes, by the variables of a launcher or by hand."""
    process = options["process"]
    own = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "OMPI_COMM_WORLD_RANK"), str(process))
    os.environ |= options.get("variables", {}) | own | {PORT_VARIABLE: str(options["port"])}
    by_hand = f"127.0.0.1:{options['port']}", options.get("expected", options["processes"]), process
    place = find_place("auto", None, None, None) if "variables" in options else Place(*by_hand)
    limits = {"heartbeat": options.get("heartbeat", 5), "join_seconds": options.get("join_seconds", 60)}
    return joined(place, run=Path(options["folder"]), devices=None, report=report_error, **limits)


def load(options: dict[str, Any]) -> None:
    """Loads this process's part of a model on 2 x 4 devices; prints the bytes of the files read, and the fingerprint.

    The parts go to a file `parts.PROCESS` next to the output: (name of the array, place in it, part).
    """
    source = open_model(options["model"])
    with join(options), unittest.mock.patch.object(hf_reader, "map_bytes", wraps=hf_reader.map_bytes) as mapped:
        mesh = make_mesh(2, 4, jax.devices())
        loaded = load_model(source, model_config(source.config), WeightFormat(dtype="float32"), mesh=mesh)
        leaves = jax.tree_util.tree_leaves_with_path(nnx.state(loaded.model))
        parts = [
            (jax.tree_util.keystr(path), shard.index, np.asarray(shard.data))
            for path, leaf in leaves
            for shard in leaf.addressable_shards
        ]
        (Path(options["folder"]).parent / f"parts.{options['process']}").write_bytes(pickle.dumps(parts))
        read = {call.args[1:]: call.args[2] for call in mapped.call_args_list}  # each range once
        print(json.dumps({"read": sum(read.values()), "fingerprint": loaded.fingerprint}))


def join_and_train(options: dict[str, Any]) -> None:
    """Joins the other processes, agrees with them, trains, and leaves."""
    process = options["process"]
    time.sleep(options.get("late", {}).get(str(process), 0))
    with join(options) as watchdog:
        folder = Path(options["folder"]) / options.get("folders", {}).get(str(process), "")
        folder.mkdir(exist_ok=True, parents=True)
        values = {
            "optim.learning_rate": 2e-4,
            "output has a file of process 0": sees_first(watchdog.group, folder, 0.5),
        }
        values |= options.get("values", {}).get(str(process), {})
        watchdog.group.agree("settings", values, "Start all processes with the same command")
        signalled = train(watchdog, options)
    if signalled:
        sys.exit(SIGNALLED + signalled)
