"""When epochs are measured, what is logged, and what is refused before training."""

import math
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from networks_for_tests import images_and_labels, same, snapshot, tiny_body
from test_evaluation_context import LIGHT, Foreign
from torch import nn
from torch.utils.data import TensorDataset
from trainers import PLAIN, ToyData, dataset, loader, quiet_trainer

from robust_flatness.callbacks import (
    Curvature,
    EpochMeasure,
    FinalEvaluation,
    Flatness,
    Landscape,
    RobustEarlyStopping,
    RobustEvaluation,
    Trajectory,
    WeightAveraging,
    WorstCaseFlatness,
)
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import EpochCSVLogger
from robust_flatness.measures import (
    AdaptiveSharpness,
    AverageCaseFlatness,
    FirstOrderFlatness,
    GradientNorm,
    HessianTrace,
)

ATTACKED = {"eps": 0.1, "steps": 2, "batch_size": 5}
NAMED = [
    (RobustEvaluation, {**ATTACKED, "restarts": 2}),
    (Flatness, {**ATTACKED, "num_perturbations": 3}),
    (Flatness, {**ATTACKED, "num_perturbations": 3, "loss": "clean"}),
    (WorstCaseFlatness, {**ATTACKED, "restarts": 2, "xi": 0.05}),
    (Curvature, {"batch_size": 4}),
    (EpochMeasure, {"measure": AdaptiveSharpness(num_perturbations=3, **ATTACKED)}),
    (EpochMeasure, {"measure": AdaptiveSharpness(case="worst", weight_steps=3, **ATTACKED)}),
    (EpochMeasure, {"measure": HessianTrace(num_probes=2, batch_size=4)}),
    (EpochMeasure, {"measure": GradientNorm(**ATTACKED)}),
    (EpochMeasure, {"measure": FirstOrderFlatness(weight_steps=2, **ATTACKED)}),
]
VAL = {"split": "val", "dataset": dataset(12, seed=2), **LIGHT}


@pytest.mark.parametrize(("callback", "settings"), NAMED)
def test_what_is_logged_is_the_measure_of_the_first_examples(callback, settings):
    module, data = AT(tiny_body, **PLAIN), dataset(30, seed=4)
    watch = callback(dataset=data, num_examples=13, **settings)
    trainer = quiet_trainer(callbacks=[watch])
    trainer.fit(module, loader())
    before = snapshot(module)
    metrics = watch.measure.metrics(watch.measure(module, *data[:13]), "test")
    assert set(metrics) <= set(watch.metric_names)
    assert watch.metrics == metrics
    assert {name: trainer.callback_metrics[name] for name in metrics} == {
        name: torch.tensor(value) for name, value in metrics.items()
    }
    assert watch.measure.metrics(watch.evaluate(trainer, module), "test") == metrics
    # In inference mode too.
    again = callback(dataset=data, num_examples=13, **settings)
    (tested,) = quiet_trainer(callbacks=[again]).test(module, ToyData(), verbose=False)
    assert tested == {name: pytest.approx(value) for name, value in metrics.items()}
    assert same(before, snapshot(module))


def test_split_and_radius_are_those_of_the_datamodule():
    data, module = ToyData(), AT(tiny_body, **PLAIN)
    callbacks = [
        Flatness(split="train", num_perturbations=1, steps=2),
        Flatness(split="test", num_perturbations=1, steps=2, eps=0.3, loss="robust"),
    ]
    trainer = quiet_trainer(callbacks=callbacks)
    trainer.fit(module, data)
    for callback, eps in zip(callbacks, (data.eps, 0.3)):
        found = callback.measure.with_default_eps(eps)(module, *data.measured[:])
        assert callback.metrics == {f"flatness/average/{callback.split}": found.value}


