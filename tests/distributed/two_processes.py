"""Run as a script: trains and measures on two gloo processes and leaves what each rank saw.

Lightning starts the second process itself, as it does for `python cli.py … --trainer.strategy ddp`.
"""

import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule
from torch import nn
from torch.distributed.nn.functional import all_reduce

sys.path.insert(0, str(Path(__file__).parent.parent))

from networks_for_tests import snapshot, tiny_body
from trainers import PLAIN, EvalBatchNorm, ToyData, quiet_trainer

from robust_flatness.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    AutoAttack,
    Curvature,
    EpochMeasure,
    Flatness,
    Landscape,
    RobustEarlyStopping,
    RobustEvaluation,
    WorstCaseFlatness,
)
from robust_flatness.lightning_modules import (
    AT,
    ATAWP,
    MART,
    TRADESAWP,
    ATEntropySGD,
    ATSelfSupervision,
    EntropySGD,
)
from robust_flatness.measures import (
    AdaptiveSharpness,
    AttackChecks,
    BoundaryThickness,
    FirstOrderFlatness,
    GradientNorm,
    HessianTrace,
    LocalLipschitz,
    Margins,
)
from robust_flatness.networks import ResNet18

CHUNK = 4


class EvalBatchNormProject(LightningModule):
    """Somebody else's module, which knows nothing of attacks, with BatchNorm in eval mode."""

    def __init__(self, *, network, **_):
        super().__init__()
        self.network = network(10, 3)

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def on_train_epoch_start(self):
        self.network.eval()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class EvalBatchNormAWP(ATAWP, EvalBatchNorm):
    """ATAWP with BatchNorm in eval mode."""


class EvalBatchNormTRADESAWP(TRADESAWP, EvalBatchNorm):
    """TRADES-AWP likewise."""


class EvalBatchNormMART(MART, EvalBatchNorm):
    """MART likewise."""


class EvalBatchNormEntropySGD(ATEntropySGD, EvalBatchNorm):
    """Entropy-SGD likewise."""


class EvalBatchNormSelfSupervision(ATSelfSupervision, EvalBatchNorm):
    """Self-supervision likewise."""


def noisy_walk(parameters):
    """Entropy-SGD whose noise and outer steps are large enough to be seen."""
    return EntropySGD(parameters, lr=1.0, langevin_steps=2, noise=1e-2)


def narrow_resnet(classes, channels):
    """A network with features."""
    return ResNet18(classes, channels, width=2)


VARIANTS = {
    "at": (EvalBatchNorm, {}),
    "label noise": (EvalBatchNorm, {"label_noise": 0.5, "label_smoothing": 0.3, "tau": 1}),
    "awp": (EvalBatchNormAWP, {}),
    "random weights": (EvalBatchNormAWP, {"direction": "random", "xi": 0.1}),
    "trades awp": (EvalBatchNormTRADESAWP, {"warmup": 0.0}),
    "mart": (EvalBatchNormMART, {}),
    "entropy sgd": (EvalBatchNormEntropySGD, {"optimizer": noisy_walk}),
    "self-supervision": (EvalBatchNormSelfSupervision, {"network": narrow_resnet, "hidden": 8}),
    "callbacks": (EvalBatchNormProject, {}),
    "at, accumulated": (EvalBatchNorm, {"label_noise": 0.5}),
    "awp, accumulated": (EvalBatchNormAWP, {"order": "awp"}),
    "synchronised": (AT, {}),
    "synchronised awp": (ATAWP, {"craft_mode": "train", "awp_mode": "train"}),
    "synchronised trades awp": (TRADESAWP, {"warmup": 0.0, "network": narrow_resnet}),
}
ACCUMULATED = {"accumulate_grad_batches": 2}
SYNCHRONISED = {"sync_batchnorm": True}
TRAINERS = {
    name: ACCUMULATED if "accumulated" in name else SYNCHRONISED
    for name in VARIANTS
    if "accumulated" in name or "synchronised" in name
}


def training_callbacks():
    """Train a module that does not train adversarially itself."""
    attack = AdversarialTraining(eps=0.1, steps=2, fraction=0.7)
    return [AdversarialWeightPerturbation(xi=0.05), attack]


def module(cls, **kwargs):
    torch.manual_seed(0)
    return cls(**{"network": tiny_body, **PLAIN, **kwargs})


