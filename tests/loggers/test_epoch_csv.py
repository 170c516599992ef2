import csv
import math
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from robust_flatness.loggers import EpochCSVLogger


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_epoch_is_one_row_of_all_columns(tmp_path: Path) -> None:
    logger = EpochCSVLogger(tmp_path / "run")
    logger.log_metrics({"val/error": 0.5, "epoch": 0}, step=9)
    logger.log_metrics({"train/loss": 0.1 + 0.2, "epoch": 0}, step=9)
    logger.log_metrics({"test/error": math.nan, "epoch": 1}, step=19)
    logger.log_metrics({"lost": 1.0}, step=19)
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines() == [
        "epoch,test/error,train/loss,val/error",
        f"0,,{0.1 + 0.2!r},0.5",
        "1,nan,,",
    ]
    assert logger.rows[0] == {"epoch": 0, "train/loss": 0.1 + 0.2, "val/error": 0.5}


def test_a_second_logger_goes_on_in_the_table(tmp_path: Path) -> None:
    first = EpochCSVLogger(tmp_path)
    for epoch in range(3):
        first.log_metrics({"loss": epoch / 3, "only/first": epoch % 2, "epoch": epoch})
    second = EpochCSVLogger(tmp_path)
    assert second.rows == first.rows
    second.truncate(2)
    second.log_metrics({"loss": 7.0, "epoch": 2})
    second.log_metrics({"loss": 8.0, "epoch": 3})
    assert [tuple(row.values()) for row in read(tmp_path)] == [
        ("0", "0.0", "0.0"),
        ("1", str(1 / 3), "1.0"),
        ("2", "7.0", ""),
        ("3", "8.0", ""),
    ]


def test_refill_adds_what_is_missing_and_changes_nothing(tmp_path: Path) -> None:
    logger = EpochCSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0, "epoch": 1})
    logger.refill([{"epoch": 0, "a": 5.0}, {"epoch": 1, "a": 6.0, "b": 7.0}])
    expected = [{"epoch": 0, "a": 5.0}, {"epoch": 1, "a": 1.0, "b": 7.0}]
    assert logger.rows == expected
    assert EpochCSVLogger(tmp_path).rows == expected


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    logger = EpochCSVLogger(tmp_path)
    logger.log_metrics({"image": object(), "epoch": 4})
    assert logger.rows == []
    logger.log_metrics({"image": object(), "loss": 1, "epoch": 4})
    assert logger.rows == [{"epoch": 4, "loss": 1.0}]


def test_nothing_is_recorded_outside_of_training() -> None:
    logger = EpochCSVLogger(None)
    logger.recording = False
    logger.log_metrics({"test/error": 0.1, "epoch": 0})
    assert logger.rows == []


def test_memory_only_writes_nothing(tmp_path: Path) -> None:
    for logger in (EpochCSVLogger(None), EpochCSVLogger(tmp_path / "run", write=False)):
        logger.log_metrics({"loss": 1.0, "epoch": 0})
        assert len(logger.rows) == 1
    assert EpochCSVLogger(None).save_dir is None
    assert logger.save_dir == str(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_other_ranks_keep_and_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = EpochCSVLogger(tmp_path / "run")
    logger.log_metrics({"loss": 1.0, "epoch": 0})
    logger.refill([{"epoch": 0, "loss": 1.0}])
    assert logger.rows == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(ValueError, match=r"Expected `folder` to be .* but got .*taken/run"):
        EpochCSVLogger(tmp_path / "taken" / "run")


@pytest.mark.parametrize("content", ["step,loss\n0,1.0\n", "epoch,loss\n0,good\n"])
def test_a_table_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(ValueError, match=r"Expected `.*metrics.csv` to be a table of numbers"):
        EpochCSVLogger(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == content


def test_a_held_table_leaves_the_file_until_it_is_released(tmp_path: Path) -> None:
    EpochCSVLogger(tmp_path).log_metrics({"a": 1.0, "epoch": 3})
    before = (tmp_path / "metrics.csv").read_text()
    logger = EpochCSVLogger(tmp_path)
    logger.hold()
    logger.truncate(1)
    logger.log_metrics({"a": 2.0, "epoch": 0})
    assert (tmp_path / "metrics.csv").read_text() == before
    logger.release()
    assert [row["epoch"] for row in read(tmp_path)] == ["0"]
