"""Losses of preference training, as pure functions of log-probabilities, and the log-probabilities they need.

`token_log_probs` gives the log-probabilities of the tokens of answers from a bound model. The losses take their sums
(`dpo`, `kto`) or means (`ipo`, `orpo`, `simpo`) over the tokens of each answer, and return a loss for each pair, or for
each answer.
"""

from funclora._api.names import attach as _attach

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora.losses._preference": ("dpo", "ipo", "kto", "orpo", "simpo"),
        "funclora.losses._log_probs": ("token_log_probs",),
    },
)
