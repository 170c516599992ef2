"""Many runs from one command: what to train, what is left to train, and training it."""

from robust_flatness.study.command import study
from robust_flatness.study.plan import PlannedRun, make_plan
from robust_flatness.study.state import State, state_of

__all__ = ["PlannedRun", "State", "make_plan", "state_of", "study"]