def measuring_callbacks():
    light = {"steps": 2, "batch_size": CHUNK}
    return {
        "evaluation": RobustEvaluation(restarts=2, **light),
        "flatness": Flatness(num_perturbations=2, **light),
        "worst": WorstCaseFlatness(restarts=2, xi=0.05, **light),
        "stopping": RobustEarlyStopping(patience=1, **light),
        "curvature": Curvature(batch_size=CHUNK),
        "margins": EpochMeasure(measure=Margins(**light)),
        "lipschitz": EpochMeasure(measure=LocalLipschitz(**light)),
        "thickness": EpochMeasure(measure=BoundaryThickness(batch_size=CHUNK, num_points=8)),
        "checks": EpochMeasure(measure=AttackChecks(**light, square_queries=10)),
        **{
            f"{type(measure).__name__} {i}": EpochMeasure(measure=measure)
            for i, measure in enumerate(
                (
                    AdaptiveSharpness(num_perturbations=2, **light),
                    AdaptiveSharpness(case="worst", weight_steps=3, **light),
                    HessianTrace(num_probes=2, batch_size=CHUNK),
                    GradientNorm(**light),
                    FirstOrderFlatness(weight_steps=2, **light),
                )
            )
        },
        "landscape": Landscape(
            directions=["random", "adversarial", "hessian"],
            num_steps=3,
            num_directions=2,
            surface_steps=2,
            **light,
        ),
        "autoattack": AutoAttack(chunk_size=CHUNK, version="custom", attacks=["apgd-ce"]),
    }


class Recorder(Callback):
    """What this rank's network was before measuring, and what it logged."""

    def __init__(self):
        self.weights = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.weights.append(snapshot(pl_module))


def trained_weights(variant, devices):
    """Weights after training in float64 with the same global batches."""
    torch.manual_seed(0)
    given = {"devices": devices, "strategy": strategy(devices), **TRAINERS.get(variant, {})}
    given["callbacks"] = training_callbacks() if variant == "callbacks" else []
    trainer = quiet_trainer(max_epochs=2, **given)
    cls, arguments = VARIANTS[variant]
    built = module(cls, **arguments).double()
    # The last batch of an epoch is smaller, and odd on each of two processes.
    trainer.fit(built, ToyData(30, double=True))
    return {name: p.detach().clone() for name, p in built.named_parameters()}


def strategy(devices):
    return "ddp" if devices > 1 else "auto"


def measured(devices, folder):
    """What every rank measures while BatchNorm statistics drift apart."""
    torch.manual_seed(0)
    callbacks, before = measuring_callbacks(), Recorder()
    trainer = quiet_trainer(
        max_epochs=3,
        devices=devices,
        strategy=strategy(devices),
        default_root_dir=folder,
        callbacks=[before, *callbacks.values()],
    )
    built = module(ATAWP)
    trainer.fit(built, ToyData())
    return {
        "logged": {name: value.item() for name, value in trainer.callback_metrics.items()},
        "autoattack": callbacks["autoattack"].final_results["final"],
        "before": before.weights[-1],
        "after": snapshot(built),
        "epochs": trainer.current_epoch,
        "best_epoch": callbacks["stopping"].best_epoch,
    }


def synchronised_forward(norm, inputs):
    """What `SyncBatchNorm.forward` computes on GPUs alone: PyTorch has no kernel for the CPU."""
    if not norm.training:
        return nn.BatchNorm2d.forward(norm, inputs)
    rows = inputs.transpose(0, 1).flatten(1)
    sums = torch.stack([rows.sum(1), rows.square().sum(1)])
    count = rows.shape[1] * torch.distributed.get_world_size()
    mean, square = all_reduce(sums) / count
    variance = square - mean**2
    norm.num_batches_tracked.add_(1)
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)
    normal = (inputs - _of_channel(mean)) / (_of_channel(variance) + norm.eps).sqrt()
    if norm.weight is None:
        return normal
    return normal * _of_channel(norm.weight) + _of_channel(norm.bias)


def _of_channel(values):
    return values.view(1, -1, 1, 1)


def main(folder):
    torch.set_num_threads(1)
    nn.SyncBatchNorm.forward = synchronised_forward
    # It refuses the layer on CPUs.
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None
    results = {variant: trained_weights(variant, 2) for variant in VARIANTS}
    results["measured"] = measured(2, folder)
    rank = torch.distributed.get_rank()
    torch.save(results, Path(folder) / f"rank{rank}.pt")


if __name__ == "__main__":
    main(sys.argv[1])
