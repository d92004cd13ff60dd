"""Sees data, never labels: sets the ranges of quantizers and leaves the weights alone."""

from recoup.calibrate.calibrate import calibrate
from recoup.calibrate.observers import KL, MSE, OBSERVERS, MinMax, MovingAverage, Observer, Percentile

__all__ = ["KL", "MSE", "OBSERVERS", "MinMax", "MovingAverage", "Observer", "Percentile", "calibrate"]
