"""Issue 13: callbacks train any LightningModule as `AT` and `AWPMixin` train theirs."""

import pytest
import torch
from lightning_projects import MEAN, STD, Project, normalised
from networks_for_tests import images_and_labels, tiny_body
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from robust_flatness.callbacks import AdversarialTraining, AdversarialWeightPerturbation
from robust_flatness.lightning_modules import ATAWP

EPS, XI = 0.1, 0.05


def sgd(parameters, lr=0.1):
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=0.01)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("normalization", "settings", "trainer_settings"),
    [
        (None, {}, {}),
        ((MEAN, STD), {}, {}),
        (None, {}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
        (None, {"direction": "random"}, {}),
        (None, {"order": "awp"}, {"gradient_clip_val": 0.1}),
        (None, {"mode": "train", "steps": 2}, {"precision": "bf16-mixed"}),
    ],
)
def test_a_plain_module_trains_as_atawp(normalization, settings, trainer_settings, reverse):
    images, labels = images_and_labels(20)
    images = images.double()
    mean, std = normalization or ([0.0] * 3, [1.0] * 3)
    names = {"mode": "awp_mode", "steps": "awp_steps"}
    awp = {names.get(name, name): value for name, value in settings.items()}
    torch.manual_seed(0)
    ours = ATAWP(
        tiny_body,
        mean=mean,
        std=std,
        eps=EPS,
        steps=2,
        xi=XI,
        optimizer=sgd,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0),
        **awp,
    ).double()
    plain = Project(optimizer=sgd).double()
    plain.network.load_state_dict(ours.network.state_dict())
    start = ours.network[0].weight.detach().clone()
    callbacks = [
        AdversarialTraining(eps=EPS, steps=2, normalization=normalization),
        AdversarialWeightPerturbation(xi=XI, **settings),
    ]
    inputs = images if normalization is None else normalised(images)
    for module, data, added in (
        (ours, images, []),
        (plain, inputs, callbacks[:: -1 if reverse else 1]),
    ):
        torch.manual_seed(3)
        trainer = quiet_trainer(max_epochs=2, callbacks=added, **trainer_settings)
        trainer.fit(module, DataLoader(TensorDataset(data, labels), 8))
        assert trainer.callback_metrics["awp/relative_norm_max"] == pytest.approx(XI)
    assert not torch.equal(start, ours.network[0].weight)
    tolerance = 0.0 if normalization is None else 1e-10
    for (name, ours_), theirs in zip(
        ours.network.state_dict().items(), plain.network.state_dict().values()
    ):
        torch.testing.assert_close(theirs, ours_, rtol=0, atol=tolerance, msg=name)
