"""`select` against PEFT's own injection, and what PEFT passes over in silence and `select` refuses."""

from __future__ import annotations

import copy
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils import prune

from funclora import LoraConfig, init
from funclora._config.targets import select
from funclora.errors import TargetError
from funclora.rules.layouts import Attention, Conv, ConvTranspose, Embedding, Layout, Linear, Parameter, Recurrent

# Full parameter name -> (rank, scaling), or "full" where it is trained as it is.
Selection = dict[str, Any]


# --- models: structure is all that counts ----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.xq_proj = nn.Linear(4, 4, bias=False)
        self.norm = nn.LayerNorm(4)
        self.experts = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(4, 4)}) for _ in range(2))


class Net(nn.Module):
    """Names that PEFT's rules tell apart: suffixes of others, the same at the top and below, nested indices."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.tower = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(2)), "q_proj": nn.Linear(4, 4)})
        self.q_proj = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 5, bias=False)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=g), "bn": nn.BatchNorm2d(4)}) for g in (1, 2)
        )
        self.down = nn.Sequential(nn.Conv1d(4, 4, 1, bias=False), nn.ReLU(), nn.Conv3d(4, 4, 1))
        self.fc = nn.Linear(4, 2)


class AttentionNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2))
        self.attn = nn.MultiheadAttention(8, 2)


class RecurrentNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
        self.up = nn.ConvTranspose1d(4, 6, 2, groups=2)
        self.fc = nn.Linear(8, 2)


class Experts(nn.Module):
    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        self.down_proj = nn.Parameter(torch.zeros(3, 4, 6))
        self.gate_up_proj = nn.Parameter(torch.zeros(3, 6, 4))
        self.bias = nn.Parameter(torch.zeros(3, 4))
        self.counts = nn.Parameter(torch.zeros(3, 4, dtype=torch.int64), requires_grad=False)


class Moe(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"router": nn.Linear(4, 3), "experts": Experts(transposed=bool(i))}) for i in range(2)
        )


def llama(head: str) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return getattr(transformers, f"LlamaFor{head}")(config)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=4, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1)
    return GPT2LMHeadModel(config)


def bert(head: str) -> nn.Module:
    import transformers

    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8
    )
    return getattr(transformers, f"BertFor{head}")(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "net": Net,
    "conv": ConvNet,
    "attention": AttentionNet,
    "recurrent": RecurrentNet,
    "moe": Moe,
    "flat": lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
    "llama": lambda: llama("CausalLM"),
    "llama-cls": lambda: llama("SequenceClassification"),
    "gpt2": gpt2,
    "bert": lambda: bert("SequenceClassification"),
    "bert-qa": lambda: bert("QuestionAnswering"),
}


@functools.lru_cache
def model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return MODELS[name]()


# --- both sides ------------------------------------------------------------------------------------------------


def ours(name: str, **fields: Any) -> Selection:
    selected = select(model(name), LoraConfig(**fields))
    return {n: "full" if target.layout is None else (target.r, target.scaling) for n, target in selected.items()}


def theirs(name: str, **fields: Any) -> Selection:
    """What PEFT makes trainable in a copy of the model, by our names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(copy.deepcopy(model(name)), peft.LoraConfig(**copy.deepcopy(fields)))
    selected: Selection = {}
    for path, module in wrapped.named_modules():
        if isinstance(module, LoraLayer):
            fused = isinstance(module.get_base_layer(), nn.MultiheadAttention)
            leaf = getattr(module, "parameter_name", None) or ("in_proj_weight" if fused else "weight")
            selected[f"{plain(path)}.{leaf}"] = (module.r["default"], module.scaling["default"])
    for path, parameter in wrapped.named_parameters():
        if parameter.requires_grad and "lora_" not in path:
            selected[plain(path)] = "full"
    return selected


def plain(path: str) -> str:
    path = path.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return re.sub(r"(^|\.)base_layer(?=\.|$)", "", path)


