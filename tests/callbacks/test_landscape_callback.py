import json

import numpy as np
import pytest
import torch
import wandb
from networks_for_tests import same, snapshot, tiny_body
from trainers import PLAIN, ToyData, quiet_trainer
from wandb_reader import read_runs

from robust_flatness.callbacks import Landscape, RobustEarlyStopping
from robust_flatness.functional import loss_landscape, loss_surface
from robust_flatness.lightning_modules import AT
from robust_flatness.loggers import make_wandb_logger
from robust_flatness.run_folder.files import read_landscapes

LIGHT = {"num_examples": 9, "batch_size": 4, "num_steps": 3, "num_directions": 2, "steps": 2}


class Scripted(RobustEarlyStopping):
    def compute(self, trainer, module):
        return {"val/robust_error": 0.1 + 0.1 * trainer.current_epoch}


def fitted(folder, callbacks, **kwargs) -> AT:
    torch.manual_seed(0)
    module = AT(tiny_body, **PLAIN)
    torch.manual_seed(0)
    trainer = quiet_trainer(default_root_dir=folder, callbacks=callbacks, **kwargs)
    trainer.fit(module, ToyData())
    return module


def test_file_holds_the_functional_losses_and_is_complete(tmp_path):
    kinds = ["random", "adversarial", "hessian"]
    module = fitted(tmp_path, [Landscape(directions=kinds, surface_steps=2, seed=3, **LIGHT)])
    with np.load(tmp_path / "landscapes.npz", allow_pickle=False) as file:
        names = [f"final/{kind}" for kind in (*kinds, "surface")]
        assert file["names"].tolist() == names
        parts = {f"{name}/{part}" for name in names for part in ("coordinates", "losses")}
        assert set(file.files) == {"names", "settings"} | parts
        settings = json.loads(str(file["settings"]))
    assert settings["length"] == {
        "random": 0.5,
        "adversarial": 0.025,
        "hessian": 0.5,
        "surface": 0.5,
    }
    assert settings["eps"] == 0.1
    assert settings["num_examples"] == 9
    assert "network.0.weight" in settings["perturbed"]
    landscapes, again = read_landscapes(tmp_path / "landscapes.npz")
    assert again == settings
    images, labels = ToyData().measured[:9]
    common = {"eps": 0.1, "steps": 2, "seed": 3, "batch_size": 4}
    for kind, count in zip(kinds, (2, 2, 1)):
        expected = loss_landscape(
            module.eval(),
            images,
            labels,
            directions=kind,
            num_steps=3,
            num_directions=count,
            **common,
        )
        found = landscapes[f"final/{kind}"]
        assert found.losses.shape == (count, 3, 9)
        assert (found.coordinates == expected.coordinates.numpy()).all()
        assert (found.losses == expected.losses.numpy()).all()
    expected = loss_surface(module, images, labels, num_steps=2, **common)
    assert (landscapes["final/surface"].losses == expected.losses.numpy()).all()
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"landscape.png", "surface.png"}


def test_early_stopped_weights_have_landscapes_of_their_own(tmp_path):
    stopping = Scripted()
    module = fitted(tmp_path, [Landscape(**LIGHT), stopping], max_epochs=3)
    landscapes, _ = read_landscapes(tmp_path / "landscapes.npz")
    assert list(landscapes) == ["final/random", "early_stopped/random"]
    module.load_state_dict(stopping.best_weights)
    images, labels = ToyData().measured[:9]
    expected = loss_landscape(
        module.eval(),
        images,
        labels,
        num_steps=3,
        num_directions=2,
        eps=0.1,
        steps=2,
        batch_size=4,
    )
    assert (landscapes["early_stopped/random"].losses == expected.losses.numpy()).all()
    assert not (landscapes["final/random"].losses == expected.losses.numpy()).all()


