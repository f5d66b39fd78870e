"""Draw the README's picture from a finished demo: held-out log-probs of SFT and ORPO as they train.

orpo demo && python benchmarks/demo_picture.py runs/demo docs/demo.svg
"""

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from orpo.demo.experiment import sft_folder
from orpo.run.directory import read_run

COLOURS = {"chosen": "#0d7a6b", "rejected": "#c2500f"}
INK = "#6a675f"  # readable on a light page and on a dark one


def main(folder: Path, target: Path) -> None:
    """Two panels on one scale."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.size": 11}):
        figure = Figure(figsize=(8.4, 2.8), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.subplots(1, 2, sharey=True)
        for ax, (name, run) in zip(axes, (("SFT", sft_folder(folder)), ("ORPO", folder)), strict=True):
            for side, colour in COLOURS.items():
                steps, means, errors = zip(*read_run(run).series(f"{side}_logprob", ""), strict=True)
                ax.plot(steps, means, color=colour, linewidth=2, marker="o", markersize=3.5)
                low = [mean - error for mean, error in zip(means, errors, strict=True)]
                high = [mean + error for mean, error in zip(means, errors, strict=True)]
                ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
                ax.annotate(side, (steps[-1], means[-1]), (4, 0), textcoords="offset points",
                            color=colour, va="center")  # fmt: skip
            ax.set_title(name, color=INK, fontsize=12, fontweight="bold")
            ax.set_xlabel("optimizer step", color=INK)
            ax.set_xlim(-3, steps[-1] * 1.22)
            ax.set_xticks(range(0, steps[-1] + 1, steps[-1] // 4))
            ax.patch.set_alpha(0)
            ax.tick_params(colors=INK, length=0)
            ax.grid(axis="y", color=INK, alpha=0.25, linewidth=0.8)
            for spine in ax.spines.values():
                spine.set_visible(False)
        axes[0].set_ylabel("held-out log-prob of a token", color=INK)
        with target.open("w", encoding="utf-8") as file:
            FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
