"""Measuring a network in the middle of training, so that training does not notice."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar, WeightAveraging
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.callbacks.fixed_images import (
    FixedImages,
    PixelInput,
    warn_of_features,
    warn_of_one_class,
)
from robust_flatness.callbacks.line_progress_bar import LineProgressBar
from robust_flatness.functional import evaluation
from robust_flatness.functional.checks import check_examples, errors_on_all_ranks
from robust_flatness.functional.memory import smaller_batches
from robust_flatness.functional.robust_loss import KnownLosses
from robust_flatness.measures.base import DEFAULT_EPS, Examples, Measure, Processes

Weights = dict[str, Tensor]

# Number of images whose logits are checked before training.
FIRST_IMAGES = 8
# The own weights of modules that hold others at the moment, averaged or early-stopped.
_OWN_WEIGHTS: WeakKeyDictionary[nn.Module, Weights] = WeakKeyDictionary()
# Lightning uses a task's number as its place in the list, so none of its tasks may move: the task
# added here is hidden between measures, not removed.
_TASKS: WeakKeyDictionary[Progress, TaskID] = WeakKeyDictionary()


@dataclass
class _Known:
    """What measures have computed of a network, and the state of it that this holds for."""

    state: evaluation.NetworkState
    losses: list[tuple[Examples, KnownLosses]] = field(default_factory=list)


# Until the next batch of training, so that what one measure has computed serves the next.
_KNOWN: WeakKeyDictionary[Trainer, _Known] = WeakKeyDictionary()


class HoldsMeasure:
    """Holds a measure. As the last base class it gets the arguments that callbacks leave over.

    Args:
        measure: What is measured.
    """

    def __init__(self, measure: Measure) -> None:
        self.measure = measure


class MeasuringCallback(FixedImages):
    """Measures a network in training, on fixed images, without touching training."""

    def prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        split: str,
        measures: Sequence[Measure],
        num_examples: int | None = None,
    ) -> None:
        """Reads the images of a split, so that what does not fit is refused before training.

        Args:
            trainer: The trainer.
            pl_module: The module to measure.
            split: The split of the images.
            measures: What will be measured.
            num_examples: The smallest number of images that a measure takes; None for all.

        Raises:
            ValueError: On all processes, if there are no images, if they do not fit the network, if
                it does not return logits, or if a measure does not work with it.
        """
        examples = self.examples(trainer, pl_module, split)
        images = examples.images[:FIRST_IMAGES].to(pl_module.device)
        network = self._network(pl_module)
        with evaluation_context(trainer, pl_module), torch.no_grad(), errors_on_all_ranks():
            logits = evaluation.first_logits(network, images)
            classes = logits.shape[1]
            check_examples(examples.images, examples.labels, classes)
            for measure in measures:
                measure.with_default_eps(data_eps(trainer)).check(network, images, classes)
        warn_of_one_class(examples.first(num_examples), classes, split)
        warn_of_features(examples, logits, split)

    def measure_split(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        split: str,
        measure: Measure,
        num_examples: int | None = None,
    ) -> Any:
        """Measures the weights that the module holds; every process gets the whole result.

        Only the first `num_examples` images are measured if it is set.
        """
        examples = self.examples(trainer, pl_module, split).first(num_examples)
        bar = partial(_progress_bar, trainer, split)
        processes = Processes(trainer.global_rank, trainer.world_size, pl_module.device, bar)
        measure = measure.with_default_eps(data_eps(trainer))
        network = self._network(pl_module)
        with smaller_batches(type(measure).__name__), evaluation_context(trainer, pl_module):
            examples = replace(examples, known=_known_losses(trainer, network, examples))
            return measure.measure_set(network, examples, processes)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        _KNOWN.pop(trainer, None)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        _KNOWN.pop(trainer, None)

    def _network(self, module: LightningModule) -> nn.Module:
        """The module as a map from pixels in [0, 1] to logits."""
        return PixelInput(module, self.normalization) if self.normalization else module


@contextmanager
def evaluation_context(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Eval mode with gradients, after which nothing in training has changed.

    Modes, weights, buffers, `.grad`, `requires_grad` and random states are restored, see
    `functional.evaluation_context`. All processes have the first one's buffers: after a step their
    BatchNorm statistics differ, and a measure must be that of one network. Forwards are in float32,
    or in float64 if the trainer's precision is 64-true.
    """
    with ExitStack() as stack:
        stack.enter_context(evaluation.evaluation_context(module))
        if trainer.precision == "64-true":
            # Forwards create tensors of the type that they have in training.
            types = torch.float64, torch.get_default_dtype()
            begin, end = (lambda *_, kind=kind: torch.set_default_dtype(kind) for kind in types)
            stack.callback(module.register_forward_pre_hook(begin).remove)
            stack.callback(module.register_forward_hook(end, always_call=True).remove)
        stack.enter_context(evaluation.full_float32(module.device))
        Processes(trainer.global_rank, trainer.world_size).broadcast([*module.buffers()])
        yield


def _known_losses(trainer: Trainer, network: nn.Module, examples: Examples) -> KnownLosses:
    """What is known of this network, exactly as it is, on these images; measures add to it."""
    known = _KNOWN.get(trainer)
    if known is None or not known.state.is_of(network):
        known = _KNOWN[trainer] = _Known(evaluation.NetworkState(network))
    for others, known_losses in known.losses:
        pairs = ((others.images, examples.images), (others.labels, examples.labels))
        if all(one is other or evaluation.equal(one, other) for one, other in pairs):
            return known_losses
    losses: KnownLosses = {}
    known.losses.append((examples, losses))
    return losses


