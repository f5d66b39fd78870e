"""A `transformers.Trainer` that stops where it is asked to, and goes on as if it had not been stopped.

A signal within a step is acted on at the end of the step, in an evaluation at once: it is cut off, and the
run that resumes makes it again. A run whose last step is made does not train another one.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from orpo.errors import RunError
from orpo.run.public import without_secrets
from orpo.training.arguments import ORPOConfig
from orpo.training.recorder import Recorder
from orpo.training.stopping import StopSignal

_HYPERPARAMETERS = ("initial_lr", "weight_decay", "betas", "eps", "momentum")


class _CutOff(Exception):  # noqa: N818 - no error
    """An evaluation is not made to its end."""


class InterruptibleTrainer(Trainer):
    """What a trainer needs to be stopped at any moment and to be resumed exactly.

    Attributes:
        stopped_by: Name of the signal that ended `train` early, or None.
        evaluation_waits: Whether the evaluation of this step was cut off, and is to be made again.
        forced: Settings that differ from the checkpoint's and take effect from there on.
    """

    args: ORPOConfig
    optimizer: Any
    lr_scheduler: Any
    recorder: Recorder
    stop_signal: StopSignal
    stopped_by: str | None = None
    evaluation_waits: bool = False
    forced: list[str]
    _evaluating: bool = False

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, or no step at all where the run is complete or was stopped."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Begin or resume; how often is logged, evaluated and saved is what the settings say.

        transformers goes by what the checkpoint says of that, with a warning that it differs.
        """
        logger = logging.getLogger("transformers.trainer_utils")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            found = super()._init_training_state(max_steps, *args, **kwargs)
        finally:
            logger.setLevel(level)
        self.state.compute_steps(self.args, max_steps)
        return found

    def received_signal(self) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        received = self.stop_signal.name is not None
        if self.args.world_size > 1:
            flag = torch.tensor(float(received), device=self.args.device)
            received = self.accelerator.reduce(flag, "sum").item() > 0
        return received

    def stop(self) -> None:
        """End training with a checkpoint of this step."""
        self.stopped_by = self.stop_signal.name or "another rank"
        self.control.should_save = self.control.should_training_stop = True

    @property
    def is_cut_off(self) -> bool:
        """Whether the evaluation that is running is to end here: of one process, others would wait for it."""
        return self._evaluating and self.args.world_size == 1 and self.stop_signal.name is not None

    def cut_off(self) -> None:
        """Leave an evaluation in the middle where a signal asks for it."""
        if self.is_cut_off:
            raise _CutOff

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate while training; an evaluation that a resumed run makes up for is judged here."""
        makes_up, self.evaluation_waits = self.evaluation_waits, False
        patience = [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        before = [one.early_stopping_patience_counter for one in patience]
        self._evaluating = True
        try:
            metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not makes_up)
        except _CutOff:
            for one, counter in zip(patience, before, strict=True):
                one.early_stopping_patience_counter = counter
            self.recorder.take_back_evaluations(self.state.global_step)
            self.evaluation_waits = True
            metrics = {}
        finally:
            self._evaluating = False
        chooses = makes_up and metrics and self.can_choose(metrics)
        if chooses and super()._determine_best_metric(metrics, trial):
            self.state.best_model_checkpoint = str(self.recorder.run.checkpoint(self.state.global_step))
        if self.received_signal():
            self.stop()
            if skip_scheduler:  # not after a step: nothing is saved, and what is there must not be deleted
                self.state.best_model_checkpoint = None
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether these metrics are the best ones; what a signal asks to save is saved anyway."""
        chooses = not self.evaluation_waits and self.can_choose(metrics)
        is_best = chooses and super()._determine_best_metric(metrics, trial)
        return bool(is_best or self.stopped_by is not None)

    def can_choose(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation may be the best one."""
        return True

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load them; settings that were changed by force take the place of the checkpoint's."""
        asked = [
            {name: group[name] for name in _HYPERPARAMETERS if name in group}
            for group in self.optimizer.param_groups
        ]
        super()._load_optimizer_and_scheduler(checkpoint)
        if not self.forced or checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            raise RunError(f"force: {', '.join(self.forced)} cannot be changed in a run with DeepSpeed")
        for group, values in zip(self.optimizer.param_groups, asked, strict=True):
            group.update(values)
        if isinstance(self.lr_scheduler, LambdaLR):
            scheduler = self.lr_scheduler
            scheduler.base_lrs = [group["initial_lr"] for group in self.optimizer.param_groups]
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            scheduler._last_lr = [base * share(scheduler.last_epoch) for base, share in pairs]
            for group, rate in zip(self.optimizer.param_groups, scheduler._last_lr, strict=True):
                group["lr"] = rate

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save the model; the arguments that are saved with it have no secrets."""
        values = {f.name: getattr(self.args, f.name) for f in dataclasses.fields(self.args)}
        values = {name: value for name, value in values.items() if isinstance(value, (str, list, Mapping))}
        clean = {name: without_secrets({name: value}).get(name) for name, value in values.items()}
        with changed(self.args, **{name: clean[name] for name in clean if clean[name] != values[name]}):
            super()._save(output_dir, state_dict)


class StopBetweenSteps(TrainerCallback):
    """Ends training where any rank has received a signal, at the same step on all, with a checkpoint."""

    def __init__(self, trainer: InterruptibleTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Train no further where early stopping had ended the run, nor with changes that come too late."""
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and args.early_stopping_patience is not None:
                callback.early_stopping_patience = args.early_stopping_patience
                ran_out = callback.early_stopping_patience_counter >= args.early_stopping_patience
                control.should_training_stop = control.should_training_stop or (
                    state.global_step > 0 and ran_out
                )
        is_complete = state.global_step >= state.max_steps or control.should_training_stop
        if self.trainer.forced and is_complete:
            raise RunError(
                f"force: the run is complete at step {state.global_step}, so {', '.join(self.trainer.forced)}"
                " would change nothing; train a fresh run with resume_from_checkpoint: false"
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for a signal, and ask for the last log window, however few steps it has."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self.trainer.received_signal() and state.global_step < state.max_steps:
            self.trainer.stop()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what a signal has saved."""
        if self.trainer.stopped_by is not None:
            # The end of `train` would load the best checkpoint, and at save_total_limit=1 delete this one.
            state.best_model_checkpoint = None


@contextmanager
def changed(target: Any, **values: Any) -> Iterator[None]:
    """Set attributes for a while."""
    before = {name: getattr(target, name) for name in values}
    try:
        for name, value in values.items():
            setattr(target, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(target, name, value)
