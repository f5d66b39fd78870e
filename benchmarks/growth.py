"""How time and memory per pair grow with prompt, response, pairs per step and vocabulary: `python growth.py`.

Each point is one step, ours and TRL's sweeps in turn: peak memory under the allocator's defaults, then CPU
time with the heap kept. growth.json keeps what was measured; the plot is growth.svg and growth.png.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench import FOLDER, Store, key_of, measure
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

Point = tuple[float, dict[str, Any]]
H256 = {"shape": "h256", "per_step": 4}
SWEEPS: dict[str, list[Point]] = {
    "prompt tokens": [(n, {**H256, "data": f"{n}/64/64"}) for n in (32, 128, 512, 1024)],
    "response tokens (each side)": [(n, {**H256, "data": f"128/{n}/{n}"}) for n in (32, 128, 256, 512)],
    "pairs per step": [(n, {**H256, "data": "hh", "per_step": n}) for n in (1, 4, 8, 16)],
    "vocabulary": [
        (n, {**H256, "data": "128/64/64", "shape": f"h256v{n}"}) for n in (8192, 32000, 64000, 151936)
    ],
}
COLOURS = {"trl": "#c44e52", "ours": "#2a6f97"}
LABELS = {"trl": "TRL 1.16", "ours": "orpo"}


def main() -> None:
    """Measure the sweeps that are missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="draw what growth.json holds, measure nothing")
    store = Store(FOLDER / "growth.json")
    if not parser.parse_args().plot:
        for name, points in SWEEPS.items():
            for side in COLOURS:
                spec = _spec(side, points)
                if not store.count(key_of(spec, keep_heap=False)):
                    result = measure(spec, keep_heap=False)
                    store.add(key_of(spec, keep_heap=False), result, "python benchmarks/growth.py")
                    print(name, side, result, flush=True)
    plot(store, FOLDER / "growth.svg")


def _spec(side: str, points: list[Point]) -> dict[str, Any]:
    return {"task": "sweep", "side": side, "points": [point for _, point in points]}


def plot(store: Store, path: Path) -> None:
    """Two rows of panels, seconds and MiB per pair, one column per sweep."""
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(13, 6), sharey="row", layout="constrained")
    for column, (name, sweep) in enumerate(SWEEPS.items()):
        for side in COLOURS:
            for axis, what in zip(axes[:, column], ("cpu", "peak_mib"), strict=True):
                _line(axis, store, side, sweep, what)
        axes[1][column].set_xlabel(name)
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks([x for x, _ in sweep], [_short(x) for x, _ in sweep])
            axis.xaxis.set_minor_locator(NullLocator())
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("CPU seconds per pair")
    axes[1][0].set_ylabel("peak MiB per pair")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _line(axis: Axes, store: Store, side: str, sweep: list[Point], what: str) -> None:
    for result in store.runs.get(key_of(_spec(side, sweep), keep_heap=False), [])[-1:]:
        if what in result:
            per_pair = [value / p["per_step"] for value, (_, p) in zip(result[what], sweep, strict=True)]
            axis.plot([x for x, _ in sweep], per_pair, "o-", color=COLOURS[side], label=LABELS[side])


def _short(x: float) -> str:
    return f"{x / 1000:.0f}k" if x >= 8000 else f"{x:.0f}"


if __name__ == "__main__":
    main()
