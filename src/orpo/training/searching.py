"""A `transformers.Trainer` whose hyperparameter search minimises a loss and changes what it says it changes.

transformers' own adds up all metrics of an evaluation, accuracy as well as loss, and sets attributes of the
arguments that data and model were made with before. `orpo probe` and `orpo compare` choose on held-out pairs
with less work; this is for scripts that call `hyperparameter_search`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from orpo.errors import ConfigError
from orpo.run.log import flat_name
from orpo.settings.config import OWN, Objective, Schedule, check_settings, objective_keys
from orpo.training.cadence import schedule_of
from orpo.training.stepping import SteppingTrainer

_PER_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


class SearchingTrainer(SteppingTrainer):
    """What a trainer needs for a search.

    Attributes:
        final_objective: What is minimised; of several stages in the last one, by which the run is evaluated.
        schedule: What is minimised in each step.
        pairs_per_step: Pairs of one optimizer step, over all ranks.
    """

    final_objective: Objective
    schedule: Schedule
    pairs_per_step: int
    _recipe: dict[str, Any]

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: Any = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As transformers', but for `compute_objective`: where it is not given, the loss on held-out pairs.

        Mind that losses of two `beta` are two measures: to choose `beta`, compute something else.

        Raises:
            ConfigError: There is no `model_init` or `hp_space`, something is to be maximised that is not
                named, or the space has a setting that data or model were made with.
        """
        if self.model_init is None:
            raise ConfigError("hyperparameter_search: each trial needs a new model; give model_init")
        if hp_space is None:  # transformers' own changes the pairs per step
            raise ConfigError(
                "hyperparameter_search: give hp_space, as lambda trial: {'learning_rate':"
                " trial.suggest_float('learning_rate', 1e-6, 1e-4, log=True)}"
            )
        if compute_objective is None and direction != "minimize":
            raise ConfigError(
                f"hyperparameter_search: direction: {direction}, and the loss is what is not named; give"
                " compute_objective"
            )
        objective = compute_objective or _evaluation_loss
        return super().hyperparameter_search(
            hp_space, objective, n_trials, direction, backend, hp_name, **kwargs
        )

    def _hp_search_setup(self, trial: Any) -> None:
        """Take the settings of a trial, and what follows from them."""
        names = [one.name for one in dataclasses.fields(self.args) if one.init]
        before = {name: getattr(self.args, name) for name in names}
        super()._hp_search_setup(trial)
        changed = {name: value for name in names if (value := getattr(self.args, name)) != before[name]}
        if not changed:
            return
        free = objective_keys(self.args)
        for name in changed:
            if name in _PER_STEP or (name in OWN and name not in free):
                raise ConfigError(
                    f"hyperparameter_search: {name}: data and model were made with one value of it; try"
                    " others in runs of their own"
                )
        check_settings(self.args)
        plain = self.args.plain_settings()
        self._recipe |= {name: plain[name] for name in changed}
        self.final_objective = self.args.objective_settings
        self.schedule = schedule_of(self.args, self.train_dataset, self.pairs_per_step)


def _evaluation_loss(metrics: dict[str, float]) -> float:
    """The loss on the held-out pairs."""
    name = flat_name("loss")
    if name not in metrics:
        raise ConfigError(f"hyperparameter_search: an evaluation has no {name}; give compute_objective")
    return metrics[name]