def test_training_is_bit_identical_with_and_without(tmp_path):
    kinds = ["random", "adversarial", "hessian"]
    alone = fitted(tmp_path, [Scripted()], max_epochs=3)
    watched = fitted(tmp_path, [Landscape(directions=kinds, **LIGHT), Scripted()], max_epochs=3)
    assert same(snapshot(alone), snapshot(watched))


def test_test_writes_beside_what_fit_wrote_and_names_other_splits(tmp_path):
    module = fitted(tmp_path, [])
    before = snapshot(module)
    callbacks = [
        Landscape(directions=["adversarial"], **LIGHT),
        Landscape(split="train", loss="clean", **LIGHT),
    ]
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=callbacks)
    trainer.test(module, ToyData(), verbose=False)
    assert {path.name for path in tmp_path.glob("*.npz")} == {
        "landscapes_test.npz",
        "landscapes_train_test.npz",
    }
    assert (tmp_path / "figures" / "landscape_train_test.png").is_file()
    landscapes, settings = read_landscapes(tmp_path / "landscapes_train_test.npz")
    assert settings["loss"] == "clean"
    assert list(landscapes) == ["final/random"]
    assert same(before, snapshot(module))


def test_a_callback_used_twice_writes_what_it_saw_last(tmp_path):
    callback = Landscape(**LIGHT)
    module = fitted(tmp_path, [callback])
    with torch.no_grad():
        module.network[0].weight.zero_()
    trainer = quiet_trainer(default_root_dir=tmp_path, callbacks=[callback])
    trainer.test(module, ToyData(), verbose=False)
    fit, test = (
        read_landscapes(tmp_path / f"landscapes{suffix}.npz")[0] for suffix in ("", "_test")
    )
    assert list(fit) == list(test) == ["final/random"]
    assert not (fit["final/random"].losses == test["final/random"].losses).all()


def test_clean_landscapes_face_no_attack_anywhere(tmp_path):
    settings = LIGHT | {"steps": 5}
    module = fitted(tmp_path, [Landscape(directions=["adversarial"], loss="clean", **settings)])
    landscapes, _ = read_landscapes(tmp_path / "landscapes.npz")
    images, labels = ToyData().measured[:9]
    expected = loss_landscape(
        module.eval(),
        images,
        labels,
        directions="adversarial",
        loss="clean",
        num_steps=3,
        num_directions=2,
        batch_size=4,
    )
    assert (landscapes["final/adversarial"].losses == expected.losses.numpy()).all()


def test_fast_dev_run_leaves_nothing(tmp_path):
    fitted(tmp_path, [Landscape(**LIGHT)], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_network_is_written_without_a_figure(tmp_path):
    module = AT(tiny_body, **PLAIN)
    with torch.no_grad():
        module.network[0].weight.fill_(float("nan"))
    trainer = quiet_trainer(
        default_root_dir=tmp_path, callbacks=[Landscape(surface_steps=2, **LIGHT)]
    )
    trainer.test(module, ToyData(), verbose=False)
    assert (tmp_path / "landscapes_test.npz").is_file()
    assert not (tmp_path / "figures").exists()


def test_wandb_gets_the_figure(tmp_path):
    logger = make_wandb_logger(tmp_path, project="p", name="n")
    fitted(tmp_path, [Landscape(**LIGHT)], logger=logger)
    wandb.finish()
    (run,) = read_runs(tmp_path)
    assert any("figures/landscape" in key for row in run.history for key in row)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"directions": ["up"]}, "`directions` to be one of random, adversarial, hessian"),
        ({"num_steps": 1}, "`num_steps` to be >= 2 but got 1"),
        ({"surface_steps": 1}, "`surface_steps` to be >= 2 but got 1"),
        ({"loss": "worst"}, "`loss` to be one of robust, clean but got worst"),
        ({"relative_to": "model"}, "`relative_to` to be one of"),
        ({"length": -1.0}, "`length` to be >= 0 but got -1.0"),
        ({"num_directions": 0}, "`num_directions` to be >= 1 but got 0"),
        ({"eps": -1.0}, "`eps` to be >= 0 but got -1.0"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Landscape(**kwargs)
