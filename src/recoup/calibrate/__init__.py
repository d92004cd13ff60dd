"""Sees data, never labels: sets the ranges of quantizers; moves weights or biases where that is asked for."""

from recoup.calibrate.biases import correct_biases
from recoup.calibrate.calibrate import calibrate
from recoup.calibrate.gptq import gptq
from recoup.calibrate.observers import KL, MSE, OBSERVERS, MinMax, MovingAverage, Observer, Percentile

__all__ = [
    "KL",
    "MSE",
    "OBSERVERS",
    "MinMax",
    "MovingAverage",
    "Observer",
    "Percentile",
    "calibrate",
    "correct_biases",
    "gptq",
]
