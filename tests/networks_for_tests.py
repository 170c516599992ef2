"""Small networks that tests share."""

import torch
from torch import Tensor, nn


def tiny_network(
    classes: int = 10, channels: int = 3, *, dropout: bool = False, seed: int = 0
) -> nn.Sequential:
    """Two Conv-BN-ReLU and a linear layer on 8x8 images; BatchNorm has seen a batch."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5 if dropout else 0.0),
        nn.Linear(4 * 64, classes),
    )
    network.train()
    network(torch.rand(32, channels, 8, 8))
    return network


def images_and_labels(
    count: int = 8, classes: int = 10, channels: int = 3, *, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Random images `(count, channels, 8, 8)` in [0, 1] and labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(count, channels, 8, 8, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


class PassCounter:
    """Counts images through forwards and backwards of a network, with hooks."""

    def __init__(self, network: nn.Module) -> None:
        self.forwards = self.backwards = 0
        layer = next(m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
        self.handles = [
            layer.register_forward_hook(self._forward),
            layer.register_full_backward_hook(self._backward),
        ]

    def _forward(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.forwards += len(output)

    def _backward(self, module: nn.Module, grad_in: object, grad_out: tuple[Tensor, ...]) -> None:
        self.backwards += len(grad_out[0])


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two snapshots agree bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def tiny_body(classes: int, channels: int) -> nn.Sequential:
    """`tiny_network` as the `network` argument of a module."""
    return tiny_network(classes, channels)
