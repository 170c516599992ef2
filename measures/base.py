"""What a measure is: a property of a network on fixed images, without Lightning."""

import copy
import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import torch
from torch import Tensor, distributed, nn
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from robust_flatness.functional.attack import PGD, Precision
from robust_flatness.functional.checks import (
    Eps,
    check_choice,
    check_count,
    check_examples,
    check_radius,
)
from robust_flatness.functional.evaluation import evaluation_context, to_float64
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.functional.memory import smaller_batches
from robust_flatness.functional.noise import Norm
from robust_flatness.functional.robust_loss import AttackedSet, KnownLosses, LossKind
from robust_flatness.functional.worst_case_flatness import Sharing

Result = TypeVar("Result")
Split = Literal["train", "val", "test"]
DEFAULT_EPS = 8 / 255


def _nothing(count: int = 1) -> None:
    pass


@contextmanager
def no_progress(text: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows nothing."""
    yield _nothing


@dataclass(frozen=True)
class Examples:
    """The images that a measure looks at: a whole set, or the share of one process.

    Attributes:
        images: `(N, C, H, W)`, floating point, in [0, 1].
        labels: Class indices `(N,)`.
        indices: Global index of each image in the measured set. A share consists of whole chunks
            by global index, and may be empty.
        progress: Called after each attack on each batch, or with the number of images.
        sharing: How other processes take part in a perturbation that all images share; None if
            there are no others.
        known: Losses of these images that are known of the network, which measures add to; None if
            nothing is kept. A measure that perturbs weights must not use it meanwhile.
    """

    images: Tensor
    labels: Tensor
    indices: Sequence[int]
    progress: Callable[..., None] = _nothing
    sharing: Sharing | None = None
    known: KnownLosses | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Examples":
        """Returns the first `count` images, or all; losses of all images are not known of them."""
        if count is None or count >= len(self):
            return self
        images, labels, indices = self.images[:count], self.labels[:count], self.indices[:count]
        return Examples(images, labels, indices, self.progress, self.sharing)


@dataclass(kw_only=True)
class Measure(ABC):
    """A property of a network on fixed images, as a plain object.

    Called with a network, images and labels, a measure returns a dataclass. Callbacks say when and
    on which images: `callbacks.EpochMeasure` every few epochs, `callbacks.FinalEvaluation` at the
    end. A new measure is one file, a subclass with `measure`, `metric_names` and `values`, and one
    line in `callbacks.final_evaluation.EXTRAS`.

    Args:
        batch_size: Number of images measured at once, and the unit that processes share out.
        seed: Seed of all random numbers. They belong to (seed, purpose, index of the image), so
            that a value depends neither on `batch_size`, up to rounding, nor on the number of
            processes.

    Attributes:
        moves_weights: Whether it perturbs weights, so that a network must have some that can be.
        whole_set: Whether each process measures all images, and the first one's result counts.
            Otherwise each measures a share.
        counts_images: Whether its progress advances for each image, not for each batch.
        common_fields: Names of tensors in the result that have no values for single images. The
            last dimension of all others is the images.

    Raises:
        ValueError: If an argument is out of range.
    """

    batch_size: int = 128
    seed: int = 0
    moves_weights: ClassVar[bool] = False
    whole_set: ClassVar[bool] = False
    counts_images: ClassVar[bool] = False
    common_fields: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_count("batch_size", self.batch_size, low=1)
        for field in dataclasses.fields(self):
            value, parts = getattr(self, field.name), get_args(field.type)
            for kind in parts if type(None) in parts else [field.type]:
                if get_origin(kind) is Literal and value is not None:
                    check_choice(field.name, value, get_args(kind))

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Any:
        """Measures a network outside of a training, and leaves it as it was.

        Args:
            network: Maps images in [0, 1] to logits `(N, K)`.
            images: `(N, C, H, W)` in [0, 1].
            labels: True classes `(N,)`.

        Returns:
            The result, with tensors in float64, or bool, on the CPU.

        Raises:
            ValueError: If pixels or shapes are not as above.
        """
        check_examples(images, labels)
        with smaller_batches(type(self).__name__), evaluation_context(network):
            examples = Examples(images, labels, range(len(labels)))
            return self.measure_set(network, examples, Processes())

    def measure_set(self, network: nn.Module, examples: Examples, processes: "Processes") -> Any:
        """Measures a set of images together with other processes, all of which call this."""
        if self.whole_set:
            return processes.agree(self.measure(network, processes.moved(examples)))
        return processes.share_out(
            partial(self.measure, network),
            examples,
            chunk=self.batch_size,
            progress=self.progress,
            counts_images=self.counts_images,
            common_fields=self.common_fields,
        )

    def measure(self, network: nn.Module, examples: Examples) -> Any:
        """Measures a network that is in eval mode, with gradients allowed.

        Args:
            network: Maps images in [0, 1] to logits `(N, K)`.
            examples: The images.

        Returns:
            A dataclass.
        """
        raise NotImplementedError

    @abstractmethod
    def metric_names(self, split: str) -> tuple[str, ...]:
        """Logged names of `values` for the images of a split."""

    @abstractmethod
    def values(self, result: Any) -> tuple[float | None, ...]:
        """Numbers of the result for a whole set, in the order of `metric_names`.

        None is a number that is not defined, such as a mean over no images: it is not logged.
        """

    def metrics(self, result: Any, split: str) -> dict[str, float]:
        """The defined values of a result by logged name."""
        pairs = zip(self.metric_names(split), self.values(result))
        return {name: value for name, value in pairs if value is not None}

    def arrays(self, result: Any, split: str) -> dict[str, Tensor]:
        """Values `(N,)` of single images by name, for `examples.npz`."""
        return {}

    @property
    def progress(self) -> tuple[str, int]:
        """Text of the progress bar, and how often it advances for each batch; 0 shows none."""
        return type(self).__name__, 0

    def passes(self) -> tuple[int, int] | None:
        """Forward and backward passes of each image; None if unknown before measuring."""
        return None

    def check(self, network: nn.Module, images: Tensor, num_classes: int) -> None:
        """Raises a ValueError if it does not work with this network or such images."""
        if self.moves_weights:
            perturbed_parameters(network)

    def with_default_eps(self, eps: float) -> "Measure":
        """Returns a measure with the radius of the data, if this one attacks and has none.

        Raises:
            ValueError: If `eps` is out of range.
        """
        if getattr(self, "eps", eps) is not None:
            return self
        measure: Any = copy.copy(self)
        check_radius("data.eps", eps, measure.norm)
        measure.eps = eps
        return measure


@dataclass(kw_only=True)
class AttackMeasure(Measure):
    """A measure that attacks images by PGD.

    Args:
        eps: Radius of the attack, such as 8/255, at most 1 with `linf`; None takes `eps` of the
            datamodule, or 8/255.
        steps: Number of steps of the attack.
        step_size: Length of a step; None takes `eps · 0.007 / (8/255)`, the paper's 0.007 at 8/255.
        norm: `linf` or `l2`.
        restarts: Number of restarts of the attack.
        precision: `float32`, or `bfloat16` to search adversarial examples in bfloat16 on GPUs that
            have it. Losses and predictions are computed in float32 in both cases.
        fold_batch_norm: Whether the attack computes BatchNorm with the convolution before it, see
            `functional.attack.PGD`. Worst-case ascent does not.
    """

    eps: Eps | None = None
    steps: int = 10
    step_size: Eps | None = None
    norm: Norm = "linf"
    restarts: int = 1
    precision: Precision = "float32"
    fold_batch_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("restarts", self.restarts, low=1)
        _ = self.pgd  # Checks the rest.

    @property
    def pgd(self) -> PGD:
        """The attack."""
        eps = DEFAULT_EPS if self.eps is None else self.eps
        how = {"precision": self.precision, "fold_batch_norm": self.fold_batch_norm}
        return PGD(eps, self.steps, self.step_size, self.norm, **how)  # type: ignore[arg-type]

    @property
    def own_arguments(self) -> dict[str, Any]:
        """Arguments that a subclass adds; those of its function in `functional`."""
        base = {field.name for field in dataclasses.fields(AttackMeasure)}
        return {name: value for name, value in _fields(self).items() if name not in base}

    def attacked(self, examples: Examples) -> AttackedSet:
        """The images of a measure with their attack, as all functions that attack take them."""
        return AttackedSet(
            examples.images,
            examples.labels,
            self.pgd,
            self.restarts,
            self.seed,
            self.batch_size,
            examples.indices,
            examples.progress,
        )

    @override
    def passes(self) -> tuple[int, int]:
        attacks, steps = self.progress[1], self.steps
        return attacks * (steps + 1), attacks * steps


@dataclass(kw_only=True)
class FixedExamplesMeasure(AttackMeasure):
    """A measure of derivatives with respect to the weights, on adversarial examples that stay.

    Images are attacked once, at the weights. Derivatives are of the mean loss, so that each process
    computes on all images.

    Args:
        loss: `robust`, or `clean` for the images themselves.
    """

    loss: LossKind = "robust"
    moves_weights = True
    whole_set = True

    def adversarial(self, network: nn.Module, examples: Examples) -> Tensor:
        """The images that are differentiated at, `(N, C, H, W)`."""
        attacked = self.attacked(examples).for_loss(self.loss)
        parts = [attacked.adversarial(network, part) for part in attacked.batches]
        return torch.cat(parts) if parts else examples.images

    @abstractmethod
    def weight_passes(self) -> tuple[int, int]:
        """Forward and backward passes of each image behind the attack; second-order ones count."""

    @override
    def passes(self) -> tuple[int, int]:
        forward, backward = self.weight_passes()
        attacks = self.restarts if self.loss == "robust" and self.steps else 0
        return attacks * (self.steps + 1) + forward, attacks * self.steps + backward


@dataclass(frozen=True)
class Processes:
    """The processes that share out a measured set, all of which hold its images.

    The set is cut into chunks by global index, which are dealt out in turn. A chunk is the same
    batch for any number of processes, and no image is counted twice.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        device: Device of the network; None leaves the images where they are.
        bar: Opens a progress bar with a text and a total, and gives the function that advances it.

    Example:
        >>> Processes(0, 2).indices(5, chunk=2), Processes(1, 2).indices(5, chunk=2)
        ([0, 1, 4], [2, 3])
    """

    rank: int = 0
    size: int = 1
    device: torch.device | None = None
    bar: Callable[[str, int], AbstractContextManager[Callable[..., None]]] = no_progress

    def indices(self, count: int, chunk: int) -> list[int]:
        """Global indices of the images of this process."""
        starts = range(self.rank * chunk, count, self.size * chunk)
        return [index for start in starts for index in range(start, min(start + chunk, count))]

    def moved(self, examples: Examples) -> Examples:
        """The examples on the device of the network."""
        if self.device is None:
            return examples
        images, labels = examples.images.to(self.device), examples.labels.to(self.device)
        return dataclasses.replace(examples, images=images, labels=labels)

    def share_out(
        self,
        measure: Callable[[Examples], Result],
        examples: Examples,
        *,
        chunk: int,
        progress: tuple[str, int],
        counts_images: bool = False,
        common_fields: Sequence[str] = (),
    ) -> Result:
        """Measures each image on one process and gives the whole result to all.

        Each process fills its columns of a table of zeros and the tables are added, which is exact.
        What is averaged afterwards is averaged in one order for any number of processes.

        Args:
            measure: Maps the share of a process to a dataclass.
            examples: The whole set.
            chunk: Number of images in a chunk.
            progress: See `Measure`.
            counts_images: See `Measure`.
            common_fields: See `Measure`.

        Returns:
            The dataclass for the whole set, with tensors in float64, or bool, on the CPU.
        """
        count, mine = len(examples), self.indices(len(examples), chunk)
        sharing = None
        if self.size > 1:
            sharing = Sharing(math.ceil(count / (chunk * self.size)), self._gather)
        text, attacks = progress
        parts = len(mine) if counts_images else math.ceil(len(mine) / chunk)
        with self.bar(text, parts * attacks) as advance:
            images, labels = examples.images[mine], examples.labels[mine]
            share = self.moved(Examples(images, labels, mine, advance, sharing, examples.known))
            result = measure(share)
        whole = {}
        for name, value in _fields(result).items():
            if isinstance(value, Tensor) and name not in common_fields:
                numbers = to_float64(value)
                table = numbers.new_zeros(*value.shape[:-1], count)
                table[..., mine] = numbers
                if self.size > 1:
                    distributed.all_reduce(table)
                whole[name] = table.cpu().bool() if value.dtype == torch.bool else table.cpu()
        return dataclasses.replace(result, **whole)  # type: ignore[type-var]

    def agree(self, result: Result) -> Result:
        """Gives all processes the numbers and tensors of the first one's result, a dataclass."""
        if self.size == 1:
            return result
        fields = _fields(result)
        # NCCL takes tensors of GPUs alone: those on the CPU go with the numbers.
        small = {name: value for name, value in fields.items() if _is_number_or_on_cpu(value)}
        self.broadcast({name: value for name, value in fields.items() if name not in small})
        received: list[Any] = [small]
        distributed.broadcast_object_list(received, src=0)
        return dataclasses.replace(result, **received[0])  # type: ignore[type-var]

    def broadcast(self, value: Any) -> None:
        """Copies the first process's tensors into those of nested containers, in place.

        There is one message for all tensors of a type.
        """
        groups: dict[Any, list[Tensor]] = {}
        for part in tree_leaves(value) if self.size > 1 else []:
            if isinstance(part, Tensor):
                groups.setdefault((part.dtype, part.device), []).append(part)
        for group in groups.values():
            flat = torch.cat([tensor.detach().flatten() for tensor in group])
            distributed.broadcast(flat, src=0)
            if self.rank == 0:
                # Writing counts as a change of a tensor, also of its own values.
                continue
            for tensor, values in zip(group, flat.split([tensor.numel() for tensor in group])):
                tensor.detach().copy_(values.view_as(tensor))

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(tensors, tensor)
        return tensors


def _is_number_or_on_cpu(value: Any) -> bool:
    on_cpu = isinstance(value, Tensor) and value.device.type == "cpu"
    return on_cpu or isinstance(value, (int, float))


def _fields(result: Any) -> dict[str, Any]:
    return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
