import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from networks_for_tests import images_and_labels, same, snapshot, tiny_body
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.utils.data import DataLoader, TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.functional import adversarial_weight_perturbation, perturbed_weights
from robust_flatness.functional.layer_weights import layer_tensors
from robust_flatness.lightning_modules import ATAWP, TRADESAWP

XI = 0.02
LR, DECAY, MOMENTUM = 0.1, 0.05, 0.9


def constant(optimizer):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)


class FixedExamples(ATAWP):
    """ATAWP on given adversarial examples, BatchNorm in eval mode, so that a step is algebra."""

    def craft(self, images, labels, *args):
        return images

    def on_train_epoch_start(self):
        self.network.eval()


def parametrised_body(classes, channels):
    """Spectral norm and weight norm, of either implementation."""
    body = tiny_body(classes, channels)
    parametrizations.spectral_norm(body[0])
    parametrizations.weight_norm(body[3])
    weight_norm(body[8])
    return body


class TiedBody(nn.Module):
    """A linear layer whose weight another module owns first."""

    def __init__(self, classes, channels):
        super().__init__()
        self.body = tiny_body(classes, channels)[:-1]
        self.prototypes = nn.Parameter(torch.randn(classes, 256) / 16)
        self.head = nn.Linear(256, classes)
        self.head.weight = self.prototypes

    def forward(self, images):
        return self.head(self.body(images))


def module_for(order: str, lr: float = LR, network=tiny_body) -> FixedExamples:
    return FixedExamples(
        network=network,
        xi=XI,
        order=order,
        optimizer=lambda p: torch.optim.SGD(p, lr=lr, momentum=MOMENTUM, weight_decay=DECAY),
        **PLAIN,
    ).double()


def expected_after(module: FixedExamples, batches, order: str, steps_per_update: int = 1):
    """The update written out: w ← w - lr·buf, buf ← m·buf + g(w+ν) + wd·(w or w+ν)."""
    module.network.eval()
    buffers = {}
    for begin in range(0, len(batches), steps_per_update):
        window = batches[begin : begin + steps_per_update]
        total = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
        for images, labels in window:
            nu = adversarial_weight_perturbation(module, images, labels, xi=XI)
            with perturbed_weights(module, nu):
                loss = module.objective(images, images, labels)[0]
                gradients = torch.autograd.grad(loss, list(module.parameters()))
            for (name, weight), gradient in zip(module.named_parameters(), gradients):
                decayed = weight.detach()
                # The tied body's prototypes are perturbed under the name of its linear layer.
                known = name.replace("prototypes", "head.weight")
                if order == "awp" and known in nu:
                    decayed = decayed + nu[known]
                total[name] += (gradient + DECAY * decayed) / len(window)
        with torch.no_grad():
            for name, weight in module.named_parameters():
                buffers[name] = MOMENTUM * buffers.get(name, 0) + total[name]
                weight -= LR * buffers[name]
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("order", ["sam", "awp"])
@pytest.mark.parametrize(
    ("network", "accumulate"),
    [(tiny_body, 1), (tiny_body, 2), (parametrised_body, 1), (TiedBody, 1)],
)
def test_steps_follow_the_update_written_out(order, network, accumulate):
    images, labels = images_and_labels(32)
    batches = list(zip(images.double().split(8), labels.split(8)))
    expected = expected_after(module_for(order, network=network), batches, order, accumulate)
    module = module_for(order, network=network)
    trainer = quiet_trainer(max_epochs=1, accumulate_grad_batches=accumulate)
    trainer.fit(module, DataLoader(TensorDataset(images.double(), labels), 8))
    for name, value in module.named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=0, atol=1e-12)
    for end in ("min", "max"):
        assert trainer.callback_metrics[f"awp/relative_norm_{end}"] == pytest.approx(XI)


def test_a_network_that_cannot_be_perturbed_is_refused_before_a_warm_up():
    class Masked(nn.Linear):
        def forward(self, images):
            return nn.functional.linear(images, self.weight * (self.weight > 0), self.bias)

    def body(*_):
        return nn.Sequential(nn.Flatten(), Masked(192, 10))

    module = ATAWP(network=body, warmup=0.5, **PLAIN)
    with pytest.raises(ValueError, match=r"but got `1` \(Masked\), which makes another tensor"):
        quiet_trainer(max_epochs=2, max_steps=1).fit(module, loader(8))


