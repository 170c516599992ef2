"""Rules on the verdicts on single images."""

import numpy as np
import pytest

from robust_flatness.run_folder.attack_checks import attack_checks, class_errors, error_curve

images = np.arange(1000)
HEALTHY = {
    "test/correct_at_eps/0.05": images < 700,
    "test/correct_at_eps/0.1": images < 500,
    "test/correct_at_eps/1": images < 0,
    "test/correct_at_eps/0.1/more_steps": images < 490,
    "test/correct_at_eps/0.1/square": images < 490,
    "test/robust_correct": images < 480,
    "test/autoattack_correct": images < 460,
}


@pytest.mark.parametrize(
    ("name", "array", "correct", "text"),
    [
        ("largest radius", "test/correct_at_eps/1", 11, "RErr at ε = 1 is 98.9 % instead of 100 %"),
        ("larger radius", "test/correct_at_eps/0.05", 489, "by 1.1 points from ε = 0.05 to 0.1"),
        ("more steps", "test/correct_at_eps/0.1/more_steps", 511, "by -1.1 points with more steps"),
        ("Square", "test/correct_at_eps/0.1/square", 479, "of a further 1.1 %"),
        (
            "AutoAttack",
            "test/autoattack_correct",
            449,
            "is 3.1 points on 1000 images instead of at most 3",
        ),
    ],
)
def test_each_rule_flags_what_exceeds_its_tolerance(name, array, correct, text):
    assert all(check["passed"] for check in attack_checks(HEALTHY))
    # One image less, or more, is within the tolerance.
    within = correct - 1 if name in ("largest radius", "more steps") else correct + 1
    nearly = attack_checks({**HEALTHY, array: images < within})
    assert all(check["passed"] for check in nearly)
    failed = [c for c in attack_checks({**HEALTHY, array: images < correct}) if not c["passed"]]
    assert [check["name"] for check in failed] == [name]
    assert text in failed[0]["text"]


def test_one_image_is_chance():
    arrays = {name: values[450:470] for name, values in HEALTHY.items()}
    arrays["test/correct_at_eps/1"] = np.arange(20) < 1
    assert attack_checks(arrays)[0]["passed"]
    arrays["test/correct_at_eps/1"] = np.arange(20) < 2
    assert attack_checks(arrays)[0]["passed"] is False


def test_a_radius_is_compared_with_all_smaller_ones():
    slow = {f"test/correct_at_eps/{k}": images < 500 + 6 * k for k in (1, 2, 3)}
    assert attack_checks(slow)[1]["text"] == "RErr falls by 1.2 points from ε = 1 to 3"


def test_what_was_not_measured_is_not_decided():
    for arrays in ({}, {"test/robust_correct": images < 1}):
        assert not attack_checks(arrays)
        assert not error_curve(arrays)
        assert not class_errors(arrays)
    pgd = {"train_eval/robust_correct": images < 500, "train/autoattack_correct": images[:50] < 40}
    checks = attack_checks(pgd)
    assert [check["passed"] for check in checks] == [None, None, None, None, False]
    assert checks[-1]["text"].endswith("is 20.0 points on 50 images instead of at most 3")


def test_test_images_count_before_training_images():
    train = {name.replace("test/", "train_eval/"): values for name, values in HEALTHY.items()}
    shifted = {name: values[100:] for name, values in HEALTHY.items()}
    assert error_curve(train | shifted) == error_curve(shifted) != error_curve(train)
    assert error_curve(train)["robust_error"] == pytest.approx([0.3, 0.5, 1.0])


def test_errors_of_classes_and_of_one_without_images():
    arrays = {"labels": np.array([0, 0, 2, 2, 2]), "robust_correct": np.arange(5) < 3}
    errors = class_errors({f"train_eval/{name}": values for name, values in arrays.items()})
    assert errors["train"] == pytest.approx([0, np.nan, 2 / 3], nan_ok=True)
