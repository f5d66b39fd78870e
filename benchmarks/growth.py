"""How time and memory per pair grow with prompt, response, pairs per step and vocabulary: `python growth.py`.

Each point is one step of equal pairs in a process of its own, ours and TRL's in turn: CPU time with the heap
kept, peak memory under the allocator's defaults. Points are kept in growth.json, so that the sweep can be
resumed; the plot is growth.svg and growth.png.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench import FOLDER, Store, key_of, measure
from matplotlib.axes import Axes

Point = tuple[float, dict[str, Any]]
SWEEPS: dict[str, list[Point]] = {
    "prompt tokens": [(n, {"data": f"{n}/64/64", "per_step": 4}) for n in (32, 128, 512, 1024)],
    "response tokens (each side)": [
        (n, {"data": f"128/{n}/{n}", "per_step": 4}) for n in (32, 128, 256, 512)
    ],
    "pairs per step": [(n, {"data": "hh", "per_step": n}) for n in (1, 4, 8, 16)],
    "vocabulary": [
        (n, {"data": "128/64/64", "per_step": 4, "shape": f"h256v{n}"}) for n in (8192, 32000, 64000, 151936)
    ],
}
COLOURS = {"trl": "#c44e52", "ours": "#2a6f97"}
LABELS = {"trl": "TRL 1.16", "ours": "orpo"}


def main() -> None:
    """Measure the points that are missing, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", action="store_true", help="draw what growth.json holds, measure nothing")
    store = Store(FOLDER / "growth.json")
    if not parser.parse_args().plot:
        for sweep in SWEEPS.values():
            for _, point in sweep:
                for side in COLOURS:
                    _fill(store, side, point)
                plot(store, FOLDER / "growth.svg")
    plot(store, FOLDER / "growth.svg")


def _spec(side: str, point: dict[str, Any]) -> dict[str, Any]:
    return {"task": "step", "side": side, "shape": "h256", **point, "repeats": 2 if side == "ours" else 1}


def _fill(store: Store, side: str, point: dict[str, Any]) -> None:
    """Measure what is missing of one point, for time and for memory."""
    spec = _spec(side, point)
    for keep_heap in (True, False):
        if not store.count(key_of(spec, keep_heap)):
            result = measure(spec, keep_heap)
            store.add(key_of(spec, keep_heap), result, "python benchmarks/growth.py")
            print(
                side,
                point,
                result.get("error") or f"{result['cpu']:.2f} s {result['peak_mib']:.0f} MiB",
                flush=True,
            )


def plot(store: Store, path: Path) -> None:
    """Two rows of panels, seconds and MiB per pair, one column per sweep."""
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(13, 6), sharey="row", layout="constrained")
    for column, (name, sweep) in enumerate(SWEEPS.items()):
        for side in COLOURS:
            _line(axes[0][column], store, side, sweep, "cpu", keep_heap=True)
            _line(axes[1][column], store, side, sweep, "peak_mib", keep_heap=False)
        axes[1][column].set_xlabel(name)
        for axis in (axes[0][column], axes[1][column]):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_xticks([x for x, _ in sweep], [_short(x) for x, _ in sweep])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("CPU seconds per pair")
    axes[1][0].set_ylabel("peak MiB per pair")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)
    figure.savefig(path.with_suffix(".png"), dpi=110)
    plt.close(figure)


def _line(axis: Axes, store: Store, side: str, sweep: list[Point], what: str, *, keep_heap: bool) -> None:
    points = [
        (x, runs[-1][what] / point["per_step"])
        for x, point in sweep
        if (runs := store.runs.get(key_of(_spec(side, point), keep_heap))) and what in runs[-1]
    ]
    if points:
        axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[side], label=LABELS[side])


def _short(x: float) -> str:
    return f"{x / 1000:.0f}k" if x >= 8000 else f"{x:.0f}"


if __name__ == "__main__":
    main()
