"""Turns, ratios and goals of the benchmarks."""

import pytest


@pytest.fixture
def rounds(monkeypatch, pytestconfig):
    """The module that benchmarks share, which is no part of the package."""
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "benchmarks"))
    return pytest.importorskip("rounds")


def test_variants_take_turns_whose_order_is_reversed(rounds):
    called = []

    def tell(name: str) -> float:
        called.append(name)
        return float(len(called))

    found = rounds.Rounds.told({name: lambda name=name: tell(name) for name in "abc"}, 2)
    # Once each to warm up, which is not timed.
    assert "".join(called) == "abc" + "abc" + "cba"
    assert found.seconds == {"a": [4.0, 9.0], "b": [5.0, 8.0], "c": [6.0, 7.0]}


def test_ratios_and_differences_are_those_of_one_round(rounds):
    found = rounds.Rounds({"slow": [2.0, 4.0], "fast": [1.0, 3.0]})
    assert found.ratios("fast") == [0.5, 0.75]
    assert found.ratios("slow", "fast") == pytest.approx([2.0, 4 / 3])
    assert found.differences("fast", per=2) == [-0.5, -0.5]


def test_cpu_seconds_count_work_and_not_waiting(rounds):
    import time

    def work() -> None:
        until = time.process_time() + 0.02
        while time.process_time() < until:
            pass

    found = rounds.Rounds.of({"work": work, "wait": lambda: time.sleep(0.02)}, 1)
    assert found.seconds["work"][0] >= 0.02 > found.seconds["wait"][0]


def test_missed_goals_are_told_first(rounds, capsys):
    met = rounds.Goal("speed", [0.1, 0.5, 0.6], 0.58)
    missed = rounds.Goal("images", [100.0, 300.0, 200.0], 250, at_most=False)
    rounds.print_goals([met, missed])
    lines = capsys.readouterr().out.split("\n")
    assert lines[1] == "- MISSED: images 200 (100 to 300), goal ≥ 250"
    assert lines[2] == "- met: speed 0.50 (0.10 to 0.60), goal ≤ 0.58"


def test_a_table_has_a_row_for_each_variant(rounds, capsys):
    found = rounds.Rounds({"one": [0.001, 0.002, 0.003], "two": [0.002, 0.002, 0.006]})
    found.print_table("title", "ms", lambda s: 1000 * s, digits=0, columns={"loss": {"two": "7"}})
    assert capsys.readouterr().out.splitlines() == [
        "",
        "title; 3 rounds",
        "",
        "|  | ms, median (min to max) | time / one | loss |",
        "|---|---|---|---|",
        "| one | 2 (1 to 3) | 1.00 (1.00 to 1.00) | – |",
        "| two | 2 (2 to 6) | 2.00 (1.00 to 2.00) | 7 |",
    ]
