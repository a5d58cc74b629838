"""Losses of preferences and of embeddings, as pure functions, and the log-probabilities that the former need.

`token_log_probs` gives the log-probabilities of the tokens of answers from a bound model. The losses take their sums
(`dpo`, `kto`) or means (`ipo`, `orpo`, `simpo`) over the tokens of each answer, and return a loss for each pair, or for
each answer. `in_batch`, `triplet`, `cosine` and `cosent` take the embeddings of a batch of texts.
"""

from funclora._api.names import attach as _attach

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora.losses._preference": ("dpo", "ipo", "kto", "orpo", "simpo"),
        "funclora.losses._contrastive": ("cosent", "cosine", "in_batch", "triplet"),
        "funclora.losses._log_probs": ("token_log_probs",),
    },
)
