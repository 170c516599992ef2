import pytest
from matplotlib.figure import Figure
from run_factory import make_run

from robust_flatness.reporting.models import Model, group_models
from robust_flatness.reporting.series import draw_series, model_series, select_models


def rows(losses: dict[int, float], name: str = "test/robust_loss") -> list[dict[str, float]]:
    return [{"epoch": epoch, name: loss} for epoch, loss in losses.items()]


def model(*runs) -> Model:
    (found,) = group_models(runs)
    return found


def test_mean_and_range_are_over_the_epochs_that_all_seeds_have() -> None:
    first = make_run(seed=0, trajectory=rows({0: 1.0, 1: 2.0, 3: 4.0}), epochs=4)
    second = make_run(seed=1, trajectory=rows({0: 3.0, 2: 9.0, 3: 5.0}), epochs=4)
    without = make_run(seed=2, trajectory=rows({0: 9.0}, "train/loss"), epochs=4)
    series = model_series(model(first, second, without), "test/robust_loss")
    assert series.shares == (0.25, 1.0)
    assert (series.mean, series.low, series.high) == ((2.0, 4.5), (1.0, 4.0), (3.0, 5.0))
    assert series.num_seeds == 2


def test_the_first_name_that_was_measured_is_taken() -> None:
    seen = model(make_run(trajectory=rows({0: 2.0}, "train/robust_loss")))
    assert model_series(seen, "train_eval/robust_loss", "train/robust_loss").mean == (2.0,)
    assert model_series(seen, "test/robust_loss") is None
    apart = (
        make_run(seed=0, trajectory=rows({0: 1.0})),
        make_run(seed=1, trajectory=rows({1: 1.0})),
    )
    assert model_series(model(*apart), "test/robust_loss") is None


@pytest.mark.parametrize(("seeds", "bands"), [(1, 0), (2, 1)])
def test_a_band_is_drawn_for_several_seeds(seeds: int, bands: int) -> None:
    axes = Figure().add_subplot()
    runs = [make_run(seed=s, trajectory=rows({0: s + 1.0, 1: s + 3.0})) for s in range(seeds)]
    draw_series(axes, model_series(model(*runs), "test/robust_loss"), colour="#000000", label="x")
    assert len(axes.collections) == bands
    assert axes.lines[0].get_label() == "x"
    if bands:
        vertices = axes.collections[0].get_paths()[0].vertices
        assert (vertices[:, 1].min(), vertices[:, 1].max()) == (1.0, 4.0)


def settings(batch_size: int = 64, optimizer: str = "SGD", lam: float = 6.0) -> dict:
    optimizer = {"class_path": f"torch.optim.{optimizer}"}
    return {
        "data": {"init_args": {"batch_size": batch_size}},
        "model": {"init_args": {"lam": lam, "optimizer": optimizer}},
    }


def labels(models: list[Model]) -> list[str]:
    return [found.label for found in models]


def test_each_method_comes_once_before_any_comes_twice() -> None:
    runs = [make_run("trades", settings=settings(lam=lam)) for lam in (1.0, 6.0, 9.0)]
    runs += [make_run("at", settings=settings()), make_run("mart", settings=settings())]
    models = group_models(runs)
    assert labels(select_models(models, ["at", "trades"], 4)) == [
        "AT",
        "TRADES lam=1",
        "MART",
        "TRADES lam=6",
    ]
    assert labels(select_models(models, [], 9)[-2:]) == ["TRADES lam=6", "TRADES lam=9"]
    assert select_models([], ["at"], 4) == []


def test_another_batch_size_and_adam_are_families_of_their_own() -> None:
    runs = [make_run("at", settings=settings(8)), make_run("at", settings=settings(64))]
    runs += [make_run("at", settings=settings(64, "Adam")), make_run("mart", settings=settings())]
    # A row of Table 1 whose preset has another batch size stays that row.
    runs += [make_run("unlabeled", settings=settings(128))]
    chosen = select_models(group_models(runs), ["at", "unlabeled", "Adam", "another batch size"], 9)
    found = [(m.method, m.differs.get("data.batch_size"), "Adam" in m.label) for m in chosen]
    assert found == [
        ("at", 64, False),
        ("unlabeled", None, False),
        ("at", 64, True),
        ("at", 8, False),
        ("mart", None, False),
    ]
