from funclora.losses._contrastive import cosent, cosine, in_batch, triplet
from funclora.losses._log_probs import token_log_probs
from funclora.losses._preference import dpo, ipo, kto, orpo, simpo

__all__ = ["cosent", "cosine", "dpo", "in_batch", "ipo", "kto", "orpo", "simpo", "token_log_probs", "triplet"]
