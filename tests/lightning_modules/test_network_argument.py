"""The network of a variant, built in Python: what it may be, and how its checkpoints load."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from networks_for_tests import same, snapshot, tiny_body, tiny_network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, VARIANTS, loader, quiet_trainer

from robust_flatness.datamodules import Digits
from robust_flatness.lightning_modules import AT, ATAWP, TRADESAWP, load_checkpoint
from robust_flatness.networks import ResNet18, SmallResNet

TINY = partial(SmallResNet, width=4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_takes_a_network_first(variant):
    network = TINY(10, 3)
    assert variant(network).network is network
    assert type(variant(TINY, num_classes=7).network) is SmallResNet


def test_a_module_is_trained_as_it_is_and_two_variants_share_it(recwarn):
    network = tiny_network()
    first, second = AT(network, **PLAIN), ATAWP(network, **PLAIN)
    before = snapshot(network)
    quiet_trainer().fit(first, loader(8))
    assert not same(before, snapshot(network))
    assert same(snapshot(network), snapshot(second.network))
    assert not [w for w in recwarn if "nn.Module" in str(w.message)]


def saved(module, folder, epochs=1):
    trainer = quiet_trainer(max_epochs=epochs)
    trainer.fit(module, loader(8))
    trainer.save_checkpoint(folder / "a.ckpt")
    return folder / "a.ckpt"


@pytest.mark.parametrize(
    "network", [tiny_network(), tiny_body, lambda k, c: tiny_network(k, c), partial(tiny_body)]
)
def test_a_network_of_python_is_given_again_or_its_checkpoint_is_refused(network, tmp_path):
    module = ATAWP(network, **PLAIN)
    path = saved(module, tmp_path)
    for load in (ATAWP.load_from_checkpoint, load_checkpoint):
        with pytest.raises(ValueError, match="to be the one of the checkpoint but ResNet18 has"):
            load(path)
        again = load(path, network=tiny_body)
        assert same(snapshot(again), snapshot(module))
        assert again.hparams["mean"] == PLAIN["mean"]


def activated(activation):
    return partial(SmallResNet, width=4, activation=activation)


def test_equal_weights_in_another_network_are_refused(tmp_path):
    path = saved(AT(activated("silu"), **PLAIN), tmp_path)
    with pytest.raises(ValueError, match="SmallResNet has ReLU in place of SiLU; pass `network=`"):
        AT.load_from_checkpoint(path, network=activated("relu"))
    with pytest.raises(ValueError, match="in place of SiLU"):
        quiet_trainer(max_epochs=2).fit(
            AT(activated("relu"), **PLAIN), loader(8), ckpt_path=path, weights_only=True
        )
    AT.load_from_checkpoint(path, network=activated("silu"))


def test_default_networks_load_by_themselves_with_any_activation_of_theirs(tmp_path):
    trainer, module = quiet_trainer(), AT(ResNet18)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert type(AT.load_from_checkpoint(tmp_path / "a.ckpt").network) is ResNet18


@pytest.mark.parametrize("load", [load_checkpoint, ATAWP.load_from_checkpoint])
def test_a_checkpoint_of_an_earlier_version_loads(load):
    path = Path(__file__).parents[1] / "fixtures" / "run_ba960bd" / "checkpoints" / "last.ckpt"
    with pytest.warns(FutureWarning, match="`fast` has no effect"):
        module = load(path)
    assert (type(module), module.pgd.steps) == (ATAWP, 2)
    assert same(snapshot(module), torch.load(path, weights_only=True)["state_dict"])


def test_a_checkpoint_without_layers_loads(tmp_path):
    path = saved(AT(tiny_body, **PLAIN), tmp_path)
    content = torch.load(path, weights_only=True)
    del content["robust_flatness_layers"]
    torch.save(content, path)
    AT.load_from_checkpoint(path, network=tiny_body)


@pytest.mark.parametrize(
    "values",
    [
        (0.5, 0.4, 0.3),
        np.array([0.5, 0.4, 0.3]),
        torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1),
        [np.float32(0.5), torch.tensor(0.4), 0.3],
    ],
    ids=str,
)
def test_statistics_of_any_kind_are_saved_as_numbers(values, tmp_path):
    settings = {**PLAIN, "mean": values, "std": values, "eps": np.float64(0.1)}
    path = saved(AT(tiny_body, **settings), tmp_path)
    module = AT.load_from_checkpoint(path, network=tiny_body)
    assert module.hparams["mean"] == pytest.approx([0.5, 0.4, 0.3])
    assert type(module.hparams["eps"]) is float
    torch.testing.assert_close(module.normalize.std.flatten(), torch.tensor([0.5, 0.4, 0.3]))


@pytest.mark.parametrize("name", ["mean", "std"])
def test_statistics_of_a_class_are_refused_if_it_computes_them(name):
    digits = Digits(num_train=20, num_train_eval=20)
    assert AT(TINY, in_channels=1, mean=digits.mean, std=digits.std).hparams.mean == digits.mean
    with pytest.raises(ValueError, match=rf"a property of a class; .* `Digits\(\).{name}`"):
        AT(TINY, in_channels=1, **{"mean": [0.5], "std": [0.5], name: getattr(Digits, name)})


class Pair(nn.Module):
    """Returns more than logits."""

    def __init__(self):
        super().__init__()
        self.body = tiny_network()

    def forward(self, images):
        return self.body(images), images


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (tiny_network(classes=12), "return 10 logits, one for each class, but got 12"),
        (tiny_network(classes=4), "return 10 logits, one for each class, but got 4"),
        (tiny_network(channels=1), r"images of shape \(3, 8, 8\) but it raises RuntimeError"),
        (nn.Linear(8, 10), r"to return logits of shape \(N, K\).* \(1, 3, 8, 10\)"),
        (Pair(), "to return logits .* but got a tuple of 2"),
        (nn.Identity(), "`network` to have weights to train but Identity has none"),
    ],
)
@pytest.mark.parametrize("variant", [AT, TRADESAWP])
def test_a_network_that_does_not_fit_is_refused_before_a_step(variant, network, message):
    before = [weight.detach().clone() for weight in network.parameters()]
    trainer = quiet_trainer()
    with pytest.raises(ValueError, match=message):
        trainer.fit(variant(network, **PLAIN), loader(8))
    assert trainer.global_step == 0
    assert all(map(torch.equal, before, network.parameters()))


def test_an_error_that_is_not_the_networks_stays_what_it_is():
    class Failing(AT):
        def objective(self, images, adversarial, labels):
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        quiet_trainer().fit(Failing(tiny_body, **PLAIN), loader(8))


def test_a_network_of_torchvision_trains_on_small_images():
    import torchvision

    torch.manual_seed(0)
    module = AT(torchvision.models.resnet18, **{**PLAIN, "steps": 1})
    images = TensorDataset(torch.rand(2, 3, 32, 32), torch.arange(2))
    trainer = quiet_trainer()
    trainer.fit(module, DataLoader(images, 2))
    assert trainer.global_step == 1
