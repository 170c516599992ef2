"""Measures as plain objects: values, names, cost, and images that processes share out."""

import math
from dataclasses import dataclass

import pytest
import torch
from networks_for_tests import images_and_labels, same, snapshot, tiny_body, tiny_network
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from trainers import PLAIN, loader, quiet_trainer

from robust_flatness.callbacks import EpochMeasure, FinalEvaluation, evaluate
from robust_flatness.callbacks.final_evaluation import EXTRAS
from robust_flatness.functional import (
    adaptive_sharpness,
    average_case_flatness,
    evaluate_robustness,
    first_order_flatness,
    gradient_norm,
    hessian_extreme_eigenvalues,
    hessian_trace,
    pgd_attack,
    worst_case_flatness,
)
from robust_flatness.functional.evaluation import evaluation_context
from robust_flatness.lightning_modules import AT
from robust_flatness.measures import (
    AdaptiveSharpness,
    AutoAttackError,
    AverageCaseFlatness,
    Curvature,
    Examples,
    FirstOrderFlatness,
    GradientNorm,
    HessianTrace,
    Measure,
    RobustLoss,
    WorstCaseFlatness,
)
from robust_flatness.measures.base import Processes

ATTACK = {"eps": 0.1, "steps": 2, "batch_size": 5}
FLAT = {**ATTACK, "num_perturbations": 3}
WORST = {**ATTACK, "restarts": 2, "xi": 0.05, "weight_step": 0.03}
AVERAGE = {**ATTACK, "num_perturbations": 3, "rho": 0.3}
ADAPTIVE = {**ATTACK, "case": "worst", "weight_steps": 6, "rho": 0.05}
# One batch, as the function attacks the images at once.
ATTACKED = {"loss": "robust", "eps": 0.1, "steps": 2, "batch_size": 13}


def at_fixed_examples(function):
    """A function of images as one of the images that are attacked at the weights."""

    def call(network, images, labels, *, loss, eps=0.0, steps=0, **arguments):
        if loss == "robust":
            seed = arguments.get("seed", 0)
            images = pgd_attack(network, images, labels, eps=eps, steps=steps, seed=seed)
        return function(network, images, labels, **arguments)

    return call


# Class, function, and arguments of both.
CASES = [
    (RobustLoss, evaluate_robustness, {**ATTACK, "restarts": 2, "seed": 3}),
    (RobustLoss, evaluate_robustness, {**ATTACK, "restarts": 1, "norm": "l2", "step_size": 0.1}),
    (RobustLoss, evaluate_robustness, {**ATTACK, "steps": 0, "restarts": 1}),
    (AverageCaseFlatness, average_case_flatness, FLAT),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "restarts": 2, "seed": 3}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "num_perturbations": 1}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "loss": "clean"}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "protocol": "paper"}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "loss": "clean", "protocol": "paper"}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "distribution": "ball"}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "relative_to": "filter", "xi": 0.3}),
    (AverageCaseFlatness, average_case_flatness, {**FLAT, "per_batch": True}),
    (WorstCaseFlatness, worst_case_flatness, WORST),
    (WorstCaseFlatness, worst_case_flatness, {**WORST, "loss": "clean"}),
    (WorstCaseFlatness, worst_case_flatness, {**WORST, "per_batch": True}),
    (WorstCaseFlatness, worst_case_flatness, {**WORST, "norm": "l2"}),
    # Weights stay at their start and images overshoot, so that the last iterate is not best.
    (
        WorstCaseFlatness,
        worst_case_flatness,
        {**WORST, "keep": "best", "weight_step": 0.0, "step_size": 0.2},
    ),
    (Curvature, hessian_extreme_eigenvalues, {"seed": 3, "tolerance": 0.9, "batch_size": 4}),
    (AdaptiveSharpness, adaptive_sharpness, AVERAGE),
    (AdaptiveSharpness, adaptive_sharpness, {**AVERAGE, "restarts": 2, "weight_norm": "l2"}),
    (AdaptiveSharpness, adaptive_sharpness, {**AVERAGE, "loss": "clean", "parameters": "all"}),
    (AdaptiveSharpness, adaptive_sharpness, {**AVERAGE, "normalize_logits": True}),
    (AdaptiveSharpness, adaptive_sharpness, {**AVERAGE, "batch_size": 13, "eta": 0.1}),
    (AdaptiveSharpness, adaptive_sharpness, ADAPTIVE),
    (AdaptiveSharpness, adaptive_sharpness, {**ADAPTIVE, "restarts": 2, "weight_norm": "l2"}),
    (AdaptiveSharpness, adaptive_sharpness, {**ADAPTIVE, "loss": "clean", "eta": 0.1}),
    (AdaptiveSharpness, adaptive_sharpness, {**ADAPTIVE, "normalize_logits": True}),
    (AdaptiveSharpness, adaptive_sharpness, {**ADAPTIVE, "steps": 0, "restarts": 2, "rho": 0.2}),
    *(
        (kind, at_fixed_examples(function), arguments)
        for kind, function, own in (
            (HessianTrace, hessian_trace, {"num_probes": 3}),
            (GradientNorm, gradient_norm, {}),
            (FirstOrderFlatness, first_order_flatness, {"weight_steps": 2, "rho": 0.3}),
        )
        for arguments in (
            {**own, **ATTACKED},
            {**own, "loss": "clean", "batch_size": 4},
        )
    ),
]
IDS = [f"{c[0].__name__}-{i}" for i, c in enumerate(CASES)]


