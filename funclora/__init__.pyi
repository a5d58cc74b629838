from funclora import algebra, analysis, distributed, errors, io, losses, optim, rules, serving
from funclora._bind.apply import apply, bind, trace_targets
from funclora._bind.merge import merge
from funclora._bind.params import base_params
from funclora._bind.summary import Summary, SummaryRow, summary
from funclora._config.config import LoraConfig
from funclora._init.decompose import decompose
from funclora._init.eva import init_eva
from funclora._init.fresh import init
from funclora._init.relative import relative_to_original
from funclora._many.route import route
from funclora._many.stack import Stack, stack, unstack
from funclora._many.vmap import vmap
from funclora._quant.quantize import dequantize, quantize
from funclora._quant.tensor import Quantized
from funclora._train.evaluate import Metric, evaluate
from funclora._train.members import Population
from funclora._train.module import AdapterModule, as_module
from funclora._train.population import per_example_value_and_grad, population_step
from funclora._train.step import LossFn, train_step, value_and_grad
from funclora.errors import strict

# Found in funclora.io; here for this version only.
from funclora.io import CacheStats as CacheStats
from funclora.io import CombinedFolders as CombinedFolders
from funclora.io import ExtractedWeight as ExtractedWeight
from funclora.io import ExtractReport as ExtractReport
from funclora.io import MergedWeight as MergedWeight
from funclora.io import MergeReport as MergeReport
from funclora.io import MergeVerification as MergeVerification
from funclora.io.gguf.adapter import load_gguf, save_gguf
from funclora.io.hf.extract import extract_adapter
from funclora.io.merge.merge import merge_checkpoint
from funclora.io.peft.cache import AdapterCache
from funclora.io.peft.combine import combine_peft
from funclora.io.peft.folder import load_peft, save_peft
from funclora.optim import Optimizer
from funclora.rules.base import Adapters, Params, Rule
from funclora.rules.dense import Delta, Full
from funclora.rules.dora import DoRA
from funclora.rules.layouts import Layout
from funclora.rules.low_rank import LoRA
from funclora.rules.tokens import Tied, TrainableTokens

__version__: str

__all__ = [
    "AdapterCache",
    "AdapterModule",
    "Adapters",
    "Delta",
    "DoRA",
    "Full",
    "Layout",
    "LoRA",
    "LoraConfig",
    "LossFn",
    "Metric",
    "Optimizer",
    "Params",
    "Population",
    "Quantized",
    "Rule",
    "Stack",
    "Summary",
    "SummaryRow",
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
    "distributed",
    "errors",
    "evaluate",
    "extract_adapter",
    "init",
    "init_eva",
    "io",
    "load_gguf",
    "load_peft",
    "losses",
    "merge",
    "merge_checkpoint",
    "optim",
    "per_example_value_and_grad",
    "population_step",
    "quantize",
    "relative_to_original",
    "route",
    "rules",
    "save_gguf",
    "save_peft",
    "serving",
    "stack",
    "strict",
    "summary",
    "trace_targets",
    "train_step",
    "unstack",
    "value_and_grad",
    "vmap",
]
