from funclora.serving._engine import Engine
from funclora.serving._settings import Settings
from funclora.serving._statistics import Statistics
from funclora.serving._stream import Stream, Token

__all__ = ["Engine", "Settings", "Statistics", "Stream", "Token"]
