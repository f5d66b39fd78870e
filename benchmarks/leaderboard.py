"""AlpacaEval 2's leaderboard, computed again from its per-example preferences and answer lengths.

    python benchmarks/leaderboard.py PREFERENCES.csv LEADERBOARD.csv [--difficulty F.csv [--gamed F.csv]]

PREFERENCES.csv has the columns model, example, length_baseline, length_model, preference; LEADERBOARD.csv has
model, win_rate, standard_error, n_total, discrete_win_rate and length_controlled_winrate, as published. Win
rate, error and discrete rate must come out exactly, or the script fails. The length-controlled rate needs
AlpacaEval's two files to be the leaderboard's; without them its distance is printed.

    python benchmarks/leaderboard.py PREFERENCES.csv --package

compares the length-controlled rate with that of the package alpaca_eval (pip install alpaca_eval
'setuptools<81'), its two files being made up: they cannot be fetched offline.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from orpo.judging.alpaca_eval import read_control, score_of
from orpo.judging.length_control import length_controlled
from orpo.judging.win_rate import Ruling, win_rate

EXACT = 1e-9
"""Points of a win rate, in percent, that floating-point sums may differ by."""


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def by_model(path: Path) -> dict[str, list[dict[str, str]]]:
    """Rows of each model."""
    rows: dict[str, list[dict[str, str]]] = {}
    for row in read(path):
        rows.setdefault(row["model"], []).append(row)
    return rows


def verdicts(rows: list[dict[str, str]]) -> list[Ruling]:
    """Preferences as verdicts."""
    return [
        Ruling(
            row["example"],
            score_of(float(row["preference"])),
            (int(row["length_baseline"]), int(row["length_model"])),
        )
        for row in rows
    ]


def against_leaderboard(args: argparse.Namespace) -> float:
    """Print each model beside what was published; returns the largest difference in points."""
    control = read_control(args.difficulty, args.gamed)
    rows = by_model(args.preferences)
    print(f"{'model':<26}{'n':>5}{'win rate':>11}{'se':>9}{'discrete':>10}{'worst error':>13}   "
          f"{'length-controlled':<28}{'published':>10}{'seconds':>9}")  # fmt: skip
    worst = 0.0
    for published in read(args.leaderboard):
        said = verdicts(rows[published["model"]])
        found = win_rate(said)
        ours = (100 * found.rate.mean, 100 * (found.rate.se or 0), 100 * found.discrete)
        theirs = [float(published[name]) for name in ("win_rate", "standard_error", "discrete_win_rate")]
        error = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
        worst = max(worst, error)
        began = time.perf_counter()
        controlled = length_controlled([one.score for one in said], [one.lengths for one in said], control)
        low, high = controlled.interval
        rate = f"{100 * controlled.rate:6.2f} ({100 * low:.2f} to {100 * high:.2f})"
        print(f"{published['model']:<26}{found.number:>5}{ours[0]:>11.4f}{ours[1]:>9.4f}{ours[2]:>10.4f}"
              f"{error:>13.1e}   {rate:<28}{float(published['length_controlled_winrate']):>10.2f}"
              f"{time.perf_counter() - began:>9.1f}")  # fmt: skip
    print(f"\nwin rate, standard error and discrete rate: largest difference {worst:.1e} points")
    kind = "the leaderboard's" if control.is_leaderboards else "without the leaderboard's two files"
    print(f"length-controlled rate: {kind}")
    return worst


def against_package(path: Path) -> float:
    """The same beside the package alpaca_eval."""
    import alpaca_eval.metrics.glm_winrate as package
    import pandas as pd

    random, number, worst = np.random.default_rng(5), 805, 0.0
    hard = random.normal(size=number)
    made = [
        pd.DataFrame({
            "preference": random.beta(0.6, 0.6, number), "index": range(number),
            "std_delta_len": random.normal(size=number), "instruction_difficulty": hard,
            "not_gamed_baseline": own, "model": "made",
        })
        for own in (False, False, True)
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pd.concat(made).to_csv(folder / "df_gamed.csv", index=False)
        pd.DataFrame({"instruction_difficulty": hard}).to_csv(folder / "instruction_difficulty.csv")
        package.hf_hub_download = lambda filename, **options: str(folder / filename)
        control = read_control(folder / "instruction_difficulty.csv", folder / "df_gamed.csv")
        for model, rows in by_model(path).items():
            said = verdicts(rows)
            annotations = pd.DataFrame({
                "preference": [1 + one.score for one in said], "generator_1": "b", "generator_2": "m",
                "output_1": ["x" * one.lengths[0] for one in said],
                "output_2": ["x" * one.lengths[1] for one in said],
            })  # fmt: skip
            theirs = package.get_length_controlled_winrate(
                annotations, save_weights_dir=None, is_warn_extreme_changes=False
            )["length_controlled_winrate"]
            spread = 100 * annotations["glm_preference"].sem()
            ours = length_controlled([one.score for one in said], [one.lengths for one in said], control)
            error = max(abs(theirs - 100 * ours.rate), abs(spread - 100 * ours.spread))
            worst = max(worst, error)
            print(f"{model:<26} alpaca_eval {theirs:.6f} ± {spread:.6f}   orpo {100 * ours.rate:.6f} ± "
                  f"{100 * ours.spread:.6f}   {error:.1e}")  # fmt: skip
    print(f"\nlargest difference {worst:.1e} points")
    return worst


def main() -> int:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("preferences", type=Path)
    parser.add_argument("leaderboard", type=Path, nargs="?")
    parser.add_argument("--difficulty", type=Path)
    parser.add_argument("--gamed", type=Path)
    parser.add_argument("--package", action="store_true")
    args = parser.parse_args()
    worst = against_package(args.preferences) if args.package else against_leaderboard(args)
    return 0 if worst < EXACT else 1


if __name__ == "__main__":
    sys.exit(main())
