"""What a measure is: a property of a network on fixed images, without Lightning."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal, TypeVar, get_args

from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.checks import Eps, check_choice, check_count, check_radius
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.functional.layer_weights import perturbed_parameters
from robust_flatness.functional.noise import Norm
from robust_flatness.measures.processes import Examples, Processes

DEFAULT_EPS = 8 / 255
Split = Literal["train", "val", "test"]
Precision = Literal["float32", "bfloat16"]


class Measure(ABC):
    """A property of a network on fixed images, as a plain object.

    A measure is called with a network and images and returns a dataclass. Callbacks say when and
    on which images: `callbacks.EpochMeasure` every few epochs, `callbacks.FinalEvaluation` at the
    end. A new measure is one file: a subclass with `measure`, `metric_names` and `values`, and a
    line `@register("name")`, which makes it known to `FinalEvaluation(extras=["name"])`.

    The tensors of the result hold one value for each image along their last dimension, unless
    `common_fields` names them. Callbacks put the shares of all processes together.

    Args:
        batch_size: Number of images measured at once, and the unit that processes share out.
        seed: Seed of all random numbers. They belong to (seed, purpose, index of the image), so
            that a value depends neither on `batch_size`, up to rounding, nor on the number of
            processes.

    Attributes:
        moves_weights: Whether it perturbs weights, so that a network must have some that can be.
        whole_set: Whether every process measures all images, as if the others did not exist. The
            result of the first process counts.
        common_fields: Fields of the result that have no values for single images.
        protocol_arguments: Arguments that it takes from `FinalEvaluation` if it is an extra.
    """

    moves_weights: ClassVar[bool] = False
    whole_set: ClassVar[bool] = False
    common_fields: ClassVar[tuple[str, ...]] = ()
    protocol_arguments: ClassVar[tuple[str, ...]] = ("batch_size", "seed")

    def __init__(self, *, batch_size: int = 128, seed: int = 0) -> None:
        check_count("batch_size", batch_size, low=1)
        self.batch_size, self.seed = batch_size, seed

    def __call__(self, network: nn.Module, images: Tensor, labels: Tensor) -> Any:
        """Measures a network outside of a training, and leaves it as it was.

        Args:
            network: Maps images in [0, 1] to logits `(N, K)`.
            images: `(N, C, H, W)` in [0, 1].
            labels: True classes `(N,)`.

        Returns:
            The result, a dataclass.
        """
        with evaluation_context(network):
            examples = Examples(images, labels, range(len(labels)))
            return self.measure_set(network, examples, Processes())

    def measure_set(self, network: nn.Module, examples: Examples, processes: Processes) -> Any:
        """Measures a set of images together with other processes, all of which call this.

        Args:
            network: Maps images in [0, 1] to logits; the same on all processes.
            examples: The whole set.
            processes: The processes.

        Returns:
            The result for the whole set.
        """
        if self.whole_set:
            images, labels = processes.moved(examples.images, examples.labels)
            return processes.agree(
                self.measure(network, Examples(images, labels, range(len(labels))))
            )
        return processes.share_out(
            partial(self.measure, network),
            examples,
            chunk=self.batch_size,
            text=self.description,
            attacks=self.num_attacks,
            common_fields=self.common_fields,
        )

    def measure(self, network: nn.Module, examples: Examples) -> Any:
        """Measures a network that is in eval mode, with gradients allowed.

        Subclasses implement it, or `measure_set` if shares of the images are not enough.

        Args:
            network: Maps images in [0, 1] to logits `(N, K)`.
            examples: The images; a share of a process may be empty.

        Returns:
            A dataclass.
        """
        raise NotImplementedError

    @abstractmethod
    def metric_names(self, split: str) -> tuple[str, ...]:
        """Logged names of `values` for the images of a split."""

    @abstractmethod
    def values(self, result: Any) -> tuple[float | None, ...]:
        """Numbers of a result of the whole set, in the order of `metric_names`.

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
    def description(self) -> str:
        """What the progress bar says."""
        return type(self).__name__

    @property
    def num_attacks(self) -> int:
        """How often `Examples.progress` is called for each batch; 0 shows no bar."""
        return 0

    def passes(self) -> tuple[int, int] | None:
        """Forward and backward passes of each image; None if they depend on the network."""
        return None

    def check(self, network: nn.Module, images: Tensor, num_classes: int) -> None:
        """Raises if the measure does not work with this network or these images.

        Args:
            network: The network.
            images: A few of the images.
            num_classes: Number of its classes.

        Raises:
            ValueError: If it does not.
        """
        if self.moves_weights:
            perturbed_parameters(network)

    def with_default_eps(self, eps: float) -> "Measure":
        """Returns the measure with the radius of the data if it attacks and names none itself.

        Raises:
            ValueError: If `eps` is out of range.
        """
        if getattr(self, "eps", math.nan) is not None:
            return self
        filled: Any = copy.copy(self)
        check_radius("data.eps", eps, filled.norm)
        filled.eps = eps
        return filled


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
        **kwargs: Arguments of `Measure`.

    Raises:
        ValueError: If an argument is out of range.
    """

    protocol_arguments = (
        *Measure.protocol_arguments,
        "eps",
        "steps",
        "step_size",
        "norm",
        "precision",
    )

    def __init__(
        self,
        *,
        eps: Eps | None = None,
        steps: int = 10,
        step_size: Eps | None = None,
        norm: Norm = "linf",
        restarts: int = 1,
        precision: Precision = "float32",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_count("restarts", restarts, low=1)
        check_choice("precision", precision, get_args(Precision))
        self.eps, self.steps, self.step_size, self.norm = eps, steps, step_size, norm
        self.restarts, self.precision = restarts, precision
        _ = self.pgd  # Checks the other arguments.

    @property
    def pgd(self) -> PGD:
        """The attack, which keeps the iterate of highest loss."""
        eps = DEFAULT_EPS if self.eps is None else self.eps
        return PGD(eps, self.steps, self.step_size, self.norm)

    def settings(self, examples: Examples) -> dict[str, Any]:
        """Keyword arguments that the functions of `functional` share."""
        pgd = self.pgd
        return {
            "eps": pgd.eps,
            "steps": pgd.steps,
            "step_size": pgd.step_size,
            "norm": pgd.norm,
            "restarts": self.restarts,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "indices": examples.indices,
            "on_attack": examples.progress,
        }


MeasureClass = TypeVar("MeasureClass", bound=type[Measure])
# Class and fixed arguments by name.
MEASURES: dict[str, tuple[type[Measure], dict[str, Any]]] = {}


def register(name: str, **arguments: Any) -> Callable[[MeasureClass], MeasureClass]:
    """Makes a measure known to `FinalEvaluation(extras=[name])`.

    Args:
        name: A name for it.
        **arguments: Arguments that it has under this name.
    """

    def decorate(measure: MeasureClass) -> MeasureClass:
        MEASURES[name] = (measure, arguments)
        return measure

    return decorate


def registered_measure(name: str, settings: Mapping[str, Any]) -> Measure:
    """Builds a registered measure.

    Args:
        name: Its name.
        settings: Arguments by name, of which it takes its `protocol_arguments`.

    Raises:
        ValueError: If there is no such measure.
    """
    check_choice("extras", name, tuple(MEASURES))
    measure, arguments = MEASURES[name]
    taken = {key: settings[key] for key in measure.protocol_arguments if key in settings}
    return measure(**taken, **arguments)
