"""The training loop, Lightning's, that can be stopped and goes on as if it had not been; needs lightning and rich."""

import logging
import os
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from vqkernels.training.config import TrainingConfig

STOPPING = (signal.SIGINT, signal.SIGTERM)
REPORT_EVERY = 10  # steps; reading the loss waits for a GPU


def seed_step(seed: int, step: int) -> None:
    """Seeds torch's generators for a step, so that what it draws depends on nothing that came before.

    The generator of the CPU takes 32 bits: these differ for all steps of a run.
    """
    torch.manual_seed((seed * 0x9E3779B1 + step) % 2**32)


def configure_adamw(parameters: Iterator[torch.nn.Parameter], config: TrainingConfig) -> dict[str, Any]:
    """AdamW with a linear warm-up, as Lightning's `configure_optimizers` returns it.

    The rate depends on the step alone, not on the number of steps, which a resumed run may change.
    """
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (config.warmup + 1)))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(
    module: LightningModule,
    checkpoint: Path,
    *,
    steps: int,
    save_every: int,
    device: torch.device,
    resume: bool,
) -> int | None:
    """Trains until `steps` steps are done in all, or a signal asks to stop.

    From the first step on SIGINT and SIGTERM let the step end and write the checkpoint; a second one kills. Either way
    the checkpoint is that of a whole step, and a file of that name is there as a whole or not at all.

    Args:
        module: the model and its training step, which draws everything from the number of the step.
        checkpoint: path of the checkpoint, written now and then and at the end.
        steps: in all, those of the checkpoint included.
        save_every: steps between checkpoints.
        device: to train on.
        resume: go on with the checkpoint.

    Returns:
        The number of the signal that has stopped it, else None.

    Raises:
        FloatingPointError: loss or weights are not finite when a checkpoint is due, which then is not written.
        KeyboardInterrupt: SIGINT came before the first step.
    """
    saver = _Saver(checkpoint, save_every)
    with _quiet(), _restored_handlers(), _restored_determinism():
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            deterministic=True,
            callbacks=[_ProgressBar(steps), saver],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=checkpoint.parent,
        )
        try:
            trainer.fit(module, _Endless(), ckpt_path=checkpoint if resume else None, weights_only=True)
        except SystemExit as error:
            # Lightning exits with 1 on a KeyboardInterrupt, which would end the command without a word.
            if isinstance(error.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    return saver.stopped_by


class _Endless:
    """Stands for a data loader: modules draw their batches from the number of the step, so that it has no state."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class _Saver(Callback):
    """Writes checkpoints, and ends training after the step in which a signal came."""

    def __init__(self, path: Path, every: int) -> None:
        self.path, self.every = path, every
        self.stopped_by: int | None = None
        self.saved: int | None = None  # step of the checkpoint in the file

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.saved = trainer.global_step if trainer.ckpt_path else None
        # Here, after Lightning has installed its own handler, which would end training without a checkpoint.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                signal.signal(number, self._stop)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self.stopped_by:
            trainer.should_stop = True
        if self.stopped_by or step % self.every == 0 or step == trainer.max_steps:
            self._refuse_broken(step, outputs["loss"], module)
            unfinished = self.path.with_name(f".{self.path.name}.tmp")
            trainer.save_checkpoint(unfinished)
            os.replace(unfinished, self.path)
            self.saved = step

    def _refuse_broken(self, step: int, loss: Tensor, module: LightningModule) -> None:
        weights = {name: t for name, t in module.state_dict().items() if t.is_floating_point()}
        broken = None
        if not loss.isfinite():
            broken = f"the loss of step {step} is {loss.item()}"
        elif not torch.stack([t.isfinite().all() for t in weights.values()]).all():
            name = next(name for name, t in weights.items() if not t.isfinite().all())
            broken = f"the weights after step {step} are not finite, of {name} at least"
        if broken:
            kept = "nothing was saved" if self.saved is None else f"{self.path} is still that of step {self.saved}"
            raise FloatingPointError(f"{broken}; {kept}")

    def _stop(self, number: int, _: Any) -> None:
        self.stopped_by = number
        for other in STOPPING:
            signal.signal(other, signal.SIG_DFL)


class _ProgressBar(Callback):
    """Steps and loss; Lightning's own bars count epochs, of which there is one without end."""

    def __init__(self, steps: int) -> None:
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("", total=steps, loss="")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._progress.update(self._task, completed=trainer.global_step)
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._progress.update(self._task, completed=trainer.global_step)
        if trainer.global_step % REPORT_EVERY == 0:
            self._progress.update(self._task, loss=f"loss {outputs['loss'].item():.4f}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._progress.stop()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._progress.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's announcements of hardware and products, and its advice on data loaders with workers."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning.*")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _restored_handlers() -> Iterator[None]:
    """Handlers of signals are as they were before; Lightning leaves its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.getsignal(number) for number in STOPPING]
    try:
        yield
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _restored_determinism() -> Iterator[None]:
    """Deterministic algorithms are as they were before; meanwhile fresh memory need not be filled."""
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    memory: Any = torch.utils.deterministic
    benchmark, fill = torch.backends.cudnn.benchmark, memory.fill_uninitialized_memory
    cudnn = torch.backends.cudnn.deterministic
    memory.fill_uninitialized_memory = fill and enabled
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, cudnn
