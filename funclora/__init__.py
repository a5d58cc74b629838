"""Functional, stateless LoRA and DoRA for PyTorch.

An adapter is a value: a dict from parameter names to rewriting rules. `apply` runs a model under the rewritten
weights, `merge` returns them, `train_step` improves them; no module is ever changed.
"""

from funclora._api.names import attach as _attach

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = _attach(
    __name__,
    {
        "funclora": ("algebra", "analysis", "distributed", "errors", "io", "losses", "optim", "rules", "serving"),
        "funclora._bind.apply": ("apply", "bind", "trace_targets"),
        "funclora._bind.merge": ("merge",),
        "funclora._bind.params": ("base_params",),
        "funclora._bind.summary": ("Summary", "SummaryRow", "summary"),
        "funclora._config.config": ("LoraConfig",),
        "funclora._init.decompose": ("decompose",),
        "funclora._init.eva": ("init_eva",),
        "funclora._init.fresh": ("init",),
        "funclora._init.relative": ("relative_to_original",),
        "funclora._many.route": ("route",),
        "funclora._many.stack": ("Stack", "stack", "unstack"),
        "funclora._many.vmap": ("vmap",),
        "funclora._quant.quantize": ("dequantize", "quantize"),
        "funclora._quant.tensor": ("Quantized",),
        "funclora._train.evaluate": ("Metric", "evaluate"),
        "funclora._train.module": ("AdapterModule", "as_module"),
        "funclora._train.members": ("Population",),
        "funclora._train.population": ("per_example_value_and_grad", "population_step"),
        "funclora._train.step": ("LossFn", "train_step", "value_and_grad"),
        "funclora.errors": ("strict",),
        "funclora.io.gguf.adapter": ("load_gguf", "save_gguf"),
        "funclora.io.hf.extract": ("extract_adapter",),
        "funclora.io.merge.merge": ("merge_checkpoint",),
        "funclora.io.peft.cache": ("AdapterCache",),
        "funclora.io.peft.combine": ("combine_peft",),
        "funclora.io.peft.folder": ("load_peft", "save_peft"),
        "funclora.optim": ("Optimizer",),
        "funclora.rules.base": ("Adapters", "Params", "Rule"),
        "funclora.rules.dense": ("Delta", "Full"),
        "funclora.rules.dora": ("DoRA",),
        "funclora.rules.layouts": ("Layout",),
        "funclora.rules.low_rank": ("LoRA",),
        "funclora.rules.tokens": ("Tied", "TrainableTokens"),
    },
    moved={
        "funclora.io": (
            "CacheStats",
            "CombinedFolders",
            "ExtractReport",
            "ExtractedWeight",
            "MergeReport",
            "MergeVerification",
            "MergedWeight",
        )
    },
)
