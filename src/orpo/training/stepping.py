"""A `transformers.Trainer` whose step is several micro-batches, none of which can pass unseen.

Ranks exchange gradients in the last one. A micro-batch that does not fit into memory is split, and a loss or
gradient that is not a number stops the run before it moves a weight, with the rows that it comes from.
"""

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType  # type: ignore[import-untyped]
from torch import Tensor, nn

from orpo.console import say
from orpo.engine.head import Denominators
from orpo.engine.metrics import MetricWindow
from orpo.engine.packing import PackedBatch
from orpo.engine.steps import BatchSettings, Step, split_batches
from orpo.errors import RunError, first_line
from orpo.training.in_backward import Norms, gradient_norm, stepping_in_backward
from orpo.training.interruptible import InterruptibleTrainer
from orpo.training.reference import Reference


class SteppingTrainer(InterruptibleTrainer):
    """What a trainer needs to run the micro-batches of an optimizer step.

    Attributes:
        window: Numbers of the steps since the last line of the log.
    """

    model: Any
    train_dataset: Any
    window: MetricWindow
    _tokens_per_micro_batch = 0
    _moved: Norms
    _printed: frozenset[str] = frozenset()

    @property
    @abstractmethod
    def reference(self) -> Reference:
        """What the reference of DPO says of the run's pairs, where there is one."""

    @abstractmethod
    def _batch_settings(self, *, evaluating: bool) -> BatchSettings:
        """How pairs become micro-batches."""

    def _run_batches(self, model: nn.Module, step: Step) -> list[Tensor]:
        """Run all micro-batches; where one does not fit into memory, start again with each split in two."""
        self._last_step = step
        self._moved = {}
        if self.args.optimizer_in_backward and len(step.batches) > 1:
            self._say_once(
                "optimizer_in_backward: a step of several micro-batches holds its gradients until the last of"
                f" them; tokens_per_micro_batch (now {self._tokens_per_micro_batch:,}) or fewer pairs a step"
                " make it one"
            )
        window = self.window.copy()
        try:
            self._last_losses: list[Tensor] = []
            self._router_loss = torch.zeros((), device=self.args.device)
            for number, batch in enumerate(step.batches):
                last = number == len(step.batches) - 1
                with self._syncing(model, last=last), self._stepping(last=last):
                    self._run_batch(model, batch, step.denominators, last=last)
            return self._last_losses
        except torch.OutOfMemoryError as error:
            halves = (
                None
                if self.args.world_size > 1 or self._moved
                else split_batches(step, self._batch_settings(evaluating=False))
            )
            if halves is None:
                back = "; some weights have moved, so go back to the last checkpoint" if self._moved else ""
                raise RunError(
                    f"step {self.state.global_step + 1}: out of memory ({first_line(error)});"
                    f" lower tokens_per_micro_batch or max_length, or set gradient_checkpointing: true{back}"
                ) from error
        # Gradients of micro-batches that did fit, or of half a backward, are dropped with everything else.
        self.window = window
        model.zero_grad()
        torch.cuda.empty_cache()
        say(
            f"step {self.state.global_step + 1}: out of memory;"
            " retrying with micro-batches of half as many pairs"
        )
        return self._run_batches(model, halves)

    def _run_batch(
        self, model: nn.Module, batch: PackedBatch, denominators: Denominators, *, last: bool
    ) -> None:
        """Forward and backward of one micro-batch, whose share of the step's loss is noted."""
        with self.compute_loss_context_manager():
            batch = self.reference.attached(batch, self.train_dataset)
            batch = batch.to(self.args.device, non_blocking=True)
            noise = self.args.neftune_noise_alpha
            output = model(batch=batch, denominators=denominators, noise=noise)
        self._last_losses.append(output.loss.detach())
        if last and self._steps_in_backward:
            finite = torch.isfinite(torch.stack(self._last_losses)).all()
            self._check_finite(self._reduce(finite.float()) == self.args.world_size)
        # DDP, FSDP and ZeRO average gradients over ranks; the denominators already count all of them.
        scaled = output.loss * self.args.world_size
        deepspeed = {"scale_wrt_gas": False} if self._uses_deepspeed else {}
        self.accelerator.backward(scaled, **deepspeed)
        if not batch.empty:
            self.window.add_pairs(output.pairs, batch.num_context_tokens)
        if output.router_loss is not None:
            self._router_loss += output.router_loss

    @property
    def _uses_deepspeed(self) -> bool:
        return bool(self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    @property
    def _steps_in_backward(self) -> bool:
        """Whether weights move within the last backward pass of a step, so that a check after it is late."""
        return self._uses_deepspeed or self.args.optimizer_in_backward

    def _stepping(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Let weights move in the backward pass of a step's last micro-batch, where that is asked for."""
        if not (last and self.args.optimizer_in_backward):
            return contextlib.nullcontext()
        return stepping_in_backward(self.optimizer, self._moved)

    @contextlib.contextmanager
    def _syncing(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Let ranks exchange gradients in the last micro-batch of a step only, unless weights are sharded.

        A rank that shards its weights and did not exchange would hold the gradients of all weights, whole.
        """
        self.accelerator.gradient_state._set_sync_gradients(last)
        every = last or self._uses_deepspeed or self.is_fsdp_enabled
        with contextlib.nullcontext() if every else self.accelerator.no_sync(model):
            yield

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm; stops where it, or the loss, is not finite, before the optimizer moves."""
        norm = super()._get_grad_norm(model, gradient_norm(model, self._moved) if self._moved else grad_norm)
        finite = torch.isfinite(torch.stack(self._last_losses)).all()
        skips_by_itself = self.accelerator.scaler is not None  # float16 begins with infinite gradients
        if norm is not None and not skips_by_itself:
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded model
            finite = finite & torch.isfinite(torch.as_tensor(norm, device=finite.device)).all()
        # A step within the backward is taken: the losses were checked before it, the gradient could not be.
        self._check_finite(finite, norm, after_the_step=self._steps_in_backward)
        return norm

    def _check_finite(self, finite: Tensor, norm: Any = None, *, after_the_step: bool = False) -> None:
        if not finite.item():
            size = "" if norm is None else f" (gradient norm {float(norm)})"
            weights = "go back to the last checkpoint" if after_the_step else "no weight was changed"
            raise RunError(
                f"step {self.state.global_step + 1}: the loss or its gradient is not finite{size};"
                f" {weights}. {self._guilty_pairs()}. Look at these rows, or lower learning_rate."
            )

    def _guilty_pairs(self) -> str:
        """Where this rank's pairs in micro-batches without a finite loss come from; else all of its pairs."""
        step = self._last_step
        bad = [p for p, loss in zip(step.pairs, self._last_losses, strict=True) if not torch.isfinite(loss)]
        sources = [pair.source for pairs in bad or step.pairs for pair in pairs]
        more = f" and {len(sources) - 8} more" if len(sources) > 8 else ""
        which = "Rows" if bad else "All rows"
        return f"{which} of rank {self.args.process_index}: {', '.join(sources[:8])}{more}"

    def _reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks."""
        summed: Tensor = self.accelerator.reduce(tensor, "sum")
        return summed

    @functools.cached_property
    def _weights_that_multiply(self) -> int:
        count: int = self.model.num_parameters(exclude_embeddings=True)
        return count

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Operations of a step of this rank as transformers counts them: six a token and weight."""
        step: Step = inputs["step"]
        return 6 * step.num_tokens * self._weights_that_multiply

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Count the tokens that all ranks have read in a step, for `include_num_input_tokens_seen`."""
        if self.args.include_num_input_tokens_seen != "no":
            read = torch.tensor(inputs["step"].num_tokens, device=self.args.device)
            self.state.num_input_tokens_seen += int(self._reduce(read))

    def _say_once(self, line: str) -> None:
        if line not in self._printed:
            self._printed |= {line}
            say(line)
