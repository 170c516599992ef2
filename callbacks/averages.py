"""What averaging weights needs: a decay that fits the training, and BatchNorm statistics."""

import math

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn


def scaled_decay(decay: float, reference_steps: int, steps: float) -> float:
    """The decay τ whose horizon 1 / (1 - τ) is the same share of another training.

    Args:
        decay: Decay in [0, 1) of a training of `reference_steps`.
        reference_steps: Steps of that training, >= 1.
        steps: Steps of the other one, as Lightning counts them: -1 or infinite where it cannot.

    Returns:
        Decay in [0, 1); 0 where the horizon would be less than a step.

    Raises:
        ValueError: If `steps` is no number of steps.

    Example:
        >>> round(scaled_decay(0.9975, 58_650, 5_865), 9), scaled_decay(0.9975, 58_650, 100)
        (0.975, 0.0)
    """
    if not 0 < steps < math.inf:
        raise ValueError(
            "Expected `max_epochs` or `max_steps` to limit training, for the averages to span a "
            f"share of it, but got {steps} steps; `reference_steps=None` takes `decay` as it is."
        )
    return max(0.0, 1 - (1 - decay) * (reference_steps / steps))


def reestimate_batch_norm(network: nn.Module, images: Tensor, batch_size: int) -> None:
    """Replaces BatchNorm's running statistics by the mean of those of batches of images.

    One pass in train mode, with a fixed seed for Dropout, that leaves global random state alone.

    Args:
        network: Its running statistics are written in place.
        images: `(N, ...)`, on any device.
        batch_size: Images in a batch, at most.
    """
    parameters = list(network.parameters())
    images = images.to(parameters[0]) if parameters else images
    # Batches count alike, so they are of one size, up to one image.
    batches = images.tensor_split(math.ceil(len(images) / batch_size))
    with torch.inference_mode(False), isolate_rng():
        torch.manual_seed(0)
        update_bn(batches, network)


@torch.no_grad()
def relative_distance(average: nn.Module, network: nn.Module) -> float:
    """‖w̄ - w‖ / ‖w‖ over all parameters of two networks of the same structure.

    Args:
        average: Has the weights w̄.
        network: Has the weights w.

    Example:
        >>> network, other = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> other.load_state_dict({k: 3 * v for k, v in network.state_dict().items()})
        <All keys matched successfully>
        >>> round(relative_distance(other, network), 6)
        2.0
    """
    weights = list(network.parameters())
    differences = [a - w for a, w in zip(average.parameters(), weights)]
    distance = nn.utils.get_total_norm(differences) / nn.utils.get_total_norm(weights)
    return distance.item()
