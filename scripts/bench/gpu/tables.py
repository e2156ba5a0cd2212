"""Prints the records of run.py: one line per product, the M from which on fused loses, and the fastest tiles.

A record is one shape at one M; by direction it has the seconds of each implementation (matmuls.measure).
"""

from collections.abc import Iterator, Sequence

from pallas_kernels.nf4_matmul.mosaic.capabilities import MOST_ROWS
from scripts.bench.gpu.matmuls import Record, gigabytes_per_second, tflops

IMPLEMENTATIONS = ("hopper", "ampere", "skinny", "reference", "bf16")


def product_line(record: Record) -> Iterator[str]:
    """Yields one line per direction: TFLOP/s of each implementation, or GB/s for a single row."""
    for way in ("forward", "backward"):
        cells = [f"{name} {_rate(record, record[way][name])}" for name in IMPLEMENTATIONS if name in record[way]]
        yield f"{record['shape']:<22}M={record['m']:<6}{way:<9} " + "  ".join(cells)
        yield from (f"  FAILED {name}: {why}" for name, why in record[way]["failures"].items())


def _rate(record: Record, seconds: float | None) -> str:
    if seconds is None:
        return "FAILED"
    if record["m"] == 1:
        return f"{gigabytes_per_second(record, seconds):.0f} GB/s"
    return f"{tflops(record, seconds):.1f}"


def loses_from(times: dict[int, tuple[float, float]]) -> int | None:
    """Returns the smallest M from which on fused is slower at every measured M; None if it never is.

    Args:
      times: by M, seconds of the fused product and of the reference.
    """
    lost: int | None = None
    for rows in sorted(times, reverse=True):
        fused, reference = times[rows]
        if fused <= reference:
            break
        lost = rows
    return lost


def crossover_rows(records: Sequence[Record]) -> Iterator[str]:
    """Yields where each kernel, direction and shape loses to dequantize + cuBLAS, and a suggestion for MOST_ROWS."""
    for kernel in ("hopper", "ampere"):
        never_lost: list[bool] = []
        wins: list[int] = []
        for (shape, way), times in _times(records, kernel).items():
            lost = loses_from(times)
            below = [rows for rows in times if lost is None or rows < lost]
            wins.append(max(below, default=0))
            never_lost.append(lost is None)
            ratios = ", ".join(
                f"{rows}: {reference / fused:.2f}x" for rows, (fused, reference) in sorted(times.items())
            )
            verdict = f"loses from M = {lost}" if lost else f"never loses up to M = {max(times)}"
            yield f"crossover {kernel} {way} {shape}: {verdict} (reference / fused: {ratios})"
        if wins:
            most = MOST_ROWS[kernel]
            yield (
                f'MOST_ROWS["{kernel}"] = {most.rows} by {most.by}; here every shape wins up to M = '
                f"{min(wins)}, the last to lose up to {max(wins)}{' and beyond' if any(never_lost) else ''}"
            )


def _times(records: Sequence[Record], kernel: str) -> dict[tuple[str, str], dict[int, tuple[float, float]]]:
    found: dict[tuple[str, str], dict[int, tuple[float, float]]] = {}
    for record in records:
        for way in ("forward", "backward"):
            fused, reference = record[way].get(kernel), record[way]["reference"]
            if fused is not None and reference is not None:
                found.setdefault((record["shape"], way), {})[record["m"]] = fused, reference
    return found


def tile_rows(records: Sequence[Record]) -> Iterator[str]:
    """Yields the TFLOP/s of every tile of kernels with several, the fastest tile, and the cost of the chosen one."""
    for record in records:
        for way in ("forward", "backward"):
            for kernel, tiles in record[way]["tiles"].items():
                timed = {name: seconds for name, seconds in tiles.items() if seconds is not None}
                if len(tiles) > 1 and timed:
                    yield _tile_row(record, way, kernel, timed)


def _tile_row(record: Record, way: str, kernel: str, timed: dict[str, float]) -> str:
    chosen, best = record[way]["chosen"][kernel], min(timed, key=lambda name: timed[name])
    rates = "; ".join(f"{name}: {tflops(record, seconds):.1f}" for name, seconds in timed.items())
    cost = f"{timed[chosen] / timed[best]:.2f}x the fastest's time" if chosen in timed else "which failed"
    return (
        f"tile {kernel} {way} {record['shape']} M={record['m']}: {rates} TFLOP/s; best {best}; taken {chosen}, {cost}"
    )


def step_lines(step: Record, peak: float) -> Iterator[str]:
    """Yields tokens/s, shares of the card's peak, and memory; then the parts of a traced step."""
    yield step_line(step, peak)
    for part in step.get("parts", ()):
        share = f", {part['flop'] / part['ms'] * 1e3 / peak:.1%} of the peak" if part["flop"] and part["ms"] else ""
        yield f"  {part['part']}: {part['ms']:,.1f} ms{share}"


def step_line(step: Record, peak: float) -> str:
    """Returns tokens/s, shares of the card's peak, and memory as measured and as compiled, in MiB."""
    if "failure" in step:
        return f"step of {step['length']} tokens, remat {step['remat']}: FAILED: {step['failure']}"
    seconds, flops = step["step_s"], step["flops"]
    mfu, with_again = flops["model"] / seconds / peak, sum(flops.values()) / seconds / peak
    return (
        f"step of {step['length']} tokens, remat {step['remat']}: {step['tokens'] / seconds:.0f} tokens/s, MFU "
        f"{mfu:.1%} ({with_again:.1%} with recomputation), loss {step['loss']:.3f}; peak {_mib(step['peak_bytes'])} "
        f"MiB on the card ({_mib(step['filled_bytes'])} before the first step), {_mib(step['planned_bytes'])} planned "
        "by the compiler"
    )


def _mib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:,.0f}"


def goals(records: Sequence[Record], steps: Sequence[Record], peak: float, bandwidth: float) -> Iterator[str]:
    """Yields the goals for an H100 with the worst measured value of each."""
    forward = [(record, record["forward"]) for record in records]
    every = [(r, r[way]) for r in records for way in ("forward", "backward")]
    yield _worst(
        "fused >= 1.00x of dequantize + cuBLAS up to M = 4096",
        [(r, way["reference"] / way[k]) for r, way in every if 16 < r["m"] <= 4096 for k in _fused(way, "reference")],
    )
    yield _worst(
        "fused >= 0.90x of bf16 cuBLAS at M = 2048",
        [(r, way["bf16"] / way[k]) for r, way in every if r["m"] == 2048 for k in _fused(way, "bf16")],
    )
    yield _worst(
        "M = 1 at >= 0.70 of the peak bandwidth",
        [
            (r, gigabytes_per_second(r, way["skinny"]) * 1e9 / bandwidth)
            for r, way in forward
            if r["m"] == 1 and way.get("skinny")
        ],
    )
    timed = [step for step in steps if "failure" not in step and step["length"] == 2048]
    shares = [step["flops"]["model"] / step["step_s"] / peak for step in timed]
    yield "goal 8B at 2048 tokens >= 0.50 of peak: " + (f"best {max(shares):.2f}" if shares else "not measured")


def _fused(way: Record, against: str) -> list[str]:
    return [name for name in ("hopper", "ampere") if way.get(name) and way[against]]


def _worst(goal: str, found: Sequence[tuple[Record, float]]) -> str:
    if not found:
        return f"goal {goal}: not measured"
    record, value = min(found, key=lambda one: one[1])
    return f"goal {goal}: worst {value:.2f} ({record['shape']}, M = {record['m']})"