def data(*, double: bool = False) -> tuple[Tensor, Tensor]:
    images, labels = images_and_labels(13, seed=4)
    return images.double() if double else images, labels


@pytest.mark.parametrize("kind", [RobustLoss, AverageCaseFlatness, AutoAttackError])
def test_pixels_outside_of_0_to_1_are_refused(kind):
    images, labels = data()
    with pytest.raises(ValueError, match="Expected `images` to have pixels in "):
        kind()(tiny_network(), 255 * images, labels)


@pytest.mark.parametrize(("kind", "function", "settings"), CASES, ids=IDS)
def test_values_are_those_of_the_function_and_the_network_is_left_alone(kind, function, settings):
    network, measure = tiny_network(), kind(**settings)
    before, state = snapshot(network), torch.get_rng_state()
    result = measure(network, *data())
    assert same(before, snapshot(network))
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    expected = function(network, *data(), **settings)
    for split in ("test", "train"):
        metrics = measure.metrics(result, split)
        assert metrics == measure.metrics(expected, split)
        assert set(metrics) <= set(measure.metric_names(split))
        assert all(map(math.isfinite, metrics.values()))
        arrays = measure.arrays(result, split)
        assert all(values.shape == (13,) for values in arrays.values())
        for name in arrays.keys() & metrics.keys():
            assert arrays[name].double().mean().item() == pytest.approx(metrics[name])


def test_options_change_the_value():
    found = {}
    for kind, _, settings in CASES:
        measure = kind(**settings)
        metrics = measure.metrics(measure(tiny_network(), *data()), "test")
        found[f"{kind.__name__} {settings}"] = next(reversed(metrics.values()))
    assert len(set(found.values())) >= len(found) - 1, found


class Counted(nn.Module):
    """Counts images that pass through it, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.passes = tiny_network(), [0, 0]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        self.passes[0] += len(images)
        if logits.requires_grad:
            logits.register_hook(self._count_backward)
        return logits

    def _count_backward(self, gradient: Tensor) -> None:
        self.passes[1] += len(gradient)


class Bar:
    """Stands in for a progress bar."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.steps = 0

    def __call__(self, text: str, total: int) -> "Bar":
        self.totals.append(total)
        return self

    def __enter__(self):
        return self.step

    def __exit__(self, *_: object) -> None:
        pass

    def step(self) -> None:
        self.steps += 1


