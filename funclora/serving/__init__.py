"""Many requests, each with its own adapter, answered together by one frozen model.

`Engine` is the part below a server: it knows tokens, adapters and threads, and neither texts nor HTTP.
"""

from funclora._api.names import attach as _attach

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora.serving._engine": ("Engine",),
        "funclora.serving._settings": ("Settings",),
        "funclora.serving._statistics": ("Statistics",),
        "funclora.serving._stream": ("Stream", "Token"),
    },
)