def test_an_epoch_for_batchnorm_statistics_alone_leaves_the_weights():
    module = ATAWP(tiny_body, xi=XI, lr_scheduler=constant, **PLAIN)
    swa = StochasticWeightAveraging(1e-9, swa_epoch_start=1, annealing_epochs=1)
    quiet_trainer(max_epochs=2, callbacks=[swa]).fit(module, loader(16))
    average = swa._average_model.network[0].weight
    torch.testing.assert_close(module.network[0].weight, average, rtol=0, atol=1e-6)


def test_orders_differ():
    images, labels = images_and_labels(16)
    batches = list(zip(images.double().split(8), labels.split(8)))
    sam = expected_after(module_for("sam"), batches, "sam")
    awp = expected_after(module_for("awp"), batches, "awp")
    assert not torch.allclose(sam["network.0.weight"], awp["network.0.weight"], atol=1e-9)


def test_the_decay_of_perturbed_weights_is_not_clipped():
    module = module_for("awp")
    before = module.network[0].weight.detach().clone()
    quiet_trainer(gradient_clip_val=1e-15).fit(module, loader(8, double=True))
    # Without a gradient what is left is w - lr · wd · (w + ν), ‖ν‖ = ξ‖w‖.
    shift = module.network[0].weight.detach() - before * (1 - LR * DECAY)
    assert shift.norm().item() == pytest.approx(LR * DECAY * XI * before.norm().item(), rel=1e-6)


def test_awp_order_needs_coupled_decay():
    module = ATAWP(network=tiny_body, order="awp", optimizer=torch.optim.AdamW, **PLAIN)
    with pytest.raises(ValueError, match="coupled weight decay for `order` awp but got AdamW"):
        quiet_trainer().fit(module, loader(8))


class Weights(Callback):
    """Compares the weights when a batch starts with those around and inside of its backward."""

    def __init__(self):
        self.before, self.between, self.after, self.inside = None, [], [], []

    def on_train_batch_start(self, trainer, module, *args):
        self.before = module.network[0].weight.detach().clone()

    def on_before_backward(self, trainer, module, loss):
        weight = module.network[0].weight
        self.between.append(torch.equal(self.before, weight))
        loss.register_hook(lambda _: self.inside.append(not torch.equal(self.before, weight)))

    def on_after_backward(self, trainer, module):
        self.after.append(torch.equal(self.before, module.network[0].weight))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_are_perturbed_for_the_loss_and_restored_bit_for_bit(precision):
    watch = Weights()
    module = ATAWP(network=tiny_body, **PLAIN)
    trainer = quiet_trainer(callbacks=[watch], accumulate_grad_batches=2, precision=precision)
    trainer.fit(module, loader(32))
    # Hooks before the backward may average weights.
    assert watch.between == [True] * 4
    assert watch.inside == [True] * 4
    assert watch.after == [True] * 4


def test_bf16_update_feels_the_perturbation():
    losses = {}
    for xi in (0.0, 0.5):
        torch.manual_seed(0)
        module = ATAWP(network=tiny_body, xi=xi, **PLAIN)
        trainer = quiet_trainer(precision="bf16-mixed")
        torch.manual_seed(0)
        trainer.fit(module, loader(8))
        losses[xi] = trainer.callback_metrics["train/loss"].item()
    assert losses[0.5] > losses[0.0] + 0.1


class FailBetween(Callback):
    """Fails between the loss and its backward."""

    def on_before_backward(self, trainer, module, loss):
        raise RuntimeError("half-way")


@pytest.mark.parametrize("where", ["objective", "between", "backward"])
def test_weights_come_back_after_an_exception(where):
    class Failing(ATAWP):
        def objective(self, images, adversarial, labels):
            perturbed = not torch.equal(self.network[0].weight, before[0])
            if where == "objective" and perturbed:
                raise RuntimeError("half-way")
            loss, *others = super().objective(images, adversarial, labels)
            if where == "backward" and perturbed:
                loss.register_hook(self.fail)
            return loss, *others

        def fail(self, gradient):
            raise RuntimeError("half-way")

    module = Failing(network=tiny_body, **PLAIN)
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(RuntimeError, match="half-way"):
        between = [FailBetween()] if where == "between" else []
        quiet_trainer(callbacks=between).fit(module, loader(8))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


def test_a_training_that_failed_leaves_no_decay_to_the_next():
    images, labels = images_and_labels(8)
    data = DataLoader(TensorDataset(images.double(), labels), 8)
    failed, fresh = module_for("awp"), module_for("awp")
    with pytest.raises(RuntimeError, match="half-way"):
        quiet_trainer(callbacks=[FailBetween()]).fit(failed, data)
    fresh.load_state_dict(failed.state_dict())
    for module in (failed, fresh):
        quiet_trainer().fit(module, data)
    assert same(snapshot(failed), snapshot(fresh))


