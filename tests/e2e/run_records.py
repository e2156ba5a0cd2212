"""The records of a run without what differs between equal runs."""

from pathlib import Path

from qlora_jax.training.metrics.metrics_file import Record, read_metrics

# Times, the memory of the process, where optimizer state was, and the number of devices.
MAY_DIFFER = {
    *("seconds", "data_seconds", "tokens_per_second", "tokens_per_second_per_device"),
    *("rollout_seconds", "reward_seconds"),
    *("host_bytes", "resident_bytes", "paged_in_bytes", "paged_out_bytes", "devices"),
}


def comparable_records(path: Path) -> list[Record]:
    """Returns the records of a metrics file without times, memory and places of optimizer state."""
    return [{key: value for key, value in record.items() if key not in MAY_DIFFER} for record in read_metrics(path)]