@pytest.mark.parametrize(("callback", "settings"), NAMED)
def test_normalised_modules_are_measured_on_pixels(callback, settings):
    images, labels = images_and_labels(13)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    shaped = [torch.tensor(v).double().view(-1, 1, 1) for v in (mean, std)]

    class Normalised(AT):
        """Expects images that its loader has normalised."""

        def forward(self, images):
            return self.network(images)

    module = Normalised(tiny_body, **PLAIN).double().eval()
    normalised = TensorDataset((images.double() - shaped[0]) / shaped[1], labels)
    watch = callback(dataset=normalised, normalization=(mean, std), **settings)
    metrics = watch.compute(quiet_trainer(), module)

    class InPixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner((x - shaped[0]) / shaped[1])

    expected = watch.measure(InPixels(), images.double(), labels)
    assert metrics == pytest.approx(watch.measure.metrics(expected, "test"), abs=1e-6)


def test_two_splits_live_side_by_side(tmp_path):
    callbacks = [Curvature(dataset=dataset(9), batch_size=4)]
    callbacks += [Flatness(split=s, num_perturbations=1, **LIGHT) for s in ("test", "train")]
    callbacks += [Curvature(split="train", dataset=dataset(9, seed=8), batch_size=4)]
    trainer = quiet_trainer(callbacks=callbacks)
    trainer.fit(Foreign())
    logged = trainer.callback_metrics
    assert {"flatness/average/test", "flatness/average/train"} <= set(logged)
    assert logged["hessian/max_eigenvalue"] != logged["hessian/train/max_eigenvalue"]
    trainer.save_checkpoint(tmp_path / "a.ckpt")


SAME_NAMES = [
    (
        [RobustEarlyStopping(**VAL), RobustEvaluation(**VAL)],
        r"RobustEarlyStopping\[val\] and RobustEvaluation\[val\], which both log val/error, "
        "val/robust_error, val/robust_loss; ",
    ),
    (
        [Flatness(xi=0.1, **VAL), EpochMeasure(measure=AverageCaseFlatness(), split="val")],
        r"Flatness\[val\] and EpochMeasure\[AverageCaseFlatness, val\], which both log "
        "flatness/average/val, flatness/average/val_sem; ",
    ),
]


@pytest.mark.parametrize(("callbacks", "message"), SAME_NAMES)
def test_metrics_of_one_name_by_two_callbacks_are_refused_before_training(callbacks, message):
    with pytest.raises(ValueError, match=message):
        quiet_trainer(callbacks=callbacks).fit(Returns(lambda z: z))


def test_metrics_of_one_name_are_refused_in_tests_if_both_are_measured_there():
    light = {**LIGHT, "dataset": dataset(4)}
    with pytest.raises(ValueError, match="which both log test/error, "):
        quiet_trainer(callbacks=[RobustEvaluation(**light), RobustEvaluation(**light)]).test(
            Foreign(), verbose=False
        )
    stopping = RobustEarlyStopping(split="test", **light)
    trainer = quiet_trainer(callbacks=[stopping, RobustEvaluation(**light)])
    (tested,) = trainer.test(Foreign(), verbose=False)
    assert "test/error" in tested


def test_in_tests_measures_of_the_end_come_first():
    data = dataset(6)
    # The larger radius would give the larger values.
    light = {"dataset": data, "eps": 0.5, "steps": 1}
    callbacks = [RobustEvaluation(**light), Flatness(**light), Curvature(dataset=data)]
    final = FinalEvaluation(
        splits=["test"], datasets={"test": data}, eps=0.01, steps=1, restarts=1, num_perturbations=2
    )
    trainer = quiet_trainer(callbacks=[*callbacks, final])
    (tested,) = trainer.test(Foreign(), verbose=False)
    assert tested.keys() - final.final_results["final"] == {*callbacks[2].metric_names}
    for name, value in final.final_results["final"].items():
        assert tested[name] == pytest.approx(value)


class LogsItself(Foreign):
    """Logs the clean error under the name that a measure has."""

    def validation_step(self, batch, batch_idx):
        self.log("val/robust_loss", 0.25)

    test_step = validation_step


TAKEN = (
    r"Expected Counted\[val\] alone to log val/robust_loss but something else logged 0.25 under "
    "this name; rename that metric, such as in `self.log` of LogsItself."
)