def test_weights_are_found_once_an_epoch_also_in_layers_that_a_callback_replaces(monkeypatch):
    found = []

    def spied(network, **kwargs):
        found.append(layer_tensors(network, **kwargs))
        return found[-1]

    monkeypatch.setattr("robust_flatness.functional.awp.layer_tensors", spied)

    class Replaces(Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                module.network[0] = nn.Conv2d(3, 6, 3, padding=1)

    watch = Weights()
    trainer = quiet_trainer(max_epochs=2, callbacks=[Replaces(), watch])
    trainer.fit(ATAWP(tiny_body, **PLAIN), loader(32))
    # At the start, and in each of two epochs of four steps.
    assert len(found) == 3
    assert watch.inside == [True] * 8


def test_weights_come_back_after_a_loss_of_nan():
    class Broken(ATAWP):
        def objective(self, images, adversarial, labels):
            loss, *others = super().objective(images, adversarial, labels)
            return loss * torch.nan, *others

    module = Broken(network=tiny_body, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **PLAIN)
    watch = Weights()
    quiet_trainer(callbacks=[watch]).fit(module, loader(8))
    assert watch.after == [True]


class Perturbations(ATAWP):
    """Remembers the perturbations of weights, and the labels that objectives get."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.labels, self.directions = None, [], []

    def on_train_batch_start(self, batch, batch_idx):
        super().on_train_batch_start(batch, batch_idx)
        self.before = self.network[0].weight.detach().clone()

    def objective(self, images, adversarial, labels):
        self.labels.append(labels)
        return super().objective(images, adversarial, labels)

    def backward(self, loss, *args, **kwargs):
        self.directions.append((self.network[0].weight.detach() - self.before).flatten())
        super().backward(loss, *args, **kwargs)


@pytest.mark.parametrize("direction", ["adversarial", "random"])
def test_perturbations_have_length_xi_and_another_direction_in_each_step(direction):
    module = Perturbations(tiny_body, xi=XI, direction=direction, **PLAIN)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(module, loader(16))
    for bound in ("min", "max"):
        logged = trainer.callback_metrics[f"awp/relative_norm_{bound}"].item()
        assert logged == pytest.approx(XI, rel=1e-5)
    first, second, *_ = module.directions
    assert torch.cosine_similarity(first, second, dim=0).abs() < 0.9


def test_the_ascent_is_on_the_labels_that_the_step_trains_on():
    module = Perturbations(tiny_body, label_noise=0.9, **PLAIN)
    quiet_trainer().fit(module, loader(8))
    first, second = module.labels
    assert torch.equal(first, second)


def test_metrics_do_not_count_the_ascent():
    class Counts(ATAWP):
        calls = 0

        def objective(self, images, adversarial, labels):
            self.calls += 1
            loss, logits, _ = super().objective(images, adversarial, labels)
            return loss, logits, {"train/call": torch.full((8,), float(self.calls))}

    module, trainer = Counts(tiny_body, **PLAIN), quiet_trainer()
    trainer.fit(module, loader(16))
    # The second and the fourth call.
    assert trainer.callback_metrics["train/call"] == 3


def test_warms_up_as_ordinary_training():
    watch = Weights()
    module = ATAWP(network=tiny_body, warmup=0.5, **PLAIN)
    quiet_trainer(max_epochs=2, callbacks=[watch]).fit(module, loader(8))
    assert watch.inside == [False, True]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="`order` to be one of sam, awp but got adam"):
        ATAWP(network=tiny_body, order="adam")
    with pytest.raises(ValueError, match="`xi` to be >= 0 but got -0.1"):
        ATAWP(network=tiny_body, xi=-0.1)


def test_the_warm_up_is_a_share_of_training_that_ends():
    module = TRADESAWP(tiny_body, **PLAIN)
    assert (module.xi, module.warmup) == (0.005, 0.05)
    schedule = {"lr_scheduler": lambda o: torch.optim.lr_scheduler.ConstantLR(o, 1.0)}
    module = TRADESAWP(tiny_body, **PLAIN, **schedule)
    with pytest.raises(ValueError, match="as `warmup` is a share of training, but got -1"):
        quiet_trainer(max_epochs=-1, max_steps=2).fit(module, loader(8))
