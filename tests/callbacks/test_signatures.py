"""The options of callbacks that pass arguments on: all are offered, typed and described."""

from typing import Any

import pytest
from jsonargparse import ArgumentParser

from robust_flatness import callbacks, measures
from robust_flatness.callbacks.final_evaluation import EXTRAS

IMAGES = {"split": "test", "num_examples": 1000}
COMMON = {"batch_size": 128, "seed": 0}
ATTACK = {
    **COMMON,
    **{"eps": None, "steps": 10, "step_size": None, "norm": "linf", "restarts": 1},
    **{"precision": "float32", "fold_batch_norm": False},
}
FLATNESS = {
    **{**ATTACK, "steps": 20, "num_perturbations": 10, "xi": 0.5, "protocol": "shared"},
    **{"loss": "robust", "distribution": "sphere", "relative_to": "layer", "per_batch": False},
}
WORST = {
    **{**ATTACK, "steps": 20, "restarts": 10, "xi": 0.003, "weight_step": 0.01},
    **{"loss": "robust", "keep": None, "per_batch": False},
}
EPOCHS = {**IMAGES, "every_n_epochs": 1}
STEP = {"criterion": None, "image_key": None, "label_key": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "RobustEvaluation": {**EPOCHS, **ATTACK},
    "RobustEarlyStopping": {**EPOCHS, **ATTACK, "split": "val", "steps": 7, "patience": None},
    "CatastrophicOverfitting": {**EPOCHS, **ATTACK, "split": "val", "jump": 0.1},
    "Flatness": {**EPOCHS, **FLATNESS},
    "WorstCaseFlatness": {**EPOCHS, **WORST},
    "Curvature": {**EPOCHS, **COMMON, "num_examples": 500, "tolerance": 1e-3},
    "AutoAttack": {
        **{**IMAGES, "version": "standard", "attacks": None, "chunk_size": 100},
        **{"eps": None, "norm": "linf", "seed": 0},
    },
    "Landscape": {
        **{**IMAGES, **ATTACK, "num_examples": 128, "directions": ("random",)},
        **{"num_directions": 10, "num_steps": 51, "relative_to": "layer", "length": None},
        **{"loss": "robust", "surface_steps": 0},
    },
    "FinalEvaluation": {
        **{**ATTACK, "steps": 20, "restarts": 10, "splits": ("test", "train")},
        **{
            "num_examples": 1000,
            "num_flatness_examples": None,
            "num_perturbations": 10,
            "xi": 0.5,
            "protocol": "shared",
        },
        "extras": (),
    },
    "AdversarialTraining": {
        **{**STEP, "fraction": 1.0, "warmup": 0, "eps": 8 / 255, "step_size": None, "steps": 7},
        **{"norm": "linf", "keep": "best", "start": "paper", "mode": "eval"},
        **{"precision": "float32", "start_scale": 1.0, "projection": True},
        "fold_batch_norm": False,
    },
    "AdversarialWeightPerturbation": {
        **{**STEP, "warmup": 0, "xi": 0.01, "steps": 1, "mode": "eval"},
        **{"direction": "adversarial", "order": "sam"},
    },
    "WeightAveraging": {
        **{"decay": 0.9975, "reference_steps": 58_650, "batch_norm": "average"},
        **{"num_examples": 1000, "batch_size": 128, "split": "train"},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_all_options_are_offered_with_types_defaults_and_descriptions(name):
    parser = ArgumentParser()
    # It raises for an argument without a type.
    skip = {"dataset", "datasets", "normalization"}
    parser.add_class_arguments(getattr(callbacks, name), "c", skip=skip, fail_untyped=True)
    assert dict(parser.get_defaults().c) == OPTIONS[name]
    options = [action for action in parser._actions if action.dest.startswith("c.")]
    assert all(action.help and action.help.strip() for action in options)


@pytest.mark.parametrize(("typed", "extras"), [("all", list(EXTRAS)), ("[worst]", ["worst"])])
def test_extras_are_typed_as_one_name_or_as_a_list(typed, extras):
    parser = ArgumentParser()
    parser.add_class_arguments(callbacks.FinalEvaluation, "c", skip={"datasets", "normalization"})
    assert parser.instantiate_classes(parser.parse_args([f"--c.extras={typed}"])).c.extras == extras


def test_a_measure_is_an_option_of_the_callbacks_that_take_any():
    parser = ArgumentParser()
    parser.add_class_arguments(callbacks.EpochMeasure, "c", skip={"dataset", "normalization"})
    arguments = ["--c.measure=AverageCaseFlatness", "--c.measure.xi=0.3", "--c.split=val"]
    callback = parser.instantiate_classes(parser.parse_args(arguments)).c
    assert isinstance(callback.measure, measures.AverageCaseFlatness)
    assert (callback.measure.xi, callback.split) == (0.3, "val")


def test_arguments_of_no_class_are_refused():
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        callbacks.Flatness(epsilon=0.1)
