"""The batch that `training_step` gets, and the wrapper that hands it over."""

import copy
import pickle
from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from lightning.pytorch import Callback
from lightning_projects import MEAN, STD, Project, classifier, normalised
from networks_for_tests import PassCounter, images_and_labels, snapshot, tiny_body
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.callbacks import AdversarialTraining, AdversarialWeightPerturbation
from robust_flatness.lightning_modules import AT

EPS = 0.1
Pair = namedtuple("Pair", ["labels", "images"])
KEYS = {"image_key": "images", "label_key": "labels"}


class Remembers(Project):
    """Remembers the batches of its steps and of the hooks around them."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen, self.ended, self.validated = [], [], []
        self.where = (0, 1)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        # The last hook; what it makes is attacked.
        if isinstance(batch, list):
            return [batch[0].flip(3), *batch[1:]]
        return batch

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        images, labels = (batch[place] for place in self.where)
        return cross_entropy(self(images), labels.flatten())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.ended.append(batch)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch[0])


def fit(module, callbacks, batches, val=None, **kwargs):
    trainer = quiet_trainer(callbacks=callbacks, num_sanity_val_steps=0, **kwargs)
    trainer.fit(module, batches, val)
    return trainer


def one_batch(batch):
    """A loader that delivers one object as it is."""
    return DataLoader([batch], batch_size=None, collate_fn=lambda item: item)


@pytest.mark.parametrize(
    ("make", "where", "keys"),
    [
        (lambda x, y: [x, y], (0, 1), {}),
        (lambda x, y: [x, y[:, None]], (0, 1), {}),
        (lambda x, y: (x, y, "name"), (0, 1), {}),
        (lambda x, y: (y, x), (1, 0), {"image_key": 1, "label_key": 0}),
        (lambda x, y: Pair(y, x), (1, 0), KEYS),
        (lambda x, y: {"images": x, "labels": y, "id": 3}, ("images", "labels"), KEYS),
        (lambda x, y: OrderedDict(images=x, labels=y), ("images", "labels"), KEYS),
        (lambda x, y: UserDict(images=x, labels=y), ("images", "labels"), KEYS),
    ],
)
def test_training_step_gets_adversarial_images_in_a_batch_of_the_same_type(make, where, keys):
    images, labels = images_and_labels(8)
    batch, kept = make(images, labels), images.clone()
    module = Remembers(lr=0.0)
    module.where = where
    fit(module, [AdversarialTraining(eps=EPS, steps=3, **keys)], one_batch(batch))
    (seen,), (ended,) = module.seen, module.ended
    assert type(seen) is type(batch)
    assert len(seen) == len(batch)
    clean = ended[where[0]]
    moved = (seen[where[0]] - clean).abs()
    assert 0.05 < moved.max() <= EPS + 1e-6
    assert seen[where[0]].min() >= 0
    assert seen[where[0]].max() <= 1
    network = module.network.eval()
    assert cross_entropy(network(seen[where[0]]), labels) > cross_entropy(network(clean), labels)
    assert torch.equal(seen[where[1]], batch[where[1]])
    # Neither the dataset's memory nor the batch of other hooks is written.
    assert torch.equal(images, kept)
    assert torch.equal(clean, kept.flip(3) if isinstance(batch, list) else kept)


def test_validation_stays_clean_and_normalised_images_stay_in_the_ball_of_pixels():
    images, labels = images_and_labels(16)
    data = DataLoader(TensorDataset(normalised(images), labels), 8)
    module = Remembers()
    at = AdversarialTraining(eps=EPS, steps=3, normalization=(MEAN, STD))
    fit(module, [at], data, data)
    seen, clean = (torch.cat([b[0] for b in batches]) for batches in (module.seen, module.ended))
    moved = ((seen - clean) * torch.tensor(STD).view(3, 1, 1)).abs()
    assert 0.05 < moved.max() <= EPS + 1e-5
    assert torch.equal(torch.cat(module.validated), clean)


def test_rounded_numbers_of_a_normalisation_may_leave_the_range_a_little():
    images = images_and_labels(8)[0].round()
    module = Remembers()
    mean = [value + 1e-5 for value in MEAN]
    fit(
        module,
        [AdversarialTraining(normalization=(mean, STD), steps=1)],
        batch_of(normalised(images)),
    )
    pixels = module.seen[0][0] * torch.tensor(STD).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert pixels.min() > -1e-6
    assert pixels.max() < 1 + 1e-6


def test_a_fraction_of_the_batch_is_attacked_and_the_rest_is_the_same_bits():
    module = Remembers(lr=0.0)
    fit(module, [AdversarialTraining(eps=EPS, steps=2, fraction=0.25)], loader(8))
    seen, clean = module.seen[0][0], module.ended[0][0]
    differs = [not torch.equal(a, b) for a, b in zip(seen, clean)]
    assert differs == [True] * 2 + [False] * 6
    # The noise of an image does not depend on the fraction.
    whole = Remembers(lr=0.0)
    torch.manual_seed(0)
    fit(whole, [AdversarialTraining(eps=EPS, steps=2)], loader(8))
    again = Remembers(lr=0.0)
    torch.manual_seed(0)
    fit(again, [AdversarialTraining(eps=EPS, steps=2, fraction=0.25)], loader(8))
    torch.testing.assert_close(again.seen[0][0][:2], whole.seen[0][0][:2], rtol=0, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_the_batch_keeps_its_memory_format(fraction):
    module = Remembers()
    images = images_and_labels(8)[0].to(memory_format=torch.channels_last)
    fit(module, [AdversarialTraining(steps=1, fraction=fraction)], batch_of(images))
    assert module.seen[0][0].stride() == module.ended[0][0].stride() == images.stride()


def test_the_radius_rises_in_the_warm_up():
    module = Remembers(lr=0.0)
    at = AdversarialTraining(eps=EPS, steps=5, step_size=EPS, warmup=3)
    fit(module, [at], loader(8), max_epochs=5)
    radii = [
        (seen[0] - clean[0]).abs().max().item() for seen, clean in zip(module.seen, module.ended)
    ]
    assert radii == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1], rel=1e-4)
    assert [at.attack_of(epoch).length for epoch in range(5)] == pytest.approx(radii)


def test_an_attack_costs_its_passes_alone():
    module = Project()
    counter = PassCounter(module.network)
    fit(module, [AdversarialTraining(steps=3, keep="last")], loader(8))
    # Three of the attack and one of the step; the attack's backwards go to the input.
    assert counter.forwards == 4 * 8


class Copies(Callback):
    """Copies the module in the middle of training."""

    def on_train_batch_end(self, trainer, module, *args):
        assert "training_step" in vars(module)
        trainer.save_checkpoint(self.path)
        self.copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(module))]
        if trainer.global_step == 2:
            raise RuntimeError("half-way")


@pytest.mark.parametrize("fails", [False, True])
def test_no_copy_pickle_or_checkpoint_has_the_wrapper_and_it_ends_with_fit(tmp_path, fails):
    module, copies = Project(), Copies()
    copies.path = tmp_path / "last.ckpt"
    own = module.training_step
    added = [AdversarialTraining(steps=1), copies, AdversarialWeightPerturbation()]
    if fails:
        with pytest.raises(RuntimeError, match="half-way"):
            fit(module, added, loader(16))
    else:
        fit(module, added, loader(8))
    for name in ("training_step", "backward", "configure_gradient_clipping"):
        assert name not in vars(module)
    assert module.training_step == own
    for made in copies.copies:
        # The copy's own method, not that of the module, and without a callback.
        assert made.training_step.__self__ is made
        assert made.training_step.__func__ is Project.training_step
        assert made.backward.__self__ is made
    content = torch.load(copies.path, weights_only=True)
    assert not any("training_step" in name for name in content["state_dict"])
    assert content["callbacks"]["AdversarialTraining"] == {"seed": 0}


def test_a_compiled_module_is_trained_and_keeps_its_compiled_step():
    ends = []
    for compiled in (False, True):
        torch.manual_seed(0)
        module = own = Project(classifier, lr=0.5)
        if compiled:
            module = torch.compile(own, backend="eager")
        callbacks = [AdversarialTraining(steps=1), AdversarialWeightPerturbation(xi=0.1)]
        fit(module, callbacks, loader(16))
        ends.append(snapshot(own))
    assert "training_step" in vars(own)
    assert vars(own)["training_step"].__name__ == "training_step"
    torch.testing.assert_close(*ends)


class Outputs(Project):
    """Its outputs are a dictionary, its labels soft."""

    def forward(self, images):
        return {"logits": self.network(images)}

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])["logits"], batch[1])


def soft_loader():
    images, labels = images_and_labels(8)
    return DataLoader(TensorDataset(images, 0.9 * one_hot(labels, 10).float() + 0.01), 8)


def test_a_criterion_takes_soft_labels_and_any_output():
    def criterion(outputs, labels):
        return cross_entropy(outputs["logits"], labels, reduction="none")

    class Watched(Outputs):
        def training_step(self, batch, batch_idx):
            self.seen = batch[0]
            return super().training_step(batch, batch_idx)

    module = Watched(lr=0.0)
    callbacks = [
        AdversarialTraining(eps=EPS, steps=3, criterion=criterion),
        AdversarialWeightPerturbation(criterion=criterion),
    ]
    trainer = fit(module, callbacks, soft_loader())
    images, labels = next(iter(soft_loader()))
    module.eval()
    assert module.training_step((module.seen, labels), 0) > module.training_step(
        (images, labels), 0
    )
    assert trainer.callback_metrics["awp/relative_norm_max"] == pytest.approx(0.01)


def test_a_criterion_serves_a_single_output():
    class Binary(Project):
        def training_step(self, batch, batch_idx):
            images, labels = batch
            return binary_cross_entropy_with_logits(self(images)[:, 0], labels.double() / 10)

    def criterion(outputs, labels):
        targets = labels.to(outputs) / 10
        return binary_cross_entropy_with_logits(outputs[:, 0], targets, reduction="none")

    module = Binary(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 1))).double()
    fit(module, [AdversarialTraining(steps=2, criterion=criterion)], loader(8, double=True))


def batch_of(images=None, labels=None):
    known = images_and_labels(8)
    return one_batch(
        [known[0] if images is None else images, known[1] if labels is None else labels]
    )


class SingleOutput(Project):
    def forward(self, images):
        return super().forward(images)[:, :1]


class SeveralOptimizers(Project):
    automatic_optimization = False

    def configure_optimizers(self):
        return [super().configure_optimizers(), super().configure_optimizers()]


BOTH = (AdversarialTraining, AdversarialWeightPerturbation)
HALF = (AdversarialTraining,)
REFUSED = {
    "several optimizers": (
        *(BOTH, {}, SeveralOptimizers, batch_of()),
        r"Expected `configure_optimizers` to return one optimizer for Adversarial\w+ but got 2\.",
    ),
    "soft labels": (
        *(BOTH, {}, Project, soft_loader()),
        r"Expected `criterion`, as labels are not .* torch.float32 of shape \(8, 10\), but got N",
    ),
    "dictionary outputs": (
        *(BOTH, {}, Outputs, batch_of()),
        "Expected `criterion`, as the module's `forward` returns no .* but dict, but got None",
    ),
    "one output": (
        *(BOTH, {}, SingleOutput, batch_of(labels=torch.arange(8) % 2)),
        r"Expected `criterion`, as the module's `forward` returns no .* but Tensor of shape \(8, 1",
    ),
    "mean criterion": (
        *(BOTH, {"criterion": nn.CrossEntropyLoss()}, Project, batch_of()),
        r"Expected `criterion` to return one loss for each of 8 examples, .* but got \(\)\.",
    ),
    "normalised images": (
        *(HALF, {}, Project, batch_of(normalised(images_and_labels(8)[0]))),
        r"Expected `normalization` to be .* but got None, with which pixels are in \[-2",
    ),
    "another normalization": (
        *(HALF, {"normalization": (MEAN, [1, 1, 1])}, Project, batch_of()),
        r"Expected `normalization` to be .* but got .* with which pixels are in \[0.37",
    ),
    "pixels": (
        *(HALF, {"normalization": (MEAN, STD)}, Project, batch_of()),
        r"Expected `normalization` to be .* which look like pixels in \[0, 1\] already",
    ),
    "other channels": (
        *(HALF, {"normalization": (MEAN, STD)}, Project, batch_of(torch.rand(8, 1, 8, 8))),
        r"Expected `normalization` to be of 1 channels, as the images of a batch, but got 3\.",
    ),
    "bytes": (
        *(HALF, {}, Project, batch_of(torch.zeros(8, 3, 8, 8, dtype=torch.uint8))),
        r"Expected images to be floating point of shape \(N, C, H, W\) .* torch.uint8",
    ),
    "no key": (
        *(BOTH, {}, Project, one_batch({"x": torch.rand(8, 3, 8, 8), "y": torch.zeros(8)})),
        r"Expected `image_key` of Adv\w+ to be in the batch \(x, y\) but got None\.",
    ),
    "no such place": (
        *(BOTH, {"label_key": 2}, Project, batch_of()),
        r"Expected `label_key` of Adv\w+ to be in the batch \(0, 1\) but got 2\.",
    ),
    "a tensor": (
        *(BOTH, {}, Project, one_batch(torch.rand(8, 3, 8, 8))),
        "Expected batches to be lists, tuples, named tuples or dictionaries but got Tensor",
    ),
    "no tensors": (
        *(BOTH, {}, Project, batch_of(labels="name")),
        r"Expected `image_key` and `label_key` to be where .* both tensors, but got .* and str",
    ),
}


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for case, (kinds, *_) in REFUSED.items() for kind in kinds]
)
def test_what_cannot_be_attacked_is_refused_by_name_before_the_first_update(kind, case):
    _, arguments, build, batches, message = REFUSED[case]
    module = build()
    before = snapshot(module)
    with pytest.raises(ValueError, match=message):
        fit(module, [kind(**arguments)], batches)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", BOTH)
def test_a_module_that_attacks_images_itself_is_refused(kind):
    module = AT(tiny_body, **PLAIN)
    with pytest.raises(ValueError, match="Expected a module that trains on clean .* but got AT"):
        fit(module, [kind()], loader(8))


@pytest.mark.parametrize("kind", BOTH)
def test_strategies_that_shard_weights_are_refused(kind, monkeypatch):
    sharded = "robust_flatness.functional.checks.SHARDED"
    monkeypatch.setattr(sharded, ("SingleDeviceStrategy",))
    with pytest.raises(ValueError, match="Expected a `strategy` that has all weights .* Single"):
        fit(Project(), [kind()], loader(8))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (AdversarialTraining, {"eps": 8}, "`eps` to be in .0, 1. for norm linf"),
        (AdversarialTraining, {"fraction": 2.0}, r"`fraction` to be in \[0, 1\] but got 2"),
        (AdversarialTraining, {"warmup": 0.5}, "`warmup` to be an integer but got 0.5"),
        (AdversarialTraining, {"normalization": ([0.5], [0.0])}, r"`normalization` to be \(mean"),
        (AdversarialWeightPerturbation, {"xi": -1.0}, "`xi` to be >= 0 but got -1"),
        (AdversarialWeightPerturbation, {"mode": "test"}, "`mode` to be one of eval, train"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
