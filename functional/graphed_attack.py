"""PGD as one CUDA graph."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from robust_flatness.functional.attack import PGD
from robust_flatness.functional.iterate import Criterion

Arithmetic = Callable[[], AbstractContextManager[None]]
Given = tuple[Tensor, Tensor, Tensor]
Recorder = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
WARM_UPS = 3


def cuda_graph(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """Records what a function launches on the GPU.

    Args:
        run: Works on tensors that stay where they are, without waiting for the GPU.

    Returns:
        What launches the same again, and the tensor that the result is written to.

    Raises:
        RuntimeError: If it does what cannot be recorded.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as NCCL's, go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = run()
    except RuntimeError as error:
        # Nothing goes on from here: a broken recording leaves CUDA in an unknown state.
        raise RuntimeError(
            f"Expected an attack that a CUDA graph can hold for `fast` graph but got: {error}. "
            "`--model.fast true` trains without a graph."
        ) from error
    return graph.replay, output


class GraphedAttack:
    """Replays a recorded attack in place of launching its kernels one by one.

    A PGD-7 step on ResNet-18 launches some two thousand kernels. The graph reads weights and
    buffers where they lie, so it sees every update that is made in place; it is recorded anew for
    another shape, another criterion, or weights that lie elsewhere. A smaller batch, such as the
    last one of an epoch, is attacked without it. Everything else, such as what hooks do, is as it
    was when it was recorded.

    Args:
        pgd: The attack, in `eval` mode: recording would move statistics once more.
        record: What records; a test puts another in its place.

    Raises:
        RuntimeError: When called, if the network does what a graph cannot hold.
    """

    def __init__(self, pgd: PGD, record: Recorder = cuda_graph) -> None:
        self.pgd, self._record = pgd, record
        self._recorded: tuple[object, Given, Callable[[], object], Tensor] | None = None

    def __reduce__(self) -> tuple[type["GraphedAttack"], tuple[PGD, Recorder]]:
        # A graph belongs to the memory that it was recorded on: copies record their own.
        return GraphedAttack, (self.pgd, self._record)

    def __call__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        start: Tensor,
        criterion: Criterion,
        arithmetic: Arithmetic,
    ) -> Tensor:
        """Adversarial examples `(N, C, H, W)`, as `PGD.attack` finds them.

        Args:
            model: Maps images to logits.
            images: The clean images.
            labels: Handed to `criterion`.
            start: Perturbations.
            criterion: A function without variables of its own, which the graph would not see.
            arithmetic: Makes the context of the forwards.
        """

        def run(tensors: Given) -> Tensor:
            with arithmetic():
                return self.pgd.attack(model, *tensors, criterion).images

        given = images.detach(), labels.detach(), start
        if self._recorded is not None and len(images) < len(self._recorded[1][0]):
            # Recording it would cost more than it saves, and the next batch would record again.
            return run(given)
        key = (criterion, *((t.shape, t.dtype, t.device) for t in given), _places(model))
        if self._recorded is None or self._recorded[0] != key:
            # The old graph's memory is free for the new one.
            self._recorded = None
            fixed = images.clone(), labels.clone(), start.clone()
            self._recorded = key, fixed, *self._record(lambda: run(fixed))
        _, fixed, replay, output = self._recorded
        for target, source in zip(fixed, given):
            target.copy_(source)
        replay()
        return output.clone()


def _places(model: nn.Module) -> tuple[int, ...]:
    return tuple(t.data_ptr() for t in (*model.parameters(), *model.buffers()))
