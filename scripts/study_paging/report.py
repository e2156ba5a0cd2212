"""Draws the plots and prints the tables of the paging study, from its stored numbers."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypedDict

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pallas_kernels.gpu_specs import CARDS
from qlora_jax import runtime
from qlora_jax.optim.page_layout import PAGE_BYTES
from qlora_jax.training.cost import flops
from scripts.study_paging.lengths import BatchLengths, most_rows, moved_pages
from scripts.study_paging.memory import CELLS, LongestRow, Point, StepMemory, longest_rows, setting
from scripts.study_paging.policies import OURS, POLICIES, steady_moves

GIB, GB = 2**30, 1e9
PAGES = 32
LIMITS = {card: float(runtime.USABLE_MEMORY) * CARDS[card].memory_bytes for card in CELLS}
# Bytes/s in each direction of PCI Express x16 by specification, the upper bound of a transfer.
LINKS = {"PCIe 3.0": 15.75e9, "PCIe 4.0": 31.5e9, "PCIe 5.0": 63.0e9}
SHARE_OF_PEAK = 0.5  # assumed share of a card's bf16 rate in a step
NAMES = {"rtx4090": "RTX 4090, 24 GB", "a6000": "RTX A6000, 48 GB", "a100": "A100, 80 GB"}
MEASURED, COMPILED = "measured on 2 cores of a CPU", "computed from compiled programs"
SWEPT = (("llama-7b", 8, "rtx4090"), ("llama-13b", 4, "rtx4090"))  # (model, rows at once, card of the compiled steps)


class CostRow(TypedDict):
    """The measured cost of one budget, or of one page size with all pages resident or away."""

    kind: str
    value: float
    pages: int
    page_bytes: int
    moved_bytes: int
    update_ms: float
    over_step: float


class Costs(TypedDict):
    """The output of costs.py."""

    gradients_ms: float
    plain_ms: float
    rows: list[CostRow]


class Numbers(TypedDict):
    """The numbers of the study, as stored in docs/paged-optimizers.json; points are fields of `Point`."""

    points: list[list]
    costs: Costs
    lengths: list[BatchLengths]


def report(numbers: Numbers, folder: Path) -> None:
    """Writes the plots to `folder`/images and prints the tables."""
    points = [Point(*point) for point in numbers["points"]]
    draw(folder / "images" / "paging_policies.png", [policies])
    draw(
        folder / "images" / "paging_costs.png", [lambda axes: budgets(axes, numbers), lambda axes: sizes(axes, numbers)]
    )
    sweeps = [lambda axes, each=each: spikes(axes, points, numbers["lengths"], *each) for each in SWEPT]
    draw(folder / "images" / "paging_lengths.png", sweeps)
    longest = longest_rows(points, LIMITS)
    draw(
        folder / "images" / "paging_longest.png",
        [lambda axes, card=card: bars(axes, card, longest) for card in CELLS],
    )
    for table in (costs_table(numbers), lengths_table(numbers), spikes_table(points, numbers), longest_table(longest)):
        print("\n".join(table), end="\n\n")
    print("\n".join(links_table(points)))


def draw(path: Path, panels: Sequence[Callable[[Axes], None]]) -> None:
    """Draws panels next to each other."""
    figure = Figure(figsize=(6.2 * len(panels) if len(panels) < 3 else 14, 4.2), dpi=110, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        panel(axes)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


def policies(axes: Axes) -> None:
    """Plots the pages moved each way per step, by room."""
    styles = iter(("-", "--", ":", "-.", "-"))
    for name, policy in POLICIES.items():
        moved = [steady_moves(policy, PAGES, room) for room in range(1, PAGES + 1)]
        wide = 3.5 if name == OURS else 1.8
        axes.plot(range(1, PAGES + 1), moved, next(styles), linewidth=wide, alpha=0.8, label=name)
    axes.set(
        title="Simulated: pages moved per step",
        xlabel=f"room on the device, pages of {PAGES}",
        ylabel="pages in, and as many out, per step",
        ylim=(0, PAGES + 2),
    )
    axes.legend(frameon=False, fontsize=8)


def budgets(axes: Axes, numbers: Numbers) -> None:
    """Plots the overhead by the share of state that may stay on the device."""
    rows = _of_kind(numbers, "budget")
    axes.plot([100 * row["value"] for row in rows], [100 * row["over_step"] for row in rows], "o-", linewidth=2)
    axes.set(
        title=f"Budget ({MEASURED})",
        xlabel="state that may stay on the device, %",
        ylabel="time beyond plain optax, % of a step",
    )
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))


def sizes(axes: Axes, numbers: Numbers) -> None:
    """Plots the overhead by page size."""
    for kind, words in (("away", "all pages away"), ("resident", "all pages resident")):
        rows = _of_kind(numbers, kind)
        places, values = [row["page_bytes"] / 1e6 for row in rows], [100 * row["over_step"] for row in rows]
        axes.plot(places, values, "o-", linewidth=2, label=words)
    axes.set(
        title=f"Page size ({MEASURED})", xlabel="MB of state in a page", ylabel="time beyond plain optax, % of a step"
    )
    axes.set_xscale("log")
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend(frameon=False)


def _of_kind(numbers: Numbers, kind: str) -> list[CostRow]:
    return [row for row in numbers["costs"]["rows"] if row["kind"] == kind]


def spikes(
    axes: Axes, points: Sequence[Point], lengths: Sequence[BatchLengths], model: str, rows: int, card: str
) -> None:
    """Plots the share of steps that page, by the memory of the device."""
    memory = StepMemory.of(points, model, card, "full")
    low, high = memory.fixed + memory.per_batch(64 * rows), memory.fixed + memory.state + memory.per_batch(2048 * rows)
    limits = [low + (1.1 * high - low) * i / 80 for i in range(81)]
    for data in lengths:
        found = [(limit, moved_pages(memory, limit, rows, data)) for limit in limits]
        known = [(limit / GIB, 100 * _share(moved)) for limit, moved in found if moved is not None]
        axes.plot(*zip(*known, strict=True), linewidth=2, label=data["name"])
    axes.set(
        title=f"{_pretty(model)}, {rows} rows at once ({COMPILED})",
        xlabel="GiB that a step may use",
        ylabel="steps in which pages move, %",
        ylim=(-3, 103),
    )
    axes.legend(frameon=False, fontsize=8)


def _share(moved: Sequence[int]) -> float:
    return sum(pages > 0 for pages in moved) / len(moved)


def bars(axes: Axes, card: str, longest: Sequence[LongestRow]) -> None:
    """Plots the longest row by model and kind of state."""
    rows = [row for row in longest if row["card"] == card]
    choices = list(rows[0]["longest"])
    width = 0.8 / len(choices)
    for index, choice in enumerate(choices):
        heights = [row["longest"][choice] for row in rows]
        places = [place + (index - (len(choices) - 1) / 2) * width for place in range(len(rows))]
        axes.bar(places, heights, width, label=choice)
    axes.set_xticks(range(len(rows)), [_pretty(row["model"]) for row in rows])
    axes.set(title=NAMES[card], ylabel="tokens of the longest row that fits, one at once" if card == "rtx4090" else "")
    axes.set_yscale("symlog", linthresh=64)
    axes.set_ylim(0, 4e6)  # leaves space for the legend
    if card == "rtx4090":
        axes.legend(frameon=False, fontsize=8, loc="upper right")


def _pretty(model: str) -> str:
    return model.replace("llama-", "LLaMA-").upper().replace("LLAMA", "LLaMA")


def costs_table(numbers: Numbers) -> Iterator[str]:
    """Yields the table of measured costs."""
    costs = numbers["costs"]
    yield f"gradients {costs['gradients_ms']:.0f} ms, plain update {costs['plain_ms']:.1f} ms\n"
    yield "| setting | pages | MB per page | MB moved per step | update, ms | time beyond the plain update, of a step |"
    yield "|---|---|---|---|---|---|"
    for row in costs["rows"]:
        what = f"budget {row['value']:.0%}" if row["kind"] == "budget" else f"all {row['kind']}"
        cells = (row["pages"], f"{row['page_bytes'] / 1e6:.1f}", f"{row['moved_bytes'] / 1e6:.0f}")
        yield f"| {what} | {' | '.join(map(str, cells))} | {row['update_ms']:.1f} | {row['over_step']:+.2%} |"


def lengths_table(numbers: Numbers) -> Iterator[str]:
    """Yields the table of data sets."""
    yield "| data | rows | tokens: median | 90 % | 99 % | most | padded lengths of batches (share of steps) |"
    yield "|---|---|---|---|---|---|---|"
    for data in numbers["lengths"]:
        steps = data["steps"]
        shares = [f"{n} ({steps.count(str(i)) / len(steps):.0%})" for i, n in enumerate(data["buckets"])]
        quantiles = " | ".join(f"{n:,}" for n in data["quantiles"].values())
        yield f"| {data['name']} | {data['rows']:,} | {quantiles} | {', '.join(shares)} |"


def spikes_table(points: Sequence[Point], numbers: Numbers) -> Iterator[str]:
    """Yields the table of real batches that page on real cards, at the largest number of rows that fits."""
    yield "| model | card | data | rows at once | steps that page | GB moved per step, mean | most |"
    yield "|---|---|---|---|---|---|---|"
    for card, models in CELLS.items():
        for model in models:
            for data in numbers["lengths"]:
                found = most_rows(StepMemory.of(points, model, card, "full"), LIMITS[card], data)
                what = f"{_pretty(model)} | {NAMES[card]} | {data['name']}"
                if found is None:
                    yield f"| {what} | none fits | | | |"
                    continue
                rows, moved = found
                if not any(moved):
                    continue
                mean, most = (PAGE_BYTES * pages / GB for pages in (sum(moved) / len(moved), max(moved)))
                yield f"| {what} | {rows} | {_share(moved):.1%} | {mean:.2f} | {most:.2f} |"


def longest_table(longest: Sequence[LongestRow]) -> Iterator[str]:
    """Yields the table of the longest rows by kind of state."""
    yield "| model | card | " + " | ".join(longest[0]["longest"]) + " |"
    yield "|---|---" + "|---" * len(longest[0]["longest"]) + "|"
    for row in longest:
        cells = [f"{tokens:,}" if tokens else "none" for tokens in row["longest"].values()]
        yield f"| {_pretty(row['model'])} | {NAMES[row['card']]} | {' | '.join(cells)} |"


def links_table(points: Sequence[Point]) -> Iterator[str]:
    """Yields the table of transfer times by data sheet: all state out and in once per step, next to the products."""
    yield (
        "| model | f32 state, GB | " + " | ".join(f"{link}, ms" for link in LINKS) + " | step of 16 x 512, s | share |"
    )
    yield "|---|---" + "|---" * len(LINKS) + "|---|---|"
    card = CARDS["a6000"]
    for model in CELLS["a6000"]:
        memory = StepMemory.of(points, model, "a6000", "full")
        seconds = sum(flops.flops(setting(model, (16, 1, 512), "full").sizes).values())
        seconds /= SHARE_OF_PEAK * card.bf16_flops
        times = [2 * memory.state / link for link in LINKS.values()]
        cells = " | ".join(f"{1e3 * t:,.0f}" for t in times)
        share = 2 * memory.state / LINKS["PCIe 4.0"] / seconds
        yield f"| {_pretty(model)} | {memory.state / GB:.2f} | {cells} | {seconds:.1f} | {share:.2%} |"
