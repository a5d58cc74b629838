"""The public names.

`funclora` itself looks up here which module has a name, and loads that one when the name is first used: its command
line starts without torch, and `apply` without the readers and writers of files.
"""

from funclora import algebra, analysis, errors, optim
from funclora._bind.apply import apply, bind, trace_targets
from funclora._bind.merge import merge
from funclora._bind.params import base_params
from funclora._bind.summary import summary
from funclora._config.config import LoraConfig
from funclora._init.decompose import decompose
from funclora._init.eva import init_eva
from funclora._init.fresh import init
from funclora._init.relative import relative_to_original
from funclora._many.route import route
from funclora._many.stack import Stack, stack, unstack, vmap
from funclora._quant.quantize import dequantize, quantize
from funclora._quant.tensor import Quantized
from funclora._train.evaluate import evaluate
from funclora._train.module import AdapterModule, as_module
from funclora._train.population import per_example_value_and_grad, population_step
from funclora._train.step import train_step, value_and_grad
from funclora.io.gguf.adapter import load_gguf, save_gguf
from funclora.io.hf.extract import ExtractedWeight, ExtractReport, extract_adapter
from funclora.io.merge.merge import MergedWeight, MergeReport, merge_checkpoint
from funclora.io.merge.verify import MergeVerification
from funclora.io.peft.cache import AdapterCache, CacheStats
from funclora.io.peft.combine import CombinedFolders, combine_peft
from funclora.io.peft.folder import load_peft, save_peft
from funclora.rules.base import Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import DoRA
from funclora.rules.low_rank import LoRA
from funclora.rules.tokens import Tied, TrainableTokens

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
