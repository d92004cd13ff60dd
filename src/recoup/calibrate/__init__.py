"""Sees data, never labels: sets the ranges of quantizers and leaves the weights alone."""

from recoup.calibrate.calibrate import calibrate
from recoup.calibrate.observers import MSE, OBSERVERS, MinMax, Observer

__all__ = ["MSE", "OBSERVERS", "MinMax", "Observer", "calibrate"]
