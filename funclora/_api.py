"""The public names.

`funclora` itself looks up here which module has a name, and loads that one when the name is first used: its command
line starts without torch, and `apply` without the readers and writers of files.
"""

from funclora import algebra, analysis, errors, optim
from funclora._apply import apply, base_params, bind, trace_targets
from funclora._cache import AdapterCache, CacheStats
from funclora._config import LoraConfig
from funclora._decompose import decompose
from funclora._eva import init_eva
from funclora._evaluate import evaluate
from funclora._init import init
from funclora._merge import merge
from funclora._module import AdapterModule, as_module
from funclora._population import per_example_value_and_grad, population_step
from funclora._quantize import dequantize, quantize
from funclora._quantized import Quantized
from funclora._relative import relative_to_original
from funclora._route import route
from funclora._rules import Delta, DoRA, Full, LoRA, Rule
from funclora._stack import Stack, stack, unstack, vmap
from funclora._summary import summary
from funclora._tokens import Tied, TrainableTokens
from funclora._train import train_step, value_and_grad
from funclora.io._merge_verify import MergeVerification
from funclora.io.combine import CombinedFolders, combine_peft
from funclora.io.extract import ExtractedWeight, ExtractReport, extract_adapter
from funclora.io.gguf import load_gguf, save_gguf
from funclora.io.hf import MergedWeight, MergeReport, merge_checkpoint
from funclora.io.peft import load_peft, save_peft

__all__ = [
    "AdapterCache",
    "AdapterModule",
    "CacheStats",
    "CombinedFolders",
    "Delta",
    "DoRA",
    "ExtractReport",
    "ExtractedWeight",
    "Full",
    "LoRA",
    "LoraConfig",
    "MergeReport",
    "MergeVerification",
    "MergedWeight",
    "Quantized",
    "Rule",
    "Stack",
    "Tied",
    "TrainableTokens",
    "algebra",
    "analysis",
    "apply",
    "as_module",
    "base_params",
    "bind",
    "combine_peft",
    "decompose",
    "dequantize",
    "errors",
    "evaluate",
    "extract_adapter",
    "init",
    "init_eva",
    "load_gguf",
    "load_peft",
    "merge",
    "merge_checkpoint",
    "optim",
    "per_example_value_and_grad",
    "population_step",
    "quantize",
    "relative_to_original",
    "route",
    "save_gguf",
    "save_peft",
    "stack",
    "summary",
    "trace_targets",
    "train_step",
    "unstack",
    "value_and_grad",
    "vmap",
]
