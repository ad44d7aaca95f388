"""Scores of a model under a rotary embedding: perplexity by position and length, questions to find, intervals."""

from .bootstrap import PairedDifference, paired_difference
from .passkey import passkey
from .scoring import Scorer

__all__ = ["PairedDifference", "Scorer", "paired_difference", "passkey"]
