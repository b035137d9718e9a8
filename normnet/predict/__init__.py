"""Segment patients: ``python -m normnet.predict IN... --output OUT`` (PAPER.md III-A, III-D).

`predict` is the command, `predict_case` takes a file, `predict_volume` arrays.
"""

from normnet.predict.args import PredictArgs, read_config
from normnet.predict.case import CasePrediction, predict_case
from normnet.predict.command import PredictSummary, main, predict
from normnet.predict.volume import (
    Prediction,
    bright_threshold,
    inflation_of,
    predict_volume,
)
from normnet.sliding import probabilities as slab_probabilities

__all__ = [
    "CasePrediction",
    "PredictArgs",
    "PredictSummary",
    "Prediction",
    "bright_threshold",
    "inflation_of",
    "main",
    "predict",
    "predict_case",
    "predict_volume",
    "read_config",
    "slab_probabilities",
]
