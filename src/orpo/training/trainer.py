"""`ORPOTrainer`: transformers.Trainer, taught what an ORPO step is.

A loader item is a whole optimizer step (steps.py), whose micro-batches stepping.py runs. What the Trainer
calls gradient accumulation therefore stays 1, and its step counts, schedules and epochs are those of
optimizer steps. The other overrides measure over examples, and keep a run resumable.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.serialization import config as serialization
from transformers import (
    EarlyStoppingCallback,
    EvalPrediction,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import (
    EvalLoopOutput,
    IntervalStrategy,
    TrainOutput,
    denumpify_detensorize,
    rotate_checkpoints,
)

from orpo.console import LongWork, say
from orpo.data.dataset import TokenizedDataset, prompt_index
from orpo.data.source import TokenizedStream, TrainingData, evaluation_name, read_pairs
from orpo.data.stages import following
from orpo.data.token_ids import check_token_ids
from orpo.engine.base_weights import save_base_weights
from orpo.engine.head import PairScores
from orpo.engine.memory import default_tokens_per_micro_batch
from orpo.engine.metrics import MetricWindow, is_ours, metric_named, trl_names, write_figure
from orpo.engine.model import Preparation, prepare_model
from orpo.engine.packing import runs_rejected
from orpo.engine.score import score
from orpo.engine.scorer import base_model, num_embeddings
from orpo.engine.steps import (
    EVALUATION_BLOCK,
    BatchSettings,
    Step,
    StepDataset,
    StepStream,
    build_step,
    step_loader,
)
from orpo.engine.stop_tokens import save_generation_config, stop_token_ids
from orpo.errors import ConfigError, DataError, RunError, raised_as
from orpo.evaluation.per_pair import PairResults
from orpo.pairs import TokenizedPair
from orpo.run.card import write_model_card
from orpo.run.checkpoints import (
    checkpoint_problem,
    checkpoint_step,
    last_checkpoint,
    read_state,
    remove_unfinished,
    write_state,
    written_into,
    written_whole,
)
from orpo.run.directory import RunDirectory, is_adapter
from orpo.run.finished import mark_finished
from orpo.run.lock import check_output_dir, held
from orpo.run.log import Figure, flat, flat_name, is_number
from orpo.run.repair import put_damaged_aside
from orpo.settings.config import Objective, Stage
from orpo.training.arguments import ORPOConfig
from orpo.training.cadence import schedule_of, settle_cadence
from orpo.training.in_backward import (
    give_back_what_is_freed,
    own_optimizers,
)
from orpo.training.interruptible import StopBetweenSteps, changed
from orpo.training.pair_log import PairLog, choosing_metric
from orpo.training.progress import Progress, Stopwatch
from orpo.training.recorder import Recorder, peak_memory
from orpo.training.reference import Reference
from orpo.training.resolve import (
    add_template_tokens,
    check_model,
    keep_template,
    opening_lines,
    own_arguments,
    read_for_training,
    resolve_model,
    resolve_tokenizer,
    settle_evaluation,
    text_tokenizer,
    unused,
)
from orpo.training.resuming import StreamCheck, check_changes, first_rank_decides, run_identity
from orpo.training.samples import SampleWriter
from orpo.training.saved_weights import load_renamed
from orpo.training.searching import SearchingTrainer
from orpo.training.stopping import StopSignal

__all__ = ["ORPOConfig", "ORPOTrainer"]

GIVEN_ROWS = "given rows"
"""Name in metrics.jsonl of a set that `evaluate` was given without a name."""


@contextlib.contextmanager
def _shown(args: ORPOConfig) -> Iterator[None]:
    """Show how far the reading of data in this block is, where it takes long."""
    with LongWork(bar=not args.disable_tqdm) as work, following(work):
        yield


class ORPOTrainer(SearchingTrainer):
    """Trains a causal language model on preference pairs; takes the arguments of TRL's class.

    Attributes:
        final_objective: What is minimised; of several stages in the last one, by which the run is evaluated.
        schedule: What is minimised in each step.
        pairs_per_step: Pairs of one optimizer step, over all ranks.
        stopped_by: Name of the signal that ended `train` early, or None.
    """

    model: Any
    deepspeed: Any
    train_dataset: Any
    eval_dataset: Any
    final_objective: Objective
    _prepared: tuple[nn.Module, Preparation] | None = None
    _tokens_per_micro_batch = 0
    _stage: Stage | None = None
    _evaluated_set: str | None = None  # its name, while an evaluation runs
    _tag_names = ("trl", "orpo")  # `trl` because dashboards filter on the tags TRL gives

    def __init__(  # noqa: PLR0913 - TRL's signature
        self,
        model: PreTrainedModel | nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Any = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Load what is given by name, tokenize the data, and check that they fit.

        Args:
            model: A model, a PEFT model to continue with, or a name; None with `model_init`, or to take the
                name in `args`.
            args: Settings; the defaults, if there are none.
            data_collator: Accepted and not used: pairs are packed.
            train_dataset: `Dataset`, `IterableDataset` (needs `max_steps`), list of rows, file or hub name,
                or tokenized pairs; None: what `args` names.
            eval_dataset: The same, or a dict of them; None: what `args` names, or held-out prompts, or
                nothing.
            processing_class: Tokenizer; by default the model's.
            model_init: Makes the model, a fresh one in each `train`.
            callbacks: Further callbacks.
            optimizers: Optimizer and schedule instead of the settings'.
            preprocess_logits_for_metrics: Accepted and not used: there are no logits.
            peft_config: Train this adapter instead of the weights.
            compute_metrics: Gets `predictions`, the mean log-probabilities [n, 2] of (chosen, rejected), and
                `label_ids`, n zeros: the column that is preferred.
            tokenizer: Old name of `processing_class`.

        Raises:
            OrpoError: Settings, model or data cannot be trained with.
        """
        args = own_arguments(args)
        set_seed(args.seed)  # an adapter's weights are drawn before Trainer sets the seed
        loaded: Any = resolve_model(model, args, model_init, peft_config)
        tokenizer = resolve_tokenizer(processing_class or tokenizer, args)
        if args.resize_embeddings:
            args.notices += add_template_tokens(loaded, text_tokenizer(tokenizer), args.chat_template)
        with args.main_process_first(desc="tokenizing the data"), _shown(args):
            data = read_for_training(train_dataset, eval_dataset, args, text_tokenizer(tokenizer), loaded)
        if data.train is None and not data.evals:
            raise DataError("there is no train_dataset, and `args` names none")
        args.text_rows = data.text_rows or args.text_rows
        settle_evaluation(args, list(data.evals), has_own_metrics=compute_metrics is not None)
        settle_cadence(args, data, loaded)
        keep_template(data.template, tokenizer, loaded)
        self.final_objective = args.objective_settings
        self.pairs_per_step = args.pairs_per_step
        self.schedule = schedule_of(args, data.train_pairs, self.pairs_per_step)
        self._recipe = args.recipe()
        self._identity = run_identity(args, data.train_pairs, loaded, self.schedule.stages[0].objective)
        self.forced = []
        args.gradient_accumulation_steps = 1  # a loader item is a whole step already
        self.stop_signal = StopSignal()
        with raised_as(ConfigError, "the run cannot be set up"):
            super().__init__(
                model=loaded,
                args=args,
                train_dataset=data.train_pairs,
                eval_dataset=data.eval_pairs,
                processing_class=tokenizer,
                model_init=model_init,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=own_optimizers(args, optimizers),
            )
        self.neftune_noise_alpha = None  # the engine knows what a text is
        self.window = MetricWindow(self.final_objective, self.args.device)
        self.stopwatch = Stopwatch()
        self.recorder = self._add_callbacks(data)
        base_model(self.model).add_model_tags(list(self._tag_names))
        ignored = unused(
            data_collator=data_collator, preprocess_logits_for_metrics=preprocess_logits_for_metrics
        )
        for line in [*opening_lines(args, data, tokenizer), *ignored]:
            say(line)

    # ------------------------------------------------------------------------------------ setting up

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; refuse one that divides rows or layers over processes.

        Each process trains on rows of its own; one that has a part of them would not.
        """
        super().create_accelerator_and_postprocess()
        # In older releases transformers' answer about tensors leaves accelerate's settings out.
        divided = getattr(self.accelerator, "parallelism_config", None)
        sizes = {
            "tensor": max(self.get_tp_size(), divided.tp_size if divided else 1),
            "context": self.get_cp_size(), "sequence": self.get_sp_size(),
        }  # fmt: skip
        for kind, size in sizes.items():
            if size > 1:
                raise ConfigError(
                    f"{kind} parallelism over {size} processes: not supported, each process trains on rows of"
                    " its own; fsdp or deepspeed divide the weights, gradient_checkpointing and"
                    " tokens_per_micro_batch make long rows fit"
                )

    def _add_callbacks(self, data: TrainingData) -> Recorder:
        for printer in (ProgressCallback, PrinterCallback):
            self.remove_callback(printer)
        self.add_callback(_EpochOrder())
        self.add_callback(StopBetweenSteps(self))
        self.add_callback(_StageEnds(self))
        recorder = Recorder(
            str(self.args.output_dir), self._recipe, data.to_json(), writes=self.is_world_process_zero()
        )
        self.add_callback(recorder)
        self._pair_log = PairLog(str(self.args.output_dir), writes=self.is_world_process_zero())
        self.add_callback(self._pair_log)
        if self.args.num_samples and self.eval_dataset is not None:
            self.add_callback(SampleWriter(self, self.args.num_samples))
        elif self.args.num_samples:
            say("num_samples: no effect: no pair is held out whose prompt could be answered")
        if self.args.early_stopping_patience is not None:
            if self.args.eval_strategy == IntervalStrategy.NO:
                raise ConfigError(
                    "early_stopping_patience: there is no evaluation; set eval_strategy and give data"
                )
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        self._progress = Progress(recorder, bar=not self.args.disable_tqdm)
        self.add_callback(self._progress)  # last, so that its clock sees what the others take
        return recorder

    def _preparation(self) -> Preparation:
        """Prepare the model for scoring, once it is on its device and before it is wrapped."""
        inner = base_model(self.model)
        if self._prepared is None or self._prepared[0] is not inner:
            # The first rank finds the exact layout and the token budget; all ranks must make the same plan.
            found: list[Any] = [None, None]
            if self.is_world_process_zero():
                found = [self._prepare(), self._token_budget()]
            if self.args.world_size > 1:
                broadcast_object_list(found)
            preparation, self._tokens_per_micro_batch = found
            if not self.is_world_process_zero():
                self._prepare(preparation)
            for line in preparation.notices:
                say(line)
            if self.model.device.type == "cuda":
                say(f"attention: {preparation.attention}")
            self._prepared = (inner, preparation)
        return self._prepared[1]

    def _token_budget(self) -> int:
        with self.accelerator.autocast():
            return (
                self.args.tokens_per_micro_batch
                or self._tokens_per_micro_batch
                or default_tokens_per_micro_batch(
                    self.model,
                    self.args.device,
                    checkpointing=bool(self.args.gradient_checkpointing),
                    num_shards=self.args.world_size if self.is_fsdp_enabled else 1,
                    optim=str(getattr(self.args.optim, "value", self.args.optim)),
                    in_backward=self.args.optimizer_in_backward,
                    compares=any(runs_rejected(stage.objective, None) for stage in self.schedule.stages),
                )
            )

    def _prepare(self, found: Preparation | None = None) -> Preparation:
        """Prepare the model, as another rank has `found` it or by a probe."""
        with self.accelerator.autocast():  # so that the probe meets the precision and the kernels of training
            return prepare_model(
                self.model,
                layout=self.args.layout,
                logits_memory_mib=self.args.logits_memory_mib,
                longest=self._longest_side(),
                found=found,
            )

    def _longest_side(self) -> int | None:
        """Tokens of the longest side there can be; None where nothing bounds it."""
        sets = (self.train_dataset, *self._evaluation_sets())
        tokenized = [pairs for pairs in sets if isinstance(pairs, TokenizedDataset)]
        sides = [pairs.longest for pairs in tokenized]
        return None if self.args.max_length is None else max([self.args.max_length, *sides])

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Make the model that `model_init` gives, with the same checks as one that is passed."""
        model: nn.Module = super().call_model_init(trial)
        for line in check_model(model, self.args):
            self._say_once(line)
        return model

    # ------------------------------------------------------------------------------------ data

    def _batch_settings(self, *, evaluating: bool) -> BatchSettings:
        return self._preparation().batches(
            self.final_objective,
            self._tokens_per_micro_batch,
            rank=self.args.process_index,
            num_ranks=self.args.world_size,
            score_rejected=True if evaluating else None,
            schedule=None if evaluating else self.schedule,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """A loader of optimizer steps, not passed through `accelerator.prepare`: it is rank-aware already."""
        if self.train_dataset is None:
            raise DataError("there is no train_dataset to train on")
        settings = self._batch_settings(evaluating=False)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        steps: StepDataset | StepStream
        if isinstance(self.train_dataset, TokenizedStream):
            steps = StepStream(
                self.train_dataset.open,
                settings,
                pairs_per_step=self.pairs_per_step,
                seed=seed,
                shuffle_buffer=self.args.shuffle_buffer,
            )
        else:
            steps = StepDataset(
                self.train_dataset,
                settings,
                pairs_per_step=self.pairs_per_step,
                seed=seed,
                drop_last=self.args.dataloader_drop_last,
                prompts=prompt_index(self.train_dataset),
            )
        return step_loader(
            steps,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """A loader of the evaluation pairs in their order; `eval_dataset` names one of ours, or is data."""
        if (
            isinstance(eval_dataset, str)
            and isinstance(self.eval_dataset, dict)
            and eval_dataset in self.eval_dataset
        ):
            eval_dataset = self.eval_dataset[eval_dataset]
        pairs: Any = self.eval_dataset if eval_dataset is None else self._read(eval_dataset)
        if pairs is None:
            raise DataError("there is no eval_dataset to evaluate on")
        settings = self._batch_settings(evaluating=True)
        return step_loader(
            StepDataset(
                pairs, settings, pairs_per_step=EVALUATION_BLOCK * self.args.world_size, shuffle=False
            )
        )

    def _read(self, rows: Any) -> TokenizedDataset:
        """Read rows that were given to be evaluated, and say what became of them."""
        is_named = self._evaluated_set not in (None, GIVEN_ROWS)
        name = evaluation_name(str(self._evaluated_set) if is_named else "")
        tokenizer, stops = text_tokenizer(self.processing_class), stop_token_ids(self.model)
        with _shown(self.args):
            read = read_pairs(rows, self.args, tokenizer, stop_tokens=stops, name=name)
        for line in read.lines():
            say(line)
        if number := num_embeddings(self.model):
            check_token_ids(read.pairs, number, text_tokenizer(self.processing_class))
        return read.pairs

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader[Any]:
        """The same, for `predict`."""
        return self.get_eval_dataloader(test_dataset)

    @functools.cached_property
    def reference(self) -> Reference:
        """What the reference of DPO says of the run's pairs, where there is one."""
        return Reference(self.args, self.schedule.reference_start)

    def _evaluation_sets(self) -> list[Any]:
        return list(
            self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        )

    def _ask_reference(self, step: int) -> None:
        """Have the model as it is before a stage that needs a reference score every set, once it is there.

        Args:
            step: Optimizer steps that the model has made.
        """
        if not self.reference.is_due(step):
            return
        self._preparation()
        if callable(getattr(self.optimizer, "eval", None)):
            self.optimizer.eval()  # of optimizers whose weights while training are not those of the model
        settings = self._batch_settings(evaluating=True)
        model = self._model_for_evaluation() if self.accelerator._models else self.model

        def score_pairs(pairs: Sequence[TokenizedPair]) -> PairScores:
            step = build_step(pairs, range(len(pairs)), settings)
            return self._score_steps([step], len(pairs), model)

        with _shown(self.args), self.stopwatch.paused(), self._on_its_device():
            self.reference.ask(self.model, [self.train_dataset, *self._evaluation_sets()], score_pairs)

    @contextlib.contextmanager
    def _on_its_device(self) -> Iterator[None]:
        """With the model where it computes; one that is to be sharded is on the CPU until then."""
        home = self.model.device
        if home == self.args.device:
            yield
            return
        self.model.to(self.args.device)
        yield
        self.model.to(home)

    def num_examples(self, dataloader: DataLoader[Any]) -> int:
        """Pairs behind a loader, whose items are steps."""
        steps = dataloader.dataset
        return (
            len(steps.pairs) if isinstance(steps, StepDataset) else self.args.max_steps * self.pairs_per_step
        )

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Pairs of one optimizer step."""
        return self.pairs_per_step

    # ------------------------------------------------------------------------------------ a step

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Run the micro-batches of one optimizer step, forward and backward.

        Returns:
            The step's loss as the Trainer expects it: its mean over the ranks is the loss.
        """
        step: Step = inputs["step"]
        self._stream.check(step, force=self.args.force)
        self._begin_stage()
        self.window.objective = step.objective
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        losses = self._run_batches(model, step)
        loss = torch.stack(losses).sum()
        self.window.add_step(
            loss - self._router_loss, step.num_tokens, self.args.world_size, self._router_loss
        )
        return loss * int(self.args.world_size)

    def _begin_stage(self) -> None:
        """Ask the reference of the stage that this step is of; say which it is, where it is another one."""
        step, stages = self.state.global_step, self.schedule.stages
        self._ask_reference(step)
        stage = self.schedule.at(step)
        if len(stages) > 1 and stage is not self._stage:
            say(f"step {step + 1}: stage {stages.index(stage) + 1} of {len(stages)}, {stage.name}")
            if step in self.schedule.starts:
                self.recorder.stage_began(step, self.state.epoch or 0.0, stage.name)
        self._stage = stage

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a line of training numbers; dashboards see TRL's names for them too."""
        of_training = self._evaluated_set is None and "train_runtime" not in logs
        if of_training and "loss" in logs:
            means = self.window.close(self._reduce)
            means["tokens_per_second"] = means["tokens"] / self.stopwatch.restart()
            logs |= means | {"peak_memory": peak_memory(self.args.device)}
        if of_training:
            figures = {name: Figure(value) for name, value in logs.items() if is_number(value)}
            self.recorder.trained(self.state.global_step, self.state.epoch or 0.0, figures)
            logs |= trl_names(logs, self.window.objective)
        super().log(logs, start_time)

    # ------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate on each of the run's sets, or on what is given; every set has a record of its own.

        Args:
            eval_dataset: Rows, tokenized pairs, the name of one of the run's sets, or a dict of rows by name.
            ignore_keys: Not used.
            metric_key_prefix: Of the names returned.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(given, dict):
            found: dict[str, float] = {}
            for name, rows in given.items():
                prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
                found |= self._evaluate_set(str(name), rows, prefix)
            return found
        name = given if isinstance(given, str) else "" if eval_dataset is None else GIVEN_ROWS
        return self._evaluate_set(name, given, metric_key_prefix)

    @property
    def _own_sets(self) -> Collection[str]:
        """Names of the run's evaluation sets."""
        return self.eval_dataset if isinstance(self.eval_dataset, dict) else [""]

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        """Evaluate while training; what is there at step 0 may turn out to be the best checkpoint."""
        self._ask_reference(self.state.global_step)
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        chooses = self.args.load_best_model_at_end and self.can_choose(metrics)
        if self.state.global_step == 0 and chooses:
            self._determine_best_metric(metrics=metrics, trial=trial)
            self._save_checkpoint(self.model_wrapped, trial)
        return metrics

    def can_choose(self, metrics: dict[str, float]) -> bool:
        """Whether an evaluation may be the best one: not where that depends on a reference yet to come.

        Raises:
            ConfigError: It lacks the metric that is to choose.
        """
        chooser = self.args.metric_for_best_model
        if chooser is None or choosing_metric(self.args) in metrics:
            return True
        if metrics and not self.reference.is_awaited:
            found = ", ".join(name.removeprefix(flat_name("")) for name in metrics)
            raise ConfigError(f"metric_for_best_model: {chooser!r} is none of an evaluation's: {found}")
        return False

    def _evaluate_set(self, name: str, rows: Any, prefix: str) -> dict[str, float]:
        self._evaluated_set = name
        try:
            return super().evaluate(rows, metric_key_prefix=prefix)
        finally:
            self._evaluated_set = None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Score every pair once, and average over pairs."""
        with self.stopwatch.paused():
            scores = self._score(dataloader)
        pairs: Any = dataloader.dataset
        results = PairResults.of(self.reference.beside(scores, pairs.pairs), pairs.pairs)
        figures = dict(results.figures(self.final_objective))
        ours = {name: figure.mean for name, figure in figures.items()}
        chosen, rejected = scores.chosen_logprob_P.numpy(), scores.rejected_logprob_P.numpy()
        rejected = np.where(scores.has_rejected_P.numpy(), rejected, np.nan)
        predictions, labels = np.stack([chosen, rejected], 1), np.zeros(len(chosen), dtype=np.int64)
        custom = self._custom_metrics(
            EvalPrediction(predictions=predictions, label_ids=labels), metric_key_prefix
        )
        figures |= {name: Figure(value) for name, value in custom.items() if is_number(value)}
        if self._evaluated_set is not None:
            epoch = self.state.epoch or 0.0
            self.recorder.evaluated(self.state.global_step, epoch, self._evaluated_set, len(chosen), figures)
            if self._evaluated_set in self._own_sets:
                self._pair_log.evaluated(self.args, self.state, self._evaluated_set, results)
        named = {f"{metric_key_prefix}_{name}": value for name, value in custom.items()}
        for name, value in trl_names(ours, self.final_objective).items():
            named.setdefault(f"{metric_key_prefix}_{name}", value)
        return EvalLoopOutput(
            predictions=predictions,
            label_ids=labels,
            metrics=flat(figures, metric_key_prefix) | named,
            num_samples=len(chosen),
        )

    def _custom_metrics(self, predictions: EvalPrediction, prefix: str) -> dict[str, Any]:
        """What `compute_metrics` finds, without the prefix that it may have put in front."""
        if self.compute_metrics is None:
            return {}
        found = denumpify_detensorize(self.compute_metrics(predictions))
        if not isinstance(found, Mapping):
            raise ConfigError(
                f"compute_metrics gave {found!r}; expected a mapping of names to numbers, or {{}}"
            )
        found = {name: _item(value) for name, value in found.items()}
        custom = {str(name).removeprefix(f"{prefix}_"): value for name, value in found.items()}
        for name, value in custom.items():
            if not is_number(value):
                self._say_once(f"compute_metrics: {name!r} is no number, so it is not recorded")
            elif is_ours(name):
                self._say_once(f"compute_metrics: {name!r} replaces the metric of that name")
        return custom

    def _score(self, dataloader: DataLoader[Any]) -> PairScores:
        """Scores of all pairs of a loader, in the order of the data, the same on every rank."""
        self.callback_handler.eval_dataloader = dataloader
        total = self.num_examples(dataloader)

        def advance(num_pairs: int) -> None:
            self.cut_off()
            self._progress.scored(num_pairs * self.args.world_size, total)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

        steps = (item["step"] for item in dataloader)
        return self._score_steps(steps, total, self._model_for_evaluation(), advance)

    def _score_steps(
        self, steps: Iterable[Step], total: int, model: Any, progress: Callable[[int], None] | None = None
    ) -> PairScores:
        return score(
            model,
            steps,
            total,
            device=self.args.device,
            precision=self.accelerator.autocast,
            reduce=self._reduce,
            progress=progress,
        )

    def _model_for_evaluation(self) -> Any:
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self.accelerator._models:
            raise RunError(
                "a model is sharded together with its optimizer, so evaluate() has to come after train();"
                " eval_on_start: true evaluates before the first step"
            )
        return self.model_wrapped if self.is_deepspeed_enabled else self.model

    # ------------------------------------------------------------------------------------ never lose work

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C save a checkpoint after the current step and return.

        Args:
            resume_from_checkpoint: True for the newest whole checkpoint of the run directory, or a folder.
            trial: Of a hyperparameter search.
            ignore_keys_for_eval: Not used.

        Raises:
            RunError: The checkpoint is damaged or of another recipe, the loss is not finite, the disk is
                full.
        """
        models = [self.args.model_name_or_path, self.args.adapter_name_or_path]
        check_output_dir(str(self.args.output_dir), models)
        with contextlib.ExitStack() as stack:
            checkpoint = first_rank_decides(
                self.args, lambda: self._take_directory(stack, resume_from_checkpoint)
            )
            return self._train_from(checkpoint, trial, ignore_keys_for_eval)

    def _train_from(
        self, checkpoint: Path | None, trial: Any, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput:
        self.stopped_by = None
        if self.args.optimizer_in_backward and self.args.device.type == "cpu":
            give_back_what_is_freed()
        set_seed(self.args.seed)  # nothing done before, an evaluation or another run, may change this one
        settings: dict[str, Any] = {}
        state: dict[str, Any] = {} if checkpoint is None else read_state(checkpoint)
        before, forces = state.get("run"), self.args.force and checkpoint is not None
        self.forced = (
            check_changes(Path(checkpoint or ""), before, self._identity, force=True) if forces else []
        )
        again = self.args.ignore_data_skip and checkpoint is not None
        if again:
            say("ignore_data_skip: the data begins again; this run will not equal one that was not stopped")
        self._stream = StreamCheck(None if again else state.get("read"))
        self.window.restore(state.get("window"))
        self.evaluation_waits = bool(state.get("evaluation_waits"))
        if checkpoint is not None:
            if self.args.tokens_per_micro_batch is None:  # another budget would round differently
                self._tokens_per_micro_batch = state.get(
                    "tokens_per_micro_batch", self._tokens_per_micro_batch
                )
            settings["eval_on_start"] = self.evaluation_waits
        step = checkpoint_step(checkpoint or Path())
        sets = [self.train_dataset, *self._evaluation_sets()]
        self.reference.restore(state.get("reference", ""), step, sets)
        self._ask_reference(0)
        self._stage = None
        with self.stop_signal.caught(), changed(self.args, **settings):
            self.stopwatch.restart(state.get("window_seconds", 0.0))
            try:
                return super().train(
                    None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval
                )
            finally:
                self._progress.close()
                self._say_what_streamed()

    def _say_what_streamed(self) -> None:
        """What became of the rows of a stream, which only now are counted."""
        stream = self.train_dataset
        if isinstance(stream, TokenizedStream) and stream.counts.total and self.args.should_log:
            for line in stream.counts.lines():
                say(f"train, all that was streamed: {line}")

    def _take_directory(self, stack: contextlib.ExitStack, resume: str | bool | None) -> Path | None:
        """Keep others out of the run directory, clear it up, and find the checkpoint to resume from."""
        run = RunDirectory(Path(str(self.args.output_dir)))
        stack.enter_context(held(run.path))
        remove_unfinished(run.path)
        put_damaged_aside(run)
        if not resume:
            return None
        checkpoint = last_checkpoint(run.path) if resume is True else Path(resume)
        if checkpoint is None:
            raise RunError(f"{run.path}: there is no whole checkpoint to resume from")
        problem = checkpoint_problem(checkpoint)
        if problem is not None:
            raise RunError(f"{checkpoint}: cannot resume, {problem}; take an earlier checkpoint")
        if not self.args.force:
            check_changes(checkpoint, read_state(checkpoint).get("run"), self._identity)
        return checkpoint

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load as the Trainer does, and also what has other names in the file."""
        if not self._loads_renamed(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load as the Trainer does, and also what has other names in the file."""
        if not self._loads_renamed(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    def _loads_renamed(self, folder: str) -> bool:
        is_whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        return is_whole and load_renamed(self.model, Path(folder))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, but into a folder that is renamed when whole; then delete old ones."""
        run = RunDirectory(Path(self._get_output_dir(trial)))
        target = run.checkpoint(self.state.global_step)
        window = self.window.fold(self._reduce)
        with (
            self.stopwatch.paused(),
            written_whole(
                target, is_writer=self.args.should_save, wait=self.accelerator.wait_for_everyone
            ) as folder,
        ):
            with (
                changed(self.args, output_dir=str(folder.parent), push_to_hub=False),
                # The manifest has a longer checksum of each file; the archive's own takes more time.
                changed(serialization.save, compute_crc32=False),
            ):
                super()._save_checkpoint(model, None)
            best = (
                None if self.state.best_global_step is None else run.checkpoint(self.state.best_global_step)
            )
            if best is not None and (best == target or best.is_dir()):
                self.state.best_model_checkpoint = str(best)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                write_state(
                    folder,
                    {
                        "window": window,
                        "window_seconds": self.stopwatch.seconds,
                        "run": self._identity,
                        "read": self._stream.read,
                        "reference": self.reference.name_at(self.state.global_step),
                        "recipe": self._recipe,
                        "tokens_per_micro_batch": self._tokens_per_micro_batch,
                        "evaluation_waits": self.evaluation_waits,
                    },
                )
        if self.args.should_save:
            rotate_checkpoints(
                str(run.path),
                self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(target))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Say what a checkpoint lacks; a weight that is tied to another is not stored there twice."""
        tied = getattr(base_model(self.model), "all_tied_weights_keys", {})
        load_result.missing_keys[:] = [name for name in load_result.missing_keys if name not in tied]
        super()._issue_warnings_after_load(load_result)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights or adapter, tokenizer and template; with a model card unless in a checkpoint.

        In the run directory, the weights of a run that has ended are marked as its result.
        """
        if _internal_call:
            self._write_model(output_dir)
            return
        folder, run = Path(output_dir or str(self.args.output_dir)), self.recorder.run
        with written_into(
            folder, is_writer=self.args.should_save, wait=self.accelerator.wait_for_everyone
        ) as unfinished:
            self._write_model(str(unfinished))
        is_result = folder == run.path and self.state.global_step > 0
        if is_result:
            self.recorder.saved(self.state.global_step, self.state.epoch or 0.0, self.model_step)
        self.create_model_card(output_dir=output_dir)
        if is_result and self.stopped_by is None and self.is_world_process_zero():
            mark_finished(run)
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, output_dir: str | None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        with _no_bars():
            super().save_model(str(folder), _internal_call=True)
        if self.args.should_save and is_adapter(folder):
            save_generation_config(folder, self.model)
            save_base_weights(folder, self.model)

    @property
    def model_step(self) -> int:
        """The step whose weights the model has: after training the best one, where it ends with that."""
        best = self.state.best_global_step
        if best is None or not self.args.load_best_model_at_end or self.stopped_by is not None:
            return int(self.state.global_step)
        return int(best)

    def is_evaluated(self) -> bool:
        """Whether the weights that the model has were evaluated."""
        name = flat_name("loss", next(iter(self._own_sets)))
        return any(line.get("step") == self.model_step and name in line for line in self.state.log_history)

    def create_model_card(self, *args: Any, output_dir: str | None = None, **kwargs: Any) -> None:
        """Write README.md next to the model."""
        if not self.is_world_process_zero():
            return
        results = [
            (
                f"{metric_named(name).title}{f', {record.set}' if record.set else ''}",
                str(write_figure(name, figure)),
            )
            for record in self.recorder.evaluations(self.model_step)
            for name, figure in record.metrics.items()
        ]
        folder = Path(output_dir or str(self.args.output_dir))
        write_model_card(folder, self._recipe, results, self.model_step)


# ---------------------------------------------------------------------------------------- callbacks


class _EpochOrder(TrainerCallback):
    """Gives each epoch its order; a callback, since the loader of a resumed epoch shares only the steps.

    Epochs are counted, since another callback may end one early.
    """

    _epoch: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._epoch = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = kwargs["train_dataloader"].dataset
        if not isinstance(steps, StepDataset):
            return
        whole, within = divmod(state.global_step, len(steps))
        resumed = within if self._epoch is None else 0
        self._epoch = whole if self._epoch is None else self._epoch + 1
        steps.set_epoch(self._epoch, state.global_step - resumed)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ended = control.should_epoch_stop and not control.should_training_stop
        if ended and isinstance(kwargs["train_dataloader"].dataset, StepDataset):
            say(
                f"step {state.global_step}: a callback ended the epoch early; a run that resumes after it"
                " counts epochs by steps, and will not equal this one"
            )


class _StageEnds(TrainerCallback):
    """Asks for a line of the log where a stage ends, so that none is of two objectives."""

    def __init__(self, trainer: ORPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        starts = self.trainer.schedule.starts
        if args.logging_strategy != IntervalStrategy.NO and state.global_step in starts:
            control.should_log = True


def _item(value: Any) -> Any:
    """An array without dimensions as its number; any other value as it is."""
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """Without the bars that transformers draws for each file it writes."""
    shown = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.logging.enable_progress_bar()
