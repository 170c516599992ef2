"""How callbacks take part in the training step of any module."""

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from robust_flatness.functional.attack import PGD, example_losses
from robust_flatness.functional.batch_noise import BatchNoise, agreed_seed
from robust_flatness.functional.checks import check_strategy, errors_on_all_ranks
from robust_flatness.functional.evaluation import to_float32

Key = int | str | None


class WrappedMethod:
    """Calls a method of one module inside of other functions, outermost that of lowest `order`.

    It is in the module's `__dict__`, as DDP looks the method up there. Copies and pickles of the
    module get the method itself.

    Args:
        module: The module.
        name: Name of the method.
    """

    def __init__(self, module: LightningModule, name: str) -> None:
        self.method = getattr(module, name)
        self.around: dict[int, Callable[..., Any]] = {}
        # Lightning reads the signature of the method, under at most one decorator.
        self.__wrapped__ = getattr(self.method, "__wrapped__", self.method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the functions, each with the next one as its first argument."""
        call = self.method
        for order in sorted(self.around, reverse=True):
            call = _call_inside(self.around[order], call)
        return call(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _itself, (self.method,)


def _call_inside(outer: Callable[..., Any], inner: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: outer(inner, *args, **kwargs)


def _itself(method: Any) -> Any:
    return method


def wrap(module: LightningModule, name: str, order: int, around: Callable[..., Any]) -> None:
    """Has `around(method, *args)` called in place of a method, until `unwrap`."""
    method = vars(module).get(name)
    if not isinstance(method, WrappedMethod):
        method = WrappedMethod(module, name)
        setattr(module, name, method)
    method.around[order] = around


def unwrap(module: LightningModule, name: str, order: int) -> None:
    """Ends `wrap`; without it nothing happens."""
    wrapped = vars(module).get(name)
    if not isinstance(wrapped, WrappedMethod):
        return
    wrapped.around.pop(order, None)
    if not wrapped.around:
        delattr(module, name)
        # torch.compile keeps a method of the instance.
        if wrapped.method != getattr(module, name):
            setattr(module, name, wrapped.method)


class TrainingStepCallback(Callback):
    """Takes part in `training_step` from the start of `fit` to its end or an exception.

    Batches are lists, tuples, named tuples or dictionaries of tensors.

    Args:
        criterion: Maps what `forward` returns and the labels of the batch to one loss for each
            example, `(N,)`; None is cross-entropy of logits `(N, K)` and class indices.
        image_key: Where a batch has its images: an index, a name, or a dictionary's key. None is
            the first place of a list or tuple.
        label_key: Where it has its labels; None is the second place.
        **kwargs: Arguments of the next base class.

    Attributes:
        order: Callbacks of lower order come first in a step, whatever their order in the trainer.
        seed: Seed of all noise, the same on all processes and after a resume.
    """

    order: ClassVar[int]

    def __init__(
        self,
        *,
        criterion: nn.Module | Callable[[Any, Tensor], Tensor] | None = None,
        image_key: Key = None,
        label_key: Key = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.criterion, self.image_key, self.label_key = criterion, image_key, label_key
        self.seed: int | None = None
        self._module: LightningModule | None = None
        self._checked = False

    def around_step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls `step` on the batch, or on another one, and returns what it returns."""
        raise NotImplementedError

    def check_images(self, images: Tensor) -> None:
        """Raises a ValueError if the images of the first batch cannot be used."""

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            check_strategy(trainer, type(self).__name__)
            self.seed, self._checked = None, False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        name = type(self).__name__
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"Expected `configure_optimizers` to return one optimizer for {name} but got "
                f"{len(trainer.optimizers)}."
            )
        if isinstance(getattr(pl_module, "pgd", None), PGD):
            raise ValueError(
                f"Expected a module that trains on clean images for {name} but got "
                f"{type(pl_module).__name__}, which attacks them itself; use its arguments, or "
                "ATAWP for weight perturbations."
            )
        self.seed = agreed_seed(trainer, self.seed)
        self._module = pl_module
        wrap(pl_module, "training_step", self.order, self._around_step)

    def _around_step(self, step: Callable[..., Any], batch: Any, *args: Any, **kwargs: Any) -> Any:
        # Once only: the check waits for the device.
        if not self._checked:
            with errors_on_all_ranks():
                self.check_images(self.images_and_labels(batch)[0])
            self._checked = True
        return self.around_step(step, batch, *args, **kwargs)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        if self._module is not None:
            unwrap(self._module, "training_step", self.order)
        self._module = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seed = state_dict["seed"]

    @property
    def trainer(self) -> Trainer:
        """The trainer, in `fit`."""
        return self.module.trainer

    @property
    def module(self) -> LightningModule:
        """The module, in `fit`."""
        assert self._module is not None
        return self._module

    @property
    def noise(self) -> BatchNoise:
        """Random numbers of the current batch."""
        return BatchNoise.of(self.trainer, self.seed or 0)

    def losses(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of each example `(N,)`, of what `forward` returns.

        Raises:
            ValueError: If the outputs are no logits and there is no criterion, or if that does not
                return a loss for each example.
        """
        if self.criterion is None:
            return example_losses(to_float32(self.logits(outputs)), labels)
        outputs = to_float32(outputs) if isinstance(outputs, Tensor) else outputs
        losses = self.criterion(outputs, labels)
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        if shape != (len(labels),):
            raise ValueError(
                f"Expected `criterion` to return one loss for each of {len(labels)} examples, as "
                f"with `reduction='none'`, but got {shape}."
            )
        return losses

    def logits(self, outputs: Any) -> Tensor:
        """The outputs, if they are logits `(N, K)` of two classes at least."""
        if isinstance(outputs, Tensor) and outputs.ndim == 2 and outputs.shape[1] > 1:
            return outputs
        shape = f" of shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else ""
        raise ValueError(
            "Expected `criterion`, as the module's `forward` returns no logits of shape (N, K), "
            f"K > 1, but {type(outputs).__name__}{shape}, but got None."
        )

    def images_and_labels(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Images and labels of a batch; without a criterion labels are class indices `(N,)`.

        Raises:
            ValueError: If the batch does not have them.
        """
        images, labels = (batch[place] for place in self._places(batch))
        if not all(isinstance(part, Tensor) and part.ndim for part in (images, labels)) or (
            len(images) != len(labels)
        ):
            kinds = [getattr(part, "shape", type(part).__name__) for part in (images, labels)]
            raise ValueError(
                "Expected `image_key` and `label_key` to be where a batch has its images and as "
                f"many labels, both tensors, but got {kinds[0]} and {kinds[1]}."
            )
        if self.criterion is not None:
            return images, labels
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        if labels.ndim > 1 or labels.is_floating_point() or labels.is_complex():
            raise ValueError(
                "Expected `criterion`, as labels are not one class index for each image but "
                f"{labels.dtype} of shape {tuple(labels.shape)}, but got None."
            )
        return images, labels.long()

    def with_images(self, batch: Any, images: Tensor) -> Any:
        """A copy of the batch with other images, of the same type."""
        place = self._places(batch)[0]
        if isinstance(batch, Mapping):
            changed: Any = copy.copy(batch)
            changed[place] = images
            return changed
        parts = list(batch)
        parts[place] = images
        if isinstance(batch, list):
            return parts
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)

    def _places(self, batch: Any) -> tuple[Any, Any]:
        """Keys or indices of images and labels."""
        if not isinstance(batch, (Mapping, list, tuple)):
            raise ValueError(
                "Expected batches to be lists, tuples, named tuples or dictionaries but got "
                f"{type(batch).__name__}."
            )
        is_mapping, fields = isinstance(batch, Mapping), getattr(batch, "_fields", ())
        known = list(batch) if is_mapping else range(len(batch))
        places = []
        for default, name in enumerate(("image_key", "label_key")):
            key = place = getattr(self, name)
            if not is_mapping:
                place = default if key is None else key
                place = fields.index(place) if place in fields else place
            if place not in known:
                names = ", ".join(map(str, fields or known))
                raise ValueError(
                    f"Expected `{name}` of {type(self).__name__} to be in the batch ({names}) but "
                    f"got {key}."
                )
            places.append(place)
        return places[0], places[1]
