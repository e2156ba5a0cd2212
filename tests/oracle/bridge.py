"""Reads the inputs of a script in this folder and returns its arrays: `python script.py in.npz out.npz`."""

import json
import sys

import numpy as np


def inputs() -> dict:
    """Reads the test's inputs: arrays by name, and everything else from JSON."""
    with np.load(sys.argv[1]) as file:
        arrays = {name: file[name] for name in file.files if name != "json"}
        return arrays | json.loads(str(file["json"]))


def save(**arrays: np.ndarray) -> None:
    """Hands arrays back to the test."""
    np.savez(sys.argv[2], **arrays)