Q = ["q_proj"]
ACCEPTED: list[Any] = [
    # lists: full names and dotted suffixes, nothing else
    ("net", {"target_modules": Q}),
    ("net", {"target_modules": ["layers.0.q_proj"]}),
    ("net", {"target_modules": ["tower.q_proj", "embed"]}),
    ("net", {"target_modules": ["experts.1.up", "0.xq_proj"]}),
    pytest.param("net", {"target_modules": {"lm_head", "q_proj", "xq_proj"}}, id="net-a-set"),  # no order of its own
    ("conv", {"target_modules": ["conv", "stem", "down.0", "2", "fc"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "embed_tokens", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn", "mlp.c_proj", "wte"]}),
    ("gpt2", {"target_modules": ["transformer.h.1.attn.c_attn"]}),
    ("bert", {"target_modules": ["query", "output.dense"]}),
    ("attention", {"target_modules": ["attn"]}),
    ("attention", {"target_modules": ["self_attn", "linear1"]}),
    ("attention", {"target_modules": ["self_attn", "out_proj"], "r": 2}),
    ("recurrent", {"target_modules": ["fc"]}),
    # regular expressions: the whole name
    ("net", {"target_modules": r"layers\.[02]\.x?q_proj"}),
    ("net", {"target_modules": r".*\.q_proj"}),
    ("net", {"target_modules": "q_proj"}),
    ("net", {"target_modules": ".*q_proj|embed"}),
    ("flat", {"target_modules": ".*"}),
    ("llama", {"target_modules": r"model\.layers\.\d\.(self_attn\.[qk]_proj|mlp\.up_proj)"}),
    # all-linear
    ("net", {"target_modules": "all-linear"}),
    ("net", {"target_modules": "ALL-Linear", "exclude_modules": ["lm_head", "xq_proj"]}),
    ("conv", {"target_modules": "all-linear"}),
    ("attention", {"target_modules": "all-linear"}),
    ("recurrent", {"target_modules": "all-linear"}),
    ("moe", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear"}),
    ("llama-cls", {"target_modules": "all-linear"}),
    # the heads of task types are trained in full
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert", {"target_modules": "all-linear", "task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}),
    ("bert", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    ("bert", {"target_modules": ["query"], "task_type": "FEATURE_EXTRACTION"}),
    ("bert-qa", {"target_modules": ["query"], "task_type": "QUESTION_ANS", "modules_to_save": ["LayerNorm"]}),
    ("llama-cls", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("llama", {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}),
    # exclusion wins
    ("net", {"target_modules": Q, "exclude_modules": ["tower.q_proj", "2.q_proj"]}),
    ("net", {"target_modules": Q, "exclude_modules": r"layers\.[01]\..*"}),
    ("net", {"target_modules": ".*q_proj", "exclude_modules": ["xq_proj", "1.q_proj"]}),
    # layers
    ("net", {"target_modules": Q, "layers_to_transform": 1}),
    ("net", {"target_modules": ["xq_proj"], "layers_to_transform": [0, 1]}),
    ("net", {"target_modules": ["xq_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}),
    ("net", {"target_modules": ["xq_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "tower.layers"]}),
    ("net", {"target_modules": ["up"], "layers_to_transform": [1]}),
    ("net", {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    ("net", {"target_modules": ["lm_head", "xq_proj"], "layers_to_transform": [0]}),
    ("net", {"target_modules": ["layers.2.xq_proj", "xq_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": Q, "layers_to_transform": 1}),
    ("gpt2", {"target_modules": ["c_attn"], "layers_to_transform": [0], "layers_pattern": "h"}),
    # patterns
    ("net", {"target_modules": Q, "rank_pattern": {"q_proj": 2, "layers.0.q_proj": 4}}),
    ("net", {"target_modules": Q, "rank_pattern": {"layers.0.q_proj": 4, "q_proj": 2}, "lora_alpha": 3}),
    ("net", {"target_modules": Q, "rank_pattern": {r"^layers\.\d+\.q_proj": 4}, "use_rslora": True}),
    ("net", {"target_modules": Q, "alpha_pattern": {r"tower\..*": 5, "q_proj": 7}}),
    ("net", {"target_modules": [*Q, "embed"], "alpha_pattern": {"embed": 5}, "rank_pattern": {r".*\.q_proj": 3}}),
    ("attention", {"target_modules": ["attn"], "rank_pattern": {"attn": 2}, "alpha_pattern": {"attn": 6}}),
    ("llama", {"target_modules": "all-linear", "rank_pattern": {r"layers\.1\..*": 2, "o_proj": 4}}),
    # fully trained modules and biases
    ("net", {"target_modules": Q, "modules_to_save": ["lm_head", "embed"]}),
    ("net", {"target_modules": Q, "modules_to_save": ["tower.layers.1"]}),
    ("net", {"target_modules": [*Q, "xq_proj"], "modules_to_save": ["layers.1"]}),
    ("conv", {"target_modules": ["conv"], "modules_to_save": ["fc"], "bias": "all"}),
    ("net", {"target_modules": Q, "bias": "all"}),
    ("net", {"target_modules": [*Q, "xq_proj"], "bias": "lora_only", "layers_to_transform": [0]}),
    ("conv", {"target_modules": ["stem", "down.0", "1.conv"], "bias": "lora_only"}),
    ("conv", {"target_modules": ["stem"], "bias": "all"}),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    ("bert", {"target_modules": ["query"], "bias": "all", "modules_to_save": ["classifier"]}),
    ("attention", {"target_modules": ["attn"], "bias": "all"}),
    ("attention", {"target_modules": ["attn"], "bias": "lora_only"}),
    ("recurrent", {"target_modules": ["fc"], "bias": "all"}),
    # parameters
    ("moe", {"target_parameters": ["gate_up_proj", "experts.down_proj"]}),
    ("moe", {"target_parameters": ["layers.0.experts.down_proj"], "target_modules": ["router"]}),
    ("moe", {"target_parameters": ["down_proj"], "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q": 1}}),
    ("moe", {"target_parameters": ["gate_up_proj"], "rank_pattern": {r"layers\.0\.experts\.gate_up_proj": 2}}),
    ("net", {"target_parameters": ["lm_head.weight", "layers.1.q_proj.weight"]}),
    ("net", {"target_parameters": ["lm_head.weight"], "rank_pattern": {"lm_head.weight": 2}}),
    ("flat", {"target_parameters": ["0.weight"], "target_modules": ["1"], "bias": "lora_only"}),
]


@pytest.mark.parametrize(("name", "fields"), ACCEPTED, ids=lambda value: str(value)[:70])
def test_selects_what_peft_injects(name: str, fields: dict[str, Any]) -> None:
    expected = theirs(name, **fields)
    if fields.get("alpha_pattern") == {"q": 1}:  # PEFT only warns of it
        fields = {**fields, "alpha_pattern": {}}
    assert expected, "the row compares nothing"
    assert ours(name, **fields) == expected


def entries(name: str) -> list[str]:
    """Everything that a list may name: each module's full name and each of its dotted suffixes."""
    paths = [
        n.split(".") for n, module in model(name).named_modules() if n and next(module.parameters(), None) is not None
    ]
    return sorted({".".join(path[i:]) for path in paths for i in range(len(path))})


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(["net", "conv", "attention", "gpt2", "moe"]))
def test_selects_what_peft_injects_for_any_lists(data: st.DataObject, name: str) -> None:
    draw, entry = data.draw, st.sampled_from(entries(name))
    supported = (nn.Linear, nn.Embedding, nn.Conv2d, nn.MultiheadAttention)
    leaves = [n for n, m in model(name).named_modules() if isinstance(m, supported) or type(m).__name__ == "Conv1D"]
    suffixes = sorted({".".join(n.split(".")[i:]) for n in leaves for i in range(n.count(".") + 1)})
    fitting = st.sampled_from(suffixes)
    target = fitting | fitting | fitting | entry
    fields: dict[str, Any] = {
        "target_modules": draw(st.lists(target, min_size=1, max_size=4)),
        "exclude_modules": draw(st.just([]) | st.lists(entry, max_size=2)),
        "layers_to_transform": draw(
            st.none() | st.none() | st.integers(0, 2) | st.lists(st.integers(0, 1), max_size=2)
        ),
        "rank_pattern": draw(st.dictionaries(target, st.integers(1, 3).map(lambda n: 2 * n), max_size=2)),
        "use_rslora": draw(st.booleans()),
        "bias": draw(st.sampled_from(["none", "all", "lora_only"])),
    }
    try:
        expected = theirs(name, **fields)
    except ValueError:  # nothing matched, or an unsupported module did
        expected = {}
    try:
        selected, refusal = ours(name, **fields), ""
    except TargetError as error:
        selected, refusal = {}, str(error)
    assert selected == expected or silent_in_peft(refusal, expected)


def silent_in_peft(message: str, selected: Selection) -> bool:
    """Whether a refusal is right about something that PEFT passed over when it selected that."""
    # Of attention PEFT knows the whole as a target, and not its output projection.
    adapted = [re.sub(r"\.in_proj_weight$|\.weight$", "", n) for n, value in selected.items() if value != "full"]
    adapted = [n for n in adapted if not (n.endswith(".out_proj") and n.removesuffix(".out_proj") in adapted)]
    if unused := re.match(r"rank_pattern: '(.*?)' matches none", message):
        return not any(re.match(rf"(.*\.)?({unused[1]})$", n) for n in adapted)
    if empty := re.match(r"layers_to_transform: no target is in layer (\d+)", message):
        indices = [re.match(r".*?\.[^.]*\.(\d+)\.", n) for n in adapted]
        return not any(found and found[1] == empty[1] for found in indices)
    return message.startswith("bias=") and "full" not in selected.values()


# --- what PEFT does in silence, or with a warning ----------------------------------------------------------------

NEAR = "Near names: "
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("net", {"target_modules": ["q_proj", "v_proj"]},
     f"target_modules: 'v_proj' matches no module. {NEAR}q_proj, xq_proj"),
    ("net", {"target_modules": ["q_prj"]}, f"target_modules: 'q_prj' matches no module. {NEAR}q_proj"),
    ("net", {"target_modules": ["_proj"]}, "target_modules: '_proj' matches no module"),
    ("net", {"target_modules": [".*q_proj"]}, "target_modules: '.*q_proj' matches no module"),
    ("net", {"target_modules": ["all-linear"]}, "target_modules: 'all-linear' matches no module"),
    ("net", {"target_modules": r".*\.v_proj"},
     r"target_modules: the regular expression '.*\\.v_proj' matches"),
    ("net", {"target_modules": "layers.0"},
     "target_modules matches 'layers.0', a Block, which is not supported"),
    ("net", {"target_modules": ["norm", "q_proj"]},
     "matches 'layers.0.norm', a LayerNorm, which is not supported"),
    ("net", {"target_modules": r"layers\.0\.[nq].*"}, "matches 'layers.0.norm', a LayerNorm"),
    ("net", {"target_modules": Q, "exclude_modules": ["qproj"]},
     f"exclude_modules: 'qproj' matches no module. {NEAR}q_proj"),
    ("net", {"target_modules": Q, "exclude_modules": ["xq_proj", "z"]},
     "exclude_modules: 'z' matches no module"),
    ("net", {"target_modules": Q, "exclude_modules": "layer"},
     "exclude_modules: the regular expression 'layer'"),
    ("net", {"target_modules": Q, "exclude_modules": Q},
     "nothing is left to adapt: target_modules=('q_proj',)"),
    ("net", {"target_modules": ["embed"], "modules_to_save": ["embed"]}, "nothing is left to adapt"),
    ("net", {"target_modules": Q, "layers_to_transform": [0, 3]},
     "no target is in layer 3. Layers with targets: 0, 1."),
    ("net", {"target_modules": ["lm_head"], "layers_to_transform": 0}, "layer 0. Layers with targets: none."),
    ("net", {"target_modules": Q, "layers_to_transform": 0, "layers_pattern": "h"}, "(layers_pattern=['h'])"),
    ("net", {"target_modules": Q, "layers_to_transform": 2, "layers_pattern": "tower.layers"},
     "no target is in layer 2. Layers with targets: 0, 1 (layers_pattern=['tower.layers'])"),
    ("net", {"target_modules": Q, "rank_pattern": {"v_proj": 2}},
     f"rank_pattern: 'v_proj' matches none of the targets. {NEAR}q_proj"),
    ("net", {"target_modules": Q, "rank_pattern": {"xq_proj": 2}}, "rank_pattern: 'xq_proj' matches none"),
    ("net", {"target_modules": Q, "alpha_pattern": {"q_proj": 2, "layers": 1}},
     "alpha_pattern: 'layers' matches none"),
    ("moe", {"target_parameters": ["down_proj"], "rank_pattern": {"experts": 2}},
     "rank_pattern: 'experts' matches none"),
    ("net", {"target_modules": Q, "modules_to_save": ["lm_haed"]},
     f"modules_to_save: 'lm_haed' matches no module. {NEAR}lm_head"),
    ("net", {"target_modules": Q, "modules_to_save": ["head"]}, "modules_to_save: 'head' matches no module"),
    ("net", {"target_modules": ["embed"], "modules_to_save": ["q_proj"]},
     "modules_to_save: 'q_proj' names 'layers.0.q_proj', but PEFT would also save 'layers.0.xq_proj'"),
    ("conv", {"target_modules": ["stem"], "modules_to_save": ["blocks"]},
     "has the buffer 'blocks.0.bn.running_mean'"),
    ("conv", {"target_modules": ["stem"], "modules_to_save": ["down.1"]},
     "modules_to_save: 'down.1' has no parameters"),
    ("conv", {"target_modules": ["stem", "bn"]},
     "matches 'blocks.0.bn', a BatchNorm2d, which is not supported"),
    ("net", {"target_modules": ["lm_head"], "bias": "lora_only"},
     "bias='lora_only': there is no bias to train"),
    ("moe", {"target_parameters": ["gate_proj"]},
     f"target_parameters: 'gate_proj' matches no parameter. {NEAR}gate_up_proj"),
    ("moe", {"target_parameters": ["down_proj", "up"]}, "target_parameters: 'up' matches no parameter"),
    ("moe", {"target_parameters": ["counts"]},
     "cannot adapt 'layers.0.experts.counts' has dtype torch.int64"),
    ("moe", {"target_parameters": ["router.bias"]}, "cannot adapt 'layers.0.router.bias' has shape [3]"),
    ("conv", {"target_parameters": ["bn.running_mean"]}, "'bn.running_mean' matches no parameter"),
    ("net", {"target_modules": ["lm_head"], "target_parameters": ["lm_head.weight"]},
     "'lm_head.weight' is also a target of target_modules"),
    ("moe", {"target_parameters": ["down_proj"], "modules_to_save": ["layers.1"]},
     "'layers.1.experts.down_proj' is in 'layers.1', which modules_to_save fully fine-tunes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refuses_what_would_be_a_silent_mismatch(name: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TargetError, match=re.escape(message)):
        ours(name, **fields)


@pytest.mark.parametrize("layer", [nn.EmbeddingBag(5, 3), nn.Bilinear(2, 3, 4)], ids=lambda layer: type(layer).__name__)
def test_a_layer_that_only_its_parameter_names_says_the_parameter(layer: nn.Module) -> None:
    model = nn.ModuleDict({"layer": layer, "out": nn.Linear(4, 3)})
    with pytest.raises(TargetError, match=r"or name its parameter: target_parameters=\['layer.weight'\]"):
        select(model, LoraConfig(target_modules=["layer"]))
    assert [*select(model, LoraConfig(target_parameters=["layer.weight"]))] == ["layer.weight"]
    assert [*select(model, LoraConfig(target_modules="all-linear"))] == ["out.weight"]  # as in PEFT


def test_refuses_all_linear_without_a_linear_layer() -> None:
    with pytest.raises(TargetError, match="'all-linear': Conv1d has no linear layer"):
        select(nn.Conv1d(1, 1, 1), LoraConfig(target_modules="all-linear"))


def test_refuses_an_empty_weight_and_an_integer_one() -> None:
    with pytest.raises(TargetError, match=r"cannot adapt '0.weight' has shape \[0, 2\]: it is empty"):
        select(nn.Sequential(nn.Embedding(0, 2)), LoraConfig(target_modules=("0",)))
    quantised = nn.Sequential(nn.Linear(2, 2))
    quantised[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"cannot adapt '0.weight' has dtype torch.int8"):
        select(quantised, LoraConfig(target_modules=("0",)))


# --- beyond PEFT -----------------------------------------------------------------------------------------------


def test_heads_are_left_out_of_all_linear_and_trained_in_full() -> None:
    """The sets themselves, so that the comparison above does not rest on PEFT alone."""
    for name, head in [("bert", "classifier"), ("llama-cls", "score")]:
        every = {n for n, m in model(name).named_modules() if isinstance(m, nn.Linear)}
        assert set(ours(name, target_modules="all-linear")) == {f"{n}.weight" for n in every}
        task = ours(name, target_modules="all-linear", task_type="SEQ_CLS")
        assert {n for n, value in task.items() if value != "full"} == {f"{n}.weight" for n in every - {head}}
        full = {n for n, value in task.items() if value == "full"}
        assert full == {n for n, _ in model(name).named_parameters() if n.startswith(f"{head}.")} != set()
    assert "lm_head.weight" not in ours("llama", target_modules="all-linear")
    assert "lm_head.weight" in ours("net", target_modules="all-linear")


def test_token_classifiers_train_their_head_where_peft_fails() -> None:
    """PEFT adapts the head by "all-linear" first, and then cannot save it."""
    assert ours("bert", target_modules="all-linear", task_type="TOKEN_CLS") == (
        ours("bert", target_modules="all-linear", task_type="SEQ_CLS")
    )


@pytest.mark.parametrize(("name", "fields", "layouts"), [
    ("recurrent", {"target_modules": ["rnn"]},
     {f"rnn.weight_{k}_l{i}{back}": Recurrent() for i in (0, 1) for back in ("", "_reverse") for k in ("ih", "hh")}),
    ("recurrent", {"target_modules": ["up"]}, {"up.weight": ConvTranspose(groups=2)}),
    ("recurrent", {"target_parameters": ["rnn.weight_hh_l1"]}, {"rnn.weight_hh_l1": Recurrent()}),
    ("attention", {"target_modules": ["attn"]},
     {"attn.in_proj_weight": Attention(), "attn.out_proj.weight": Attention()}),
    ("conv", {"target_modules": ["1.conv", "fc"]}, {"blocks.1.conv.weight": Conv(groups=2), "fc.weight": Linear()}),
    ("moe", {"target_modules": ["router"], "target_parameters": ["down_proj"], "bias": "lora_only"},
     {f"layers.{i}.{name}": layout for i in (0, 1) for name, layout in (
         ("router.weight", Linear()), ("router.bias", None),
         ("experts.down_proj", Parameter(bool(i))), ("experts.bias", None))}),
    ("net", {"target_parameters": ["embed.weight"]}, {"embed.weight": Embedding()}),
    ("moe", {"target_parameters": ["gate_up_proj", "layers.1.experts.down_proj"]},
     {"layers.0.experts.gate_up_proj": Parameter(False, 0, 1),
      "layers.1.experts.down_proj": Parameter(True, 0, 2), "layers.1.experts.gate_up_proj": Parameter(True, 1, 2)}),
])  # fmt: skip
def test_layouts_in_the_order_of_the_model(
    name: str, fields: dict[str, Any], layouts: dict[str, Layout | None]
) -> None:
    selected = select(model(name), LoraConfig(**fields))
    assert {n: target.layout for n, target in selected.items()} == layouts
    order = [n for n, _ in model(name).named_parameters() if n in layouts]
    assert list(selected) == order


def test_separate_projections_of_attention_have_one_update_each() -> None:
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
    selected = select(nn.ModuleDict({"attn": attention}), LoraConfig(target_modules=("attn",), r=2))
    assert set(selected) == {
        f"attn.{n}" for n in ("q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight")
    }


def test_a_model_that_is_one_layer_can_be_its_own_target() -> None:
    for targets in ("all-linear", ".*"):
        assert list(select(nn.Linear(2, 3), LoraConfig(target_modules=targets))) == ["weight"]


def test_selecting_reads_the_model_only() -> None:
    net = Net()
    before = {n: (id(m), type(m), m.training, dict(vars(m))) for n, m in net.named_modules()}
    state = {n: p.clone() for n, p in net.state_dict().items()}
    init(net, LoraConfig(target_modules="all-linear", modules_to_save=("embed",), bias="all", use_dora=True))
    assert {n: (id(m), type(m), m.training, dict(vars(m))) for n, m in net.named_modules()} == before
    for n, p in net.state_dict().items():
        assert torch.equal(p, state[n]), n
    assert all(p.requires_grad for p in net.parameters())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_a_single_weight_is_none_of_all_linear() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0), nn.Linear(3, 2))
    assert [*init(model, LoraConfig(target_modules="all-linear"))] == ["0.weight", "2.weight"]
    with pytest.raises(TargetError, match=r"cannot adapt '1.weight' has shape \[0, 3\]: it is empty"):
        init(model, LoraConfig(target_modules=["1"]))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "parametrize",
    [
        nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    ],
)  # fmt: skip
def test_a_computed_weight_is_no_target(parametrize: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(parametrize(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"'0\.weight' is not a parameter but is computed.*exclude_modules=\['0'\]"):
        init(model, LoraConfig(target_modules="all-linear"))
    assert [*init(model, LoraConfig(target_modules="all-linear", exclude_modules=["0"]))] == ["1.weight"]