@pytest.mark.parametrize(("kind", "function", "settings"), CASES, ids=IDS)
def test_passes_and_progress_are_those_announced(kind, function, settings):
    network, measure, bar = Counted(), kind(**settings), Bar()
    examples = Examples(*data(), range(13))
    with evaluation_context(network):
        measure.measure_set(network, examples, Processes(bar=bar))
    if kind is Curvature:
        assert measure.passes() is None
        assert bar.totals == []
    else:
        assert network.passes == [13 * number for number in measure.passes()]
        assert bar.totals == ([] if measure.whole_set else [bar.steps])


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("kind", [RobustLoss, AverageCaseFlatness, WorstCaseFlatness])
def test_chunk_size_does_not_change_the_value(kind, chunk):
    network = tiny_network().double()
    plain, other = (
        kind(eps=0.1, steps=2, restarts=2, batch_size=size)(network, *data(double=True))
        for size in (5, chunk)
    )
    for name, value in kind().metrics(plain, "test").items():
        assert kind().metrics(other, "test")[name] == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_shares_of_processes_are_measured_as_the_whole_set(world):
    """What each process fills into its table adds up to the table of one process."""
    measure, whole = RobustLoss(**ATTACK), Examples(*data(), range(13))
    network = tiny_network().eval()
    expected = measure(network, *data())
    total = torch.zeros(13)
    for rank in range(world):
        mine = Processes(rank, world).indices(13, measure.batch_size)
        part = Examples(whole.images[mine], whole.labels[mine], mine)
        with evaluation_context(network):
            total[mine] += measure.measure(network, part).losses
    assert torch.equal(total.double(), expected.losses)


@pytest.mark.parametrize("kind", [GradientNorm, HessianTrace, FirstOrderFlatness])
def test_derivatives_of_no_images_are_refused(kind):
    images, labels = data()
    with pytest.raises(ValueError, match="`images` to hold at least one image but got none"):
        kind()(tiny_network(), images[:0], labels[:0])


@pytest.mark.parametrize("kind", [GradientNorm, HessianTrace, FirstOrderFlatness])
def test_processes_on_gpus_agree_on_results_on_the_cpu(kind, monkeypatch):
    def refuse(tensor, src):
        raise RuntimeError(f"No backend type associated with device type {tensor.device}")

    # NCCL takes tensors of GPUs alone.
    monkeypatch.setattr(torch.distributed, "broadcast", refuse)
    sent = []
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda objects, src: sent.extend(objects)
    )
    result = kind(**ATTACK)(tiny_network(), *data())
    assert Processes(0, 2).agree(result) == result
    tensors = {name for name, value in vars(result).items() if isinstance(value, torch.Tensor)}
    assert tensors <= sent[0].keys()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_search_may_be_in_bfloat16_and_losses_are_in_float32(precision, cpu_as_gpu):
    network, types = tiny_network(), []
    network.register_forward_hook(lambda *given: types.append(given[-1].dtype))
    measure = RobustLoss(**ATTACK, precision=precision)
    result = measure(network, *data())
    searched = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]
    assert set(types) == {searched, torch.float32}
    assert types[-1] == torch.float32
    exact = RobustLoss(**ATTACK)(tiny_network(), *data())
    assert result.robust_loss == pytest.approx(exact.robust_loss, rel=0.05)
    assert torch.equal(result.clean_losses, exact.clean_losses)


def test_the_radius_of_the_data_is_used_if_a_measure_names_none():
    assert AverageCaseFlatness().with_default_eps(0.25).pgd.eps == 0.25
    assert AverageCaseFlatness(eps=0.3).with_default_eps(0.25).pgd.eps == 0.3
    assert AverageCaseFlatness().pgd.eps == 8 / 255
    assert AutoAttackError().with_default_eps(0.25).radius == 0.25
    assert Curvature().with_default_eps(8) == Curvature()
    with pytest.raises(ValueError, match=r"`data.eps` to be in \[0, 1\] .* is 8/255"):
        RobustLoss().with_default_eps(8)
    RobustLoss(norm="l2").with_default_eps(8)


@dataclass(frozen=True)
class Margins:
    margins: Tensor


@dataclass(kw_only=True)
class Margin(Measure):
    """A measure of somebody else."""

    def measure(self, network, examples):
        logits = network(examples.images).detach()
        others = logits.scatter(1, examples.labels[:, None], -math.inf).amax(1)
        return Margins(logits.gather(1, examples.labels[:, None])[:, 0] - others)

    def metric_names(self, split):
        return (f"margin/{split}",)

    def values(self, result):
        return (result.margins.mean().item(),)


