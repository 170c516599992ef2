"""For data sets whose mean and standard deviation nobody has written down."""

from functools import cached_property

from robust_flatness.datamodules.base import RobustDataModule
from robust_flatness.datamodules.channel_statistics import channel_statistics


class ComputedStatistics(RobustDataModule):
    """A datamodule that computes `mean` and `std` from its training images.

    It reads them when either is first asked for, and keeps the result. A subclass that knows one
    assigns it.
    """

    # The base class lets subclasses assign them, which a cached property lets them do as well.
    @cached_property
    def mean(self) -> list[float]:  # type: ignore[override]
        """Mean of each channel over the images to train on, for pixels in [0, 1]."""
        return self._statistics[0]

    @cached_property
    def std(self) -> list[float]:  # type: ignore[override]
        """Standard deviation of each channel over the images to train on."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[list[float], list[float]]:
        self.setup()
        return channel_statistics(self._images["training"])
