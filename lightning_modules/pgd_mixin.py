"""Crafting adversarial examples inside a training step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from robust_flatness.functional.attack import PGD, Criterion, example_losses
from robust_flatness.functional.checks import check_examples, errors_on_all_ranks
from robust_flatness.functional.evaluation import Model, module_modes, to_float32
from robust_flatness.functional.noise import keyed_generator, keyed_seed, random_start


class PGDMixin:
    """Gives a LightningModule `craft`: PGD on its own `forward`, with noise of the global batch.

    Random starts are drawn for the batch of all processes together, from the run's seed and the
    number of batches seen, and each process takes its share: so two processes train as one, and a
    resumed run goes on exactly. The order fits Lightning's `DistributedSampler`, which deals
    examples out to ranks in turn.

    Attributes:
        pgd: How the attack is run.
        num_classes: Number of classes, to which labels are held on the first batch.
    """

    pgd: PGD
    num_classes: int
    _run_seed: int | None = None

    def on_fit_start(self) -> None:
        """Agrees on one seed for the noise of all processes, or keeps that of the checkpoint."""
        strategy = cast(LightningModule, self).trainer.strategy
        own = torch.initial_seed() if self._run_seed is None else self._run_seed
        self._run_seed = int(strategy.broadcast(own))

    def on_train_batch_start(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        """Looks at the first batch before anything is trained on it.

        Raises:
            ValueError: On all processes, if pixels are outside [0, 1] or labels outside the classes
                on any, or if the last batch of an epoch is one image that the network cannot train
                on.
        """
        # Once only: the check waits for the device.
        if self.batches_seen == 0:
            with errors_on_all_ranks():
                check_examples(batch[0], batch[1], self.num_classes)
            self._check_last_batch(batch[0][:1])

    def _check_last_batch(self, image: Tensor) -> None:
        """Tries a single image if an epoch ends with one: BatchNorm may have one value of it."""
        module = cast(LightningModule, self)
        loader = module.trainer.train_dataloader
        sampler, size = getattr(loader, "sampler", ()), getattr(loader, "batch_size", None) or 1
        if getattr(loader, "drop_last", True) or len(sampler) % size != 1:
            return
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        devices = [module.device] if module.device.type == "cuda" else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                module(image)
        except ValueError as error:
            raise ValueError(
                f"Expected the last batch of an epoch to have more than one image for the network "
                f"to train on but got {len(sampler)} images in batches of {size} ({error})."
            ) from error
        finally:
            with torch.no_grad():
                for name, buffer in module.named_buffers():
                    buffer.copy_(buffers[name])

    @property
    def batches_seen(self) -> int:
        """Training batches before the current one, over all epochs; checkpointed by Lightning."""
        return cast(LightningModule, self).trainer.fit_loop.epoch_loop.total_batch_idx

    def generator(self, purpose: str, device: torch.device) -> torch.Generator:
        """Numbers that are the same on every rank, and others for each batch and purpose.

        Args:
            purpose: What the numbers are for.
            device: Where they are drawn.
        """
        return keyed_generator(self._run_seed or 0, purpose, self.batches_seen, device=device)

    def draws(self, purpose: str, count: int, columns: int, device: torch.device) -> Tensor:
        """This rank's rows of uniform numbers that are drawn for the global batch.

        Args:
            purpose: What the numbers are for.
            count: Rows of this rank.
            columns: Numbers for each row.
            device: Where they are drawn.

        Returns:
            `(count, columns)` in [0, 1).
        """
        trainer = cast(LightningModule, self).trainer
        shape, generator = (trainer.world_size * count, columns), self.generator(purpose, device)
        every = torch.rand(shape, generator=generator, device=device)
        return every[trainer.global_rank :: trainer.world_size]

    @contextmanager
    def own_dropout(self) -> Iterator[None]:
        """Dropout inside draws from the run's seed, batch and rank, so that a resumed run goes on.

        Global random state is left as it was, and untouched where there is no Dropout.
        """
        module = cast(LightningModule, self)
        if not any(isinstance(m, _DropoutNd) and m.p > 0 for m in module.modules()):
            yield
            return
        devices = [module.device] if module.device.type == "cuda" else []
        key = ("dropout", self.batches_seen, module.global_rank)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(keyed_seed(self._run_seed or 0, *key))
            yield

    def clean_logits(self, images: Tensor) -> Tensor:
        """Logits of clean images in eval mode, without a graph.

        Args:
            images: `(N, C, H, W)` in [0, 1].
        """
        module = cast(nn.Module, self)
        with torch.no_grad(), module_modes(module, "eval"):
            return to_float32(module(images))

    def craft(
        self,
        images: Tensor,
        labels: Tensor,
        criterion: Criterion = example_losses,
        *,
        model: Model | None = None,
        purpose: str = "start",
        rows: tuple[Sequence[int], int] | None = None,
    ) -> Tensor:
        """Adversarial examples for this rank's part of the batch.

        Args:
            images: `(N, C, H, W)` in [0, 1].
            labels: `(N,)`, or any target with N rows that `criterion` takes.
            criterion: Maps logits and labels to the losses `(N,)` to be raised.
            model: What is attacked; `None` for the module itself.
            purpose: Of the random starts; a second attack in a step needs one of its own.
            rows: Which rows the images are of how many that this rank has of the batch; `None` for
                all of it. A row has the same start on any number of processes.

        Returns:
            `(N, C, H, W)` in [0, 1], without a graph, in the type of `images`.
        """
        if len(images) == 0:
            return images
        trainer = cast(LightningModule, self).trainer
        chosen, count = (range(len(images)), len(images)) if rows is None else rows
        start = random_start(
            (trainer.world_size * count, *images.shape[1:]),
            eps=self.pgd.eps,
            norm=self.pgd.norm,
            start=self.pgd.start,
            generator=self.generator(purpose, images.device),
        )[trainer.global_rank :: trainer.world_size][list(chosen)]
        attacked = cast(nn.Module, self) if model is None else model
        # The attack is in float32 at least; training may be in half precision.
        return self.search(attacked, images, labels, start, criterion).to(images.dtype)

    def search(
        self, model: Model, images: Tensor, labels: Tensor, start: Tensor, criterion: Criterion
    ) -> Tensor:
        """Runs the attack; arguments and result are those of `PGD.attack`."""
        return self.pgd.attack(model, images, labels, start, criterion).images
