"""Damages every kind of file that comes from outside, and reads it: one clear error, or a result.

    python -m scripts.campaign.fuzz --cases 10000 --seed 0 --output DIR [--kinds gguf rows ...]

A case fails if it ends in a traceback, in a message that names neither file nor key, in more than 5 s of processor time
or 1 GiB of memory, or, where files hold digests, in another result without an error.
"""

from pathlib import Path

import jax

from scripts.campaign.command import Campaign, main_of
from scripts.campaign.isolation import Limits

LIMITS = Limits(cpu_seconds=5.0, wall_seconds=60.0, memory=1 << 30, cases=1000)


def share_programs(output: Path) -> None:
    """Lets the processes of a campaign compile a program once."""
    jax.config.update("jax_compilation_cache_dir", str(output.absolute() / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def campaign() -> Campaign:
    """Returns the campaign."""
    from scripts.campaign.data_files import DATA_KINDS
    from scripts.campaign.mixture_files import MIXTURE_KINDS
    from scripts.campaign.model_files import MODEL_KINDS
    from scripts.campaign.run_files import RUN_KINDS
    from scripts.campaign.study_files import STUDY_KINDS

    return Campaign(
        "fuzz", {**MODEL_KINDS, **MIXTURE_KINDS, **DATA_KINDS, **RUN_KINDS, **STUDY_KINDS}, LIMITS, share_programs
    )


if __name__ == "__main__":
    main_of(campaign, __doc__)
