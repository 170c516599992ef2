"""Three kinds of project that the callbacks train adversarially, unchanged."""

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning_projects import (
    MEAN,
    STD,
    CommandLineData,
    CommandLineProject,
    Project,
    normalised,
    residual,
    transformer,
)
from networks_for_tests import images_and_labels
from torch.utils.data import DataLoader, TensorDataset
from trainers import quiet_trainer

from robust_flatness.callbacks import (
    AdversarialTraining,
    AdversarialWeightPerturbation,
    Flatness,
    RobustEarlyStopping,
)

XI = 0.01
THREAT = {"eps": 0.05, "normalization": (MEAN, STD)}


def normalised_loader(count=32):
    """Two classes that a network can tell apart, as normalised images."""
    images, _ = images_and_labels(count)
    labels = torch.arange(count) % 2
    images = 0.6 * images + 0.3 * labels.view(-1, 1, 1, 1)
    return DataLoader(TensorDataset(normalised(images), labels), 16)


@pytest.mark.filterwarnings("ignore:Weight perturbations move:UserWarning")
@pytest.mark.parametrize(("build", "lr"), [(residual, 0.02), (transformer, 0.3)])
def test_a_foreign_network_trains_adversarially_and_is_measured(build, lr):
    measure = {**THREAT, "split": "val", "num_examples": 8, "steps": 2}
    callbacks = [
        AdversarialTraining(**THREAT, steps=2),
        AdversarialWeightPerturbation(xi=XI),
        RobustEarlyStopping(**measure),
        Flatness(**measure, num_perturbations=1),
    ]
    trainer = quiet_trainer(callbacks=callbacks, max_epochs=5)
    trainer.fit(Project(build, lr), normalised_loader(), normalised_loader(8))
    metrics = trainer.callback_metrics
    assert metrics["awp/relative_norm_max"] == pytest.approx(XI, rel=1e-3)
    assert metrics["awp/relative_norm_min"] >= 0
    assert metrics["val/robust_error"] < 0.3
    assert metrics["flatness/average/val"].isfinite()


CONFIG = {
    "trainer": {
        **{"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        "callbacks": [
            {
                "class_path": "robust_flatness.callbacks.AdversarialTraining",
                "init_args": {
                    **{"eps": "8/255", "step_size": "2/255", "steps": 3, "keep": "last"},
                    "normalization": [[0.0] * 3, [1.0] * 3],
                },
            },
            {
                "class_path": "robust_flatness.callbacks.AdversarialWeightPerturbation",
                "init_args": {
                    **{"xi": XI, "warmup": 1},
                    "criterion": {
                        "class_path": "torch.nn.CrossEntropyLoss",
                        "init_args": {"reduction": "none"},
                    },
                },
            },
        ],
    },
    "model": {"lr": 0.2},
}


def test_a_command_line_project_lists_the_callbacks_in_its_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG))
    arguments = ["fit", f"--config={path}", "--model.lr=0.1"]
    cli = LightningCLI(
        CommandLineProject, CommandLineData, save_config_callback=None, args=arguments
    )
    pgd = cli.trainer.callbacks[0].pgd
    assert (pgd.steps, pgd.keep) == (3, "last")
    assert (pgd.eps, pgd.step_size) == pytest.approx((8 / 255, 2 / 255))
    assert cli.trainer.callback_metrics["awp/relative_norm_max"] == pytest.approx(XI, rel=1e-3)
    assert not torch.equal(cli.model.network[0].weight, CommandLineProject().network[0].weight)