def test_a_name_that_the_module_logs_is_refused_before_training(monkeypatch):
    monkeypatch.setattr(LogsItself, "training_step", Returns.training_step)
    with pytest.raises(ValueError, match=TAKEN):
        quiet_trainer(callbacks=[Counted()]).fit(LogsItself())


@pytest.mark.parametrize(("every", "epoch"), [(1, 1), (9, 2)])
def test_a_name_that_the_module_logs_is_refused_before_it_is_merged(every, epoch):
    # The module begins to log after the first measurement.
    settings = {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2, "max_epochs": 3}
    trainer = quiet_trainer(callbacks=[Counted(every_n_epochs=every)], **settings)
    with pytest.raises(ValueError, match=TAKEN):
        trainer.fit(LogsItself())
    assert trainer.current_epoch == epoch


def test_a_name_that_the_module_logs_is_refused_in_tests():
    with pytest.raises(ValueError, match=TAKEN):
        quiet_trainer(callbacks=[Counted()]).test(LogsItself(), verbose=False)


def test_own_metrics_of_earlier_epochs_and_fits_are_not_taken_for_others():
    class Gaps(Counted):
        def compute(self, trainer, module):
            values = {"val/robust_loss": math.nan, "val/error": 1 / 3, "val/robust_error": math.inf}
            # One is not defined in every other epoch.
            return dict([*values.items()][: 3 - trainer.current_epoch % 2])

    trainer, module = quiet_trainer(callbacks=[callback := Gaps()], max_epochs=4), Foreign()
    trainer.fit(module)
    trainer.fit_loop.max_epochs = 6
    trainer.fit(module)
    trainer.test(module, verbose=False)
    assert len(callback.weights) == 6


def test_a_diverged_network_is_logged_as_not_finite():
    module = AT(tiny_body, **PLAIN)
    with torch.no_grad():
        module.network[0].weight.fill_(float("nan"))
    trainer = quiet_trainer(callbacks=[Curvature(dataset=dataset(4), batch_size=4)])
    with pytest.warns(UserWarning, match="not finite"):
        trainer.test(module, loader(), verbose=False)
    assert trainer.callback_metrics["hessian/max_eigenvalue"].isnan()


class Counted(RobustEvaluation):
    """Says in which epochs it measured which weights."""

    def __init__(self, **kwargs):
        super().__init__(**VAL, **kwargs)
        self.weights = {}

    def measure_epoch(self, trainer, module, epoch):
        self.weights[epoch] = module.net[0].weight.detach().clone()
        return super().measure_epoch(trainer, module, epoch)

    def compute(self, trainer, module):
        return {"val/robust_loss": float(len(self.weights))}


class Stop(Callback):
    """Asks for an end in a hook of an epoch."""

    def __init__(self, hook):
        self.epochs = (0, 3) if hook == "on_train_start" else (3,)
        setattr(self, hook, self._stop)

    def _stop(self, trainer, *args):
        trainer.should_stop = trainer.should_stop or trainer.current_epoch in self.epochs


