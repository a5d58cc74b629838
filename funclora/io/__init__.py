"""What is known about files that were read and written: reports, and the statistics of a cache.

The functions themselves (`load_peft`, `save_peft`, `merge_checkpoint`, ...) are names of `funclora`.
"""

from funclora._api.names import attach as _attach

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora.io.hf.extract": ("ExtractReport", "ExtractedWeight"),
        "funclora.io.merge.merge": ("MergeReport", "MergedWeight"),
        "funclora.io.merge.verify": ("MergeVerification",),
        "funclora.io.peft.cache": ("CacheStats",),
        "funclora.io.peft.combine": ("CombinedFolders",),
    },
)
