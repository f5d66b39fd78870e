"""Keeps what a run's evaluations say of each pair: before training, and of the weights that are to be judged.

These are the weights of the best evaluation after step 0 where the run ends with its best checkpoint, else
those of the last one (evaluation/verdict.py compares the two). Everything in between is deleted on the way.
"""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from orpo.evaluation.per_pair import PairResults, write_results
from orpo.run.directory import RunDirectory
from orpo.run.log import flat_name


class PairLog(TrainerCallback):
    """Writes a file of pairs for each evaluation, on the first rank.

    Args:
        output_dir: The run directory.
        writes: Whether this process writes.
    """

    def __init__(self, output_dir: str, *, writes: bool) -> None:
        self._run = RunDirectory(Path(output_dir))
        self._writes = writes
        self._step = -1
        self._sets: dict[str, PairResults] = {}

    def evaluated(self, args: Any, state: Any, set_name: str, results: PairResults) -> None:
        """Keep the results of one set, next to those of the other sets at the same step."""
        if not self._writes:
            return
        if state.global_step != self._step:
            self._step, self._sets = state.global_step, {}
            self._keep(args, state, self._step)
        self._sets[set_name] = results
        self._run.path.mkdir(parents=True, exist_ok=True)
        write_results(self._run.step_results(self._step), self._sets)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take back what an earlier attempt has kept after the checkpoint this one starts from."""
        self._step = -1
        for step in self._run.steps_with_results() if self._writes else []:
            if step > state.global_step:
                self._run.step_results(step).unlink()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what is judged, and delete the rest."""
        if self._writes:
            self._keep(args, state)

    def _keep(self, args: Any, state: Any, *also: int) -> None:
        judged = best_trained_step(args, state) if args.load_best_model_at_end else self._step
        for step in self._run.steps_with_results():
            if step not in (0, judged, *also):
                self._run.step_results(step).unlink()


def choosing_metric(args: Any) -> str:
    """The flat name of the metric that chooses the checkpoint."""
    chooser = str(args.metric_for_best_model)
    return chooser if chooser.startswith(flat_name("")) else flat_name(chooser)


def best_trained_step(args: Any, state: Any) -> int | None:
    """The best evaluation after step 0, by the metric that chooses the checkpoint; the first of equals."""
    name = choosing_metric(args)
    sign = -1 if args.greater_is_better else 1
    scored = [
        (sign * line[name], line["step"]) for line in state.log_history if name in line and line["step"]
    ]
    return min(scored)[1] if scored else None
