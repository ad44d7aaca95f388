"""The search for rescale factors: space, seeds, variation, evolution, screens, budget."""

from .budget import Budget
from .evolve import EvolutionSettings, Outcome, Scored, evolve
from .screening import Screen, agreement
from .seeds import baselines, seed_factors
from .space import PAPER_START_TOKENS, Candidate, Space

__all__ = [
    "PAPER_START_TOKENS",
    "Budget",
    "Candidate",
    "EvolutionSettings",
    "Outcome",
    "Scored",
    "Screen",
    "Space",
    "agreement",
    "baselines",
    "evolve",
    "seed_factors",
]
