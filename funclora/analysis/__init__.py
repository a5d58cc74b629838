"""Measurements of the changes of weights by adapters and fine-tuning: pure functions from weights to data.

Norms and spectra of updates, magnitude and direction, and how two adapters relate. Every result is a dataclass with
`to_json`, and can draw itself with `plot` (which needs matplotlib).
"""

from funclora.analysis._changes import Tuned
from funclora.analysis._compare import ComparedUpdate, Comparison, compare
from funclora.analysis._direction import Movement, Movements, Per, Trend, magnitude_direction
from funclora.analysis._spectrum import Spectra, Spectrum, effective_rank, spectra, stable_rank
from funclora.analysis._subspace import Of, Similarities, Similarity, phi, subspace_similarity

__all__ = [
    "ComparedUpdate",
    "Comparison",
    "Movement",
    "Movements",
    "Of",
    "Per",
    "Similarities",
    "Similarity",
    "Spectra",
    "Spectrum",
    "Trend",
    "Tuned",
    "compare",
    "effective_rank",
    "magnitude_direction",
    "phi",
    "spectra",
    "stable_rank",
    "subspace_similarity",
]
