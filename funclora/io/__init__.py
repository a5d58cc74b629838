"""Adapter files of other trainers, and what is known about files that were read and written: reports, statistics.

The functions for the files of PEFT and llama.cpp, and those that merge, are names of `funclora`.
"""

from funclora._api.names import attach as _attach

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora.io.foreign.image_models": ("load_diffusers", "save_diffusers"),
        "funclora.io.foreign.mlx": ("load_mlx", "save_mlx"),
        "funclora.io.hf.extract": ("ExtractReport", "ExtractedWeight"),
        "funclora.io.merge.merge": ("MergeReport", "MergedWeight"),
        "funclora.io.merge.verify": ("MergeVerification",),
        "funclora.io.peft.cache": ("CacheStats", "LoadedAdapter"),
        "funclora.io.peft.combine": ("CombinedFolders",),
    },
)