@contextmanager
def averaged_weights(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Gives a module in training the averaged weights, and its own back bit for bit.

    Averages are those of a `WeightAveraging` callback, Lightning's or this package's, anywhere
    among the trainer's callbacks. Nothing changes outside of `fit`, before the first update, or if
    the module holds other weights already.
    """
    average = None if module in _OWN_WEIGHTS else _average(trainer, module)
    with _weights_restored(module) if average is not None else nullcontext():
        if average is not None:
            copy_weights(average, module)
        yield


def average_begun(trainer: Trainer) -> bool:
    """Returns whether averages of the weights, which checkpoints hold, are of trained weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averages = [c._average_model for c in callbacks if isinstance(c, WeightAveraging)]
    return all(average is None or average.n_averaged > 0 for average in averages)


@contextmanager
def swapped_weights(module: LightningModule, weights: Weights) -> Iterator[None]:
    """Gives a module the weights and buffers of a state dict, and its own back bit for bit.

    It may be nested, also inside `averaged_weights`: `own_weights` stay those of the module.
    """
    with _weights_restored(module):
        module.load_state_dict(weights)
        yield


def own_weights(module: nn.Module) -> Weights | None:
    """Returns a module's own weights and buffers while it holds others, else None."""
    return _OWN_WEIGHTS.get(module)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copies parameters and buffers into a module of the same structure, on any device."""
    tensors = _tensors(source)
    for name, tensor in _tensors(target).items():
        tensor.copy_(tensors[name])


def fingerprint(module: nn.Module) -> str:
    """Returns a digest of the parameters and buffers that a checkpoint holds, bit for bit."""
    digest, own = hashlib.sha256(), _tensors(module)
    for name, tensor in module.state_dict().items():
        # Other layouts have no bytes of their own.
        if name in own and tensor.layout == torch.strided:
            digest.update(name.encode())
            values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(values.numpy().data)
    return digest.hexdigest()


def is_finite(trainer: Trainer, module: LightningModule) -> bool:
    """Returns whether all weights are finite, on all processes, and no buffer holds NaN."""
    # Masks and minima begin at infinity.
    finite = all(bool(weight.isfinite().all()) for weight in module.parameters())
    finite = finite and not any(bool(buffer.isnan().any()) for buffer in module.buffers())
    # Buffers of the processes differ, and processes must decide alike.
    return bool(trainer.strategy.reduce_boolean_decision(finite))


def _average(trainer: Trainer, module: LightningModule) -> nn.Module | None:
    if trainer.state.fn != TrainerFn.FITTING or trainer.state.status != TrainerStatus.RUNNING:
        return None
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is None or average.n_averaged == 0:
            continue
        if hasattr(callback, "refresh_average"):
            callback.refresh_average(trainer, module)
        elif trainer.validating:
            # Lightning's callback has exchanged the two, and holds the module's own weights.
            return None
        return average.module
    return None


@contextmanager
def _weights_restored(module: nn.Module) -> Iterator[None]:
    tensors = _tensors(module)
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    # Inside another exchange the module's own weights are those before the outer one.
    _OWN_WEIGHTS.setdefault(module, before)
    try:
        yield
    finally:
        if _OWN_WEIGHTS.get(module) is before:
            del _OWN_WEIGHTS[module]
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(before[name])


def _tensors(module: nn.Module) -> Weights:
    """All parameters and buffers, also those that no state dict has, under all of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}


def data_eps(trainer: Trainer) -> float:
    """Returns the radius of the attack that the datamodule suggests, or 8/255.

    Raises:
        ValueError: If its `eps` is no number.
    """
    eps = getattr(getattr(trainer, "datamodule", None), "eps", None)
    try:
        return DEFAULT_EPS if eps is None else float(eps)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected `eps` of the datamodule to be a number or None but got {eps!r}."
        ) from error


def warn_if_results_stay(trainer: Trainer, callback: Callback, *attributes: str) -> None:
    """Warns if the attributes with a callback's results stay in processes that are spawned.

    Lightning brings weights and logged metrics back from `ddp_spawn` and the like, but not its
    callbacks.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(
            f"{', '.join(attributes)} of {type(callback).__name__} will be empty after training, "
            "as this strategy measures in other processes: use `ddp`, or "
            "`trainer.callback_metrics`."
        )


@contextmanager
def _progress_bar(
    trainer: Trainer, split: str, text: str, total: int
) -> Iterator[Callable[..., None]]:
    """Shows progress in a Rich bar or a line of the trainer, and yields what advances it."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, LineProgressBar) and total:
        with bar.measuring(f"{split}: {text}", total) as advance:
            yield advance
        return
    if not isinstance(bar, RichProgressBar) or not bar.is_enabled or total == 0:
        yield lambda count=1: None
        return
    # A terminal has one live display, so a running one of Lightning's is used.
    running = bar.progress if bar.progress and bar.progress.live.is_started else None
    columns = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    progress: Progress = running or Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, transient=True
    )
    if not running:
        progress.start()
    if progress not in _TASKS:
        _TASKS[progress] = progress.add_task("", total=total)
    task = _TASKS[progress]
    progress.reset(task, description=f"{split}: {text}", total=total, visible=True)
    try:
        yield lambda count=1: progress.update(task, advance=count, refresh=True)
    finally:
        progress.update(task, visible=False, refresh=True)
        if not running:
            progress.stop()