ENDS = {
    "max_epochs": ({"max_epochs": 4}, None),
    "max_steps": ({"max_steps": 16}, None),
    "max_steps within an epoch": ({"max_steps": 14}, None),
    "endless": ({"max_epochs": -1, "max_steps": 14}, None),
    "should_stop in a batch": ({}, "on_train_batch_end"),
    "should_stop at the end": ({}, "on_train_epoch_end"),
    "should_stop too early": ({"min_epochs": 4, "max_steps": 14}, "on_train_start"),
    "EarlyStopping": ({}, EarlyStopping),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_the_last_epoch_is_measured_however_training_ends(tmp_path, end, first):
    settings, other = ENDS[end]
    if other is EarlyStopping:
        others = [EarlyStopping("val/robust_loss", patience=1)]
    else:
        others = [] if other is None else [Stop(other)]
    callback, table = Counted(every_n_epochs=5), EpochCSVLogger(tmp_path)
    callbacks = [*others, callback] if first else [callback, *others]
    trainer = quiet_trainer(
        **{"max_epochs": 100, **settings},
        callbacks=[*callbacks, Trajectory(figures=False)],
        logger=table,
    )
    module = Foreign()
    trainer.fit(module)
    last = trainer.current_epoch - 1
    assert last == (1 if end == "EarlyStopping" else 3)
    assert list(callback.weights) == [0, last]
    assert torch.equal(callback.weights[last], module.net[0].weight)
    # The figure is where others look for it.
    rows = {row["epoch"]: row.get("val/robust_loss") for row in table.rows}
    assert rows[0] == 1
    assert rows[last] == 2
    assert trainer.callback_metrics["val/robust_loss"] == 2
    assert callback.measured_step == trainer.global_step
    # An end that is known at the epoch's end is logged like any epoch, for stock callbacks.
    unknown = end == "EarlyStopping" or (end == "should_stop at the end" and not first)
    assert callback.measured_late == unknown


def test_max_time_ends_with_a_measure():
    callback = Counted(every_n_epochs=1000)
    timer = Timer(timedelta(seconds=0.3))
    quiet_trainer(max_epochs=-1, callbacks=[callback, timer]).fit(module := Foreign())
    assert len(callback.weights) == 2
    assert torch.equal(callback.weights[max(callback.weights)], module.net[0].weight)


def test_a_run_that_goes_on_measures_each_end_once(tmp_path):
    path, callback = tmp_path / "a.ckpt", Counted(every_n_epochs=5)
    trainer = quiet_trainer(max_epochs=100, max_steps=14, callbacks=[callback])
    trainer.fit(Foreign())
    trainer.save_checkpoint(path)
    for steps, epochs in ((14, []), (28, [5, 7])):
        callback = Counted(every_n_epochs=5)
        trainer = quiet_trainer(max_epochs=100, max_steps=steps, callbacks=[callback])
        trainer.fit(Foreign(), ckpt_path=path, weights_only=True)
        assert list(callback.weights) == epochs


class Breaks(Foreign):
    """Has weights that are not finite from some epoch on."""

    def __init__(self, epoch=1, value=math.nan):
        super().__init__()
        self.epoch, self.value = epoch, value

    def on_train_epoch_start(self):
        if self.current_epoch == self.epoch:
            with torch.no_grad():
                self.net[8].weight.fill_(self.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_logged_and_stops_stock_early_stopping(tmp_path, value):
    measures = [RobustEvaluation(**VAL), Flatness(num_perturbations=1, **VAL)]
    stock = EarlyStopping("val/robust_loss", patience=100, check_finite=True)
    table = EpochCSVLogger(tmp_path)
    trainer = quiet_trainer(max_epochs=4, callbacks=[*measures, stock], logger=table)
    trainer.fit(Breaks(value=value))
    assert trainer.current_epoch == 2
    assert "not finite" in stock.stopping_reason_message
    for name in ("val/robust_loss", "flatness/average/val", "val/robust_loss_incorrect"):
        assert not math.isfinite(trainer.callback_metrics[name])
        assert not math.isfinite(EpochCSVLogger(tmp_path).rows[1][name])
    assert trainer.callback_metrics["val/robust_error"] == 1
    # Undefined is something else: there is one direction, and no example is correct any more.
    assert "flatness/average/val_sem" not in trainer.callback_metrics
    assert "val/robust_loss_correct" not in table.rows[1]


PRECISIONS = ["64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"]


class Typed(Foreign):
    """Trains in any precision, and makes a tensor of its default type in its forward."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0].to(self.dtype)), batch[1])

    def forward(self, x):
        return self.net(x) @ torch.eye(10)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_measure_works_in_every_precision(tmp_path, precision):
    images = dataset(4, double=True)
    light = {"split": "val", "dataset": images, "batch_size": 3}
    attacked = {**light, "eps": 0.1, "steps": 1}
    final = FinalEvaluation(
        splits=["val"],
        datasets={"val": images},
        eps=0.1,
        steps=1,
        restarts=1,
        num_perturbations=2,
        extras="all",
    )
    stopping = RobustEarlyStopping(**attacked)
    kinds = ["random", "adversarial", "hessian"]
    callbacks = [
        WeightAveraging(0.5, reference_steps=None, dataset=images, batch_norm="reestimate"),
        Flatness(num_perturbations=2, **attacked),
        WorstCaseFlatness(restarts=1, **attacked),
        Curvature(**light),
        Landscape(directions=kinds, num_directions=1, num_steps=2, surface_steps=2, **attacked),
        stopping,
        final,
    ]
    module = Typed()
    trainer = quiet_trainer(callbacks=callbacks, precision=precision, default_root_dir=tmp_path)
    trainer.fit(module)
    figures = final.final_results["final"]
    assert len(figures) > 10
    assert all(map(math.isfinite, figures.values()))
    logged = trainer.callback_metrics["val/robust_loss"].item()
    assert figures["val/robust_loss"] == pytest.approx(logged, 1e-6)
    own = module.net[0].weight.dtype
    assert own == {"64": torch.float64, "bf": torch.bfloat16, "16": torch.float16}.get(
        precision.removesuffix("-true")[:2] if "true" in precision else "", torch.float32
    )
    assert stopping.best_weights["net.0.weight"].dtype == own


def test_averages_of_half_precision_weights_cause_a_warning():
    averaging = WeightAveraging(0.5, reference_steps=None)
    with pytest.warns(UserWarning, match="weights in half precision"):
        quiet_trainer(callbacks=[averaging], precision="bf16-true").fit(Typed())


class Returns(Foreign):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(super().forward(x))

    def training_step(self, batch, batch_idx):
        raise AssertionError("training has begun")


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize("change", [lambda z: (z, z), lambda z: {"logits": z}, lambda z: z[None]])
def test_other_outputs_than_logits_are_refused_before_training(change, stage):
    measures = [
        Flatness(dataset=dataset(4), **LIGHT),
        FinalEvaluation(splits=["test"], datasets={"test": dataset(4)}, eps=0.1, steps=1),
    ]
    for measure in measures:
        run = getattr(quiet_trainer(callbacks=[measure]), stage)
        with pytest.raises(ValueError, match="`model` to return logits of shape"):
            run(Returns(change))


def test_probabilities_cause_one_warning_before_training():
    measures = [Flatness(**VAL), RobustEvaluation(**VAL)]
    with (
        pytest.warns(UserWarning, match="look like probabilities") as seen,
        pytest.raises(AssertionError, match="training has begun"),
    ):
        quiet_trainer(callbacks=measures).fit(Returns(lambda z: z.softmax(1)))
    assert sum("probabilities" in str(warning.message) for warning in seen) == 1


@pytest.mark.parametrize("make", [Flatness, RobustEvaluation, FinalEvaluation, Landscape])
def test_radii_of_pixels_up_to_255_are_refused_with_the_likely_intention(make):
    with pytest.raises(ValueError, match=r"`eps` to be in \[0, 1\] .* but got 8; .* is 8/255"):
        make(eps=8)
    make(eps=8, norm="l2")
    with pytest.raises(ValueError, match=r"`step_size` .* is 2/255"):
        make(step_size=2)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "valid"}, "`split` to be one of train, val, test but got valid"),
        ({"num_examples": 0}, "`num_examples` to be >= 1 but got 0"),
        ({"every_n_epochs": 0}, "`every_n_epochs` to be >= 1 but got 0"),
        ({"num_perturbations": 0}, "`num_perturbations` to be >= 1 but got 0"),
        ({"normalization": ([0.5], [0.0])}, r"`normalization` to be \(mean, std\), .* but got"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Flatness(**kwargs)


def test_the_radius_of_the_data_is_refused_before_training():
    data = ToyData()
    data.eps = 8
    module = Foreign()
    before = module.net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"`data.eps` .* is 8/255"):
        quiet_trainer(callbacks=[Flatness(num_examples=4)]).fit(module, datamodule=data)
    assert torch.equal(before, module.net[0].weight)
    measures = [RobustEvaluation(num_examples=4, norm="l2", steps=1), Curvature(num_examples=4)]
    quiet_trainer(callbacks=measures).fit(Foreign(), datamodule=data)
