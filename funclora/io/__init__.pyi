from funclora.io.foreign.image_models import load_diffusers, save_diffusers
from funclora.io.foreign.mlx import load_mlx, save_mlx
from funclora.io.hf.extract import ExtractedWeight, ExtractReport
from funclora.io.merge.merge import MergedWeight, MergeReport
from funclora.io.merge.verify import MergeVerification
from funclora.io.peft.cache import CacheStats, LoadedAdapter
from funclora.io.peft.combine import CombinedFolders

__all__ = [
    "CacheStats",
    "CombinedFolders",
    "ExtractReport",
    "ExtractedWeight",
    "LoadedAdapter",
    "MergeReport",
    "MergeVerification",
    "MergedWeight",
    "load_diffusers",
    "load_mlx",
    "save_diffusers",
    "save_mlx",
]
