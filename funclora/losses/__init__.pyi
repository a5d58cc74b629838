from funclora.losses._log_probs import token_log_probs
from funclora.losses._preference import dpo, ipo, kto, orpo, simpo

__all__ = ["dpo", "ipo", "kto", "orpo", "simpo", "token_log_probs"]
