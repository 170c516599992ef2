"""The bar of a measure, inside a bar of Lightning and alone."""

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar

from robust_flatness.callbacks.measuring import _progress_bar


def test_the_tasks_of_lightnings_bar_keep_their_places() -> None:
    bar = RichProgressBar()
    trainer = Trainer(callbacks=[bar], logger=False, enable_checkpointing=False, max_epochs=1)
    bar.setup(trainer, trainer, "fit")
    bar.on_train_start(trainer, trainer)
    assert bar.progress is not None
    first = bar.progress.add_task("training", total=1)
    for what in ("flatness", "robust loss"):
        with _progress_bar(trainer, what, total=2) as on_attack:
            on_attack()
            shown = [task for task in bar.progress.tasks if task.visible]
            assert [(task.description, task.completed) for task in shown] == [
                ("training", 0),
                (what, 1),
            ]
    second = bar.progress.add_task("validation", total=1)
    for task in (first, second):
        assert bar.progress.tasks[task].id == task
    bar.progress.stop()