def test_a_new_measure_is_a_class_and_a_line(monkeypatch):
    result = Margin(batch_size=4)(tiny_network(), *data())
    assert result.margins.shape == (13,)
    metrics = {"margin/test": result.margins.mean().item()}
    assert Margin().metrics(result, "test") == metrics
    monkeypatch.setitem(EXTRAS, "margin", lambda e: Margin(batch_size=e.measure.batch_size))
    final = FinalEvaluation(splits=["test"], extras="margin", steps=1, restarts=1, batch_size=4)
    found = evaluate(tiny_network(), data(), [final], accelerator="cpu", enable_progress_bar=False)
    assert metrics.items() <= found.items()
    watch = EpochMeasure(measure=Margin(batch_size=4), dataset=TensorDataset(*data()))
    trainer = quiet_trainer(callbacks=[watch])
    trainer.fit(AT(tiny_body, **PLAIN), loader())
    assert watch.state_key == "EpochMeasure[Margin, test]"
    assert set(trainer.callback_metrics) >= {"margin/test"}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (RobustLoss, {"restarts": 0}, "`restarts` to be >= 1 but got 0"),
        (RobustLoss, {"batch_size": 0}, "`batch_size` to be >= 1 but got 0"),
        (RobustLoss, {"steps": -1}, "`steps` to be >= 0 but got -1"),
        (RobustLoss, {"precision": "half"}, "`precision` to be one of float32, bfloat16 but got h"),
        (RobustLoss, {"norm": "l1"}, "`norm` to be one of linf, l2 but got l1"),
        (RobustLoss, {"step_size": 2}, "`step_size` .* is 2/255"),
        (AverageCaseFlatness, {"num_perturbations": 0}, "`num_perturbations` to be >= 1 but got 0"),
        (AverageCaseFlatness, {"eps": -1.0}, "`eps` to be >= 0 but got -1.0"),
        (AverageCaseFlatness, {"xi": -0.5}, "`xi` to be >= 0 but got -0.5"),
        (AverageCaseFlatness, {"loss": "both"}, "`loss` to be one of robust, clean but got both"),
        (AverageCaseFlatness, {"protocol": "own"}, "`protocol` to be one of shared, paper but got"),
        (AverageCaseFlatness, {"distribution": "box"}, "`distribution` to be one of sphere, ball"),
        (AverageCaseFlatness, {"relative_to": "row"}, "`relative_to` to be one of layer, .* row"),
        (WorstCaseFlatness, {"xi": -0.5}, "`xi` to be >= 0 but got -0.5"),
        (WorstCaseFlatness, {"steps": 0}, "`steps` to be >= 1 but got 0"),
        (WorstCaseFlatness, {"weight_step": -1.0}, "`weight_step` to be >= 0 but got -1.0"),
        (WorstCaseFlatness, {"loss": "both"}, "`loss` to be one of robust, clean but got both"),
        (WorstCaseFlatness, {"keep": "first"}, "`keep` to be one of best, last but got first"),
        (Curvature, {"tolerance": 0.0}, "`tolerance` to be in"),
        (AdaptiveSharpness, {"rho": -1.0}, "`rho` to be >= 0 but got -1.0"),
        (AdaptiveSharpness, {"case": "best"}, "`case` to be one of average, worst but got best"),
        (AdaptiveSharpness, {"weight_norm": "l1"}, "`weight_norm` to be one of linf, l2 but"),
        (AdaptiveSharpness, {"parameters": "some"}, "`parameters` to be one of weights, all but"),
        (AdaptiveSharpness, {"num_perturbations": 0}, "`num_perturbations` to be >= 1 but got 0"),
        (AdaptiveSharpness, {"weight_steps": 0}, "`weight_steps` to be >= 1 but got 0"),
        (AdaptiveSharpness, {"eta": -1.0}, "`eta` to be >= 0 but got -1.0"),
        (HessianTrace, {"num_probes": 0}, "`num_probes` to be >= 1 but got 0"),
        (FirstOrderFlatness, {"weight_steps": 0}, "`weight_steps` to be >= 1 but got 0"),
        (FirstOrderFlatness, {"rho": -1.0}, "`rho` to be >= 0 but got -1.0"),
    ],
)
def test_bad_arguments_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)
