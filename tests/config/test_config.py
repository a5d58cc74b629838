"""`LoraConfig`: what it refuses, how it normalises, and that its fields are PEFT's."""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from funclora import LoraConfig
from funclora._config.regex import Endings
from funclora.errors import ConfigError, FuncloraError

TARGETS: dict[str, Any] = {"target_modules": ["q_proj"]}

# A rejected configuration -> what its message must say: where, what was expected, what came.
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: expected a positive integer, got 0"),
    ({"r": -2}, "r: expected a positive integer, got -2"),
    ({"r": 4.0}, "r: expected a positive integer, got 4.0"),
    ({"r": "4"}, "r: expected a positive integer, got '4'"),
    ({"r": True}, "r: expected a positive integer, got True"),
    ({"r": None}, "r: expected a positive integer, got None"),
    ({"rank_pattern": {"q": 0}}, "rank_pattern['q']: expected a positive integer, got 0"),
    ({"rank_pattern": {"q": 2.0}}, "rank_pattern['q']: expected a positive integer, got 2.0"),
    ({"rank_pattern": ["q"]}, "rank_pattern: expected a dict from pattern to number, got ['q']"),
    ({"rank_pattern": {"q(": 2}}, "rank_pattern: 'q(' is not a regular expression"),
    ({"rank_pattern": {"": 2}}, "rank_pattern: expected a non-empty string, got ''"),
    ({"rank_pattern": {3: 2}}, "rank_pattern: expected a non-empty string, got 3"),
    ({"lora_alpha": 0}, "lora_alpha: 0 would make the adapter have no effect"),
    ({"lora_alpha": "16"}, "lora_alpha: expected a finite number, got '16'"),
    ({"lora_alpha": True}, "lora_alpha: expected a finite number, got True"),
    ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number, got nan"),
    ({"lora_alpha": float("inf")}, "lora_alpha: expected a finite number, got inf"),
    ({"lora_alpha": 1e308}, "lora_alpha: 1e+308 scales the update by 1.25e+307, which float32 cannot represent"),
    ({"lora_alpha": -1e40, "use_rslora": True}, "lora_alpha: -1e+40 scales the update by -3.53553e+39, which float32"),
    ({"lora_alpha": 1e-40}, "lora_alpha: 1e-40 scales the update by 1.25e-41, which float32 cannot represent"),
    ({"alpha_pattern": {"q": 1e40}}, "alpha_pattern['q']: 1e+40 scales the update by 1.25e+39"),
    ({"alpha_pattern": {"q": 0.0}}, "alpha_pattern['q']: 0 would make the adapter have no effect"),
    ({"alpha_pattern": {"q": None}}, "alpha_pattern['q']: expected a finite number, got None"),
    ({"alpha_pattern": {"*": 2}}, "alpha_pattern: '*' is not a regular expression"),
    ({"alpha_pattern": "q"}, "alpha_pattern: expected a dict from pattern to number, got 'q'"),
    ({"lora_dropout": 1}, "lora_dropout: expected a number in [0, 1), got 1"),
    ({"lora_dropout": -0.1}, "lora_dropout: expected a number in [0, 1), got -0.1"),
    ({"lora_dropout": float("nan")}, "lora_dropout: expected a number in [0, 1), got nan"),
    ({"lora_dropout": "0.1"}, "lora_dropout: expected a number, got '0.1'"),
    ({"lora_dropout": False}, "lora_dropout: expected a number, got False"),
    ({"use_rslora": 1}, "use_rslora: expected True or False, got 1"),
    ({"use_dora": "no"}, "use_dora: expected True or False, got 'no'"),
    ({"bias": "al"}, "bias: expected one of 'none', 'all', 'lora_only', got 'al'. Near names: all"),
    ({"bias": None}, "bias: expected one of 'none', 'all', 'lora_only', got None"),
    ({"bias": ["all"]}, "bias: expected one of 'none', 'all', 'lora_only', got ['all']"),
    ({"init_lora_weights": "gausian"}, "got 'gausian'. Near names: gaussian"),
    ({"init_lora_weights": "pissa_niter_"}, "'eva', got 'pissa_niter_'. The fast variant is 'pissa_niter_[k]'"),
    ({"init_lora_weights": "pissa_niter_-1"}, "with a number for [k]"),
    ({"task_type": "SEQ_CLF"}, "task_type: expected one of None, 'SEQ_CLS', 'SEQ_2_SEQ_LM', 'CAUSAL_LM', "),
    ({"task_type": "SEQ_CLF"}, "got 'SEQ_CLF'. Near names: SEQ_CLS"),
    ({"task_type": 1}, "got 1"),
    ({"init_lora_weights": 1}, "init_lora_weights: expected one of True, False, 'gaussian', 'orthogonal', 'pissa', "),
    ({"init_lora_weights": 1}, "'olora', 'loftq', 'eva', got 1"),
    ({"init_lora_weights": None}, "'eva', got None"),
    ({"init_lora_weights": "orthogonal", "r": 3}, "init_lora_weights='orthogonal' needs even ranks, got 3"),
    ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 5}}, "needs even ranks, got 8, 5"),
    ({"target_modules": None}, "name what to adapt: target_modules"),
    ({"target_modules": []}, "name what to adapt: target_modules"),
    ({"target_modules": None, "target_parameters": []}, "both are empty"),
    ({"target_modules": ["q", ""]}, "target_modules: expected non-empty strings, got ''"),
    ({"target_modules": [1]}, "target_modules: expected non-empty strings, got 1"),
    ({"target_modules": 5}, "target_modules: expected a list of names, got 5"),
    ({"target_modules": "[q"}, "target_modules: '[q' is not a regular expression"),
    ({"target_modules": ""}, "target_modules: expected a non-empty string, got ''"),
    ({"exclude_modules": "(q"}, "exclude_modules: '(q' is not a regular expression"),
    ({"exclude_modules": ["a", None]}, "exclude_modules: expected non-empty strings, got None"),
    ({"modules_to_save": "head"}, "modules_to_save: expected a list of names, got 'head'"),
    ({"modules_to_save": [""]}, "modules_to_save: expected non-empty strings, got ''"),
    ({"target_parameters": "w"}, "target_parameters: expected a list of names, got 'w'"),
    ({"layers_to_transform": "0"}, "layers_to_transform: expected an index or a list of them, got '0'"),
    ({"layers_to_transform": 1.0}, "layers_to_transform: expected an index or a list of them, got 1.0"),
    ({"layers_to_transform": -1}, "layers_to_transform: expected indices from 0 up, got -1"),
    ({"layers_to_transform": [0, "1"]}, "layers_to_transform: expected indices from 0 up, got '1'"),
    ({"layers_to_transform": [True]}, "layers_to_transform: expected indices from 0 up, got True"),
    ({"layers_to_transform": 0, "target_modules": ".*q"}, "layers_to_transform needs a list as target_modules"),
    ({"layers_to_transform": 0, "target_modules": "all-linear"}, "got the string 'all-linear'"),
    ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform, which is None"),
    ({"layers_pattern": "h", "layers_to_transform": []}, "layers_pattern needs layers_to_transform, which is None"),
    ({"layers_pattern": [0], "layers_to_transform": 1}, "layers_pattern: expected non-empty strings, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_refused_with_a_message_that_says_where_and_what(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        LoraConfig(**TARGETS | fields)
    assert isinstance(error.value, FuncloraError)
    assert isinstance(error.value, ValueError)


def test_unknown_fields_and_positional_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'loar_alpha'"):
        LoraConfig(**TARGETS | {"loar_alpha": 1})
    with pytest.raises(TypeError, match="positional argument"):
        LoraConfig(8)  # type: ignore[call-arg]


def test_defaults_are_those_of_peft() -> None:
    ours, theirs = LoraConfig(**TARGETS), peft.LoraConfig(**TARGETS)
    shared = {f.name for f in dataclasses.fields(LoraConfig)} - {"target_modules"}
    assert shared >= {"r", "lora_alpha", "lora_dropout", "bias", "rank_pattern", "init_lora_weights", "task_type"}
    for name in sorted(shared):
        assert hasattr(theirs, name), f"PEFT has no field {name}"
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "modules_to_save", "target_parameters"])
def test_lists_of_names_become_tuples(field: str) -> None:
    names: Any
    for names in (["v", "q"], ("v", "q"), iter(["v", "q"])):
        assert getattr(LoraConfig(**TARGETS | {field: names}), field) == ("v", "q")
    for names in ({"v", "q", "k"}, frozenset("vqk")):
        assert getattr(LoraConfig(**TARGETS | {field: names}), field) == ("k", "q", "v"), "sets have no order"


def test_strings_stay_strings() -> None:
    config = LoraConfig(target_modules=r".*\.q", exclude_modules="a|b")
    assert (config.target_modules, config.exclude_modules) == (r".*\.q", "a|b")


@pytest.mark.parametrize(("given_", "kept"), [
    (0, (0,)), (3, (3,)), ([2, 0], (2, 0)), ((1,), (1,)), ({9, 1}, (1, 9)), (range(2), (0, 1)),
    (set(), None), ([], None), ((), None), (None, None),
])  # fmt: skip
def test_layers_to_transform_become_a_tuple(given_: Any, kept: tuple[int, ...] | None) -> None:
    assert LoraConfig(**TARGETS, layers_to_transform=given_).layers_to_transform == kept


def test_layers_pattern_takes_a_string_or_a_list() -> None:
    for pattern in ("h", ["h"], ("h",)):
        config = LoraConfig(**TARGETS, layers_to_transform=1, layers_pattern=pattern)
        assert config.layers_pattern == ("h",)
    empty: Any
    for empty in ("", [], ()):  # as in PEFT
        fields = {**TARGETS, "layers_pattern": empty}
        assert LoraConfig(**fields).layers_pattern is None


def test_task_types_are_those_of_peft() -> None:
    for task in peft.TaskType:
        assert LoraConfig(**TARGETS, task_type=task).task_type == task.value
        assert type(LoraConfig(**TARGETS, task_type=task).task_type) is str


def test_patterns_of_none_are_no_patterns() -> None:
    config = LoraConfig(**TARGETS, rank_pattern=None, alpha_pattern=None)  # type: ignore[arg-type]
    assert config.rank_pattern == {}
    assert config.alpha_pattern == {}


@pytest.mark.parametrize("name", ["all-linear", "ALL-LINEAR", "All-Linear"])
def test_all_linear_is_known_in_any_case(name: str) -> None:
    assert LoraConfig(target_modules=name).all_linear
    assert not LoraConfig(target_modules=(name,)).all_linear
    assert not LoraConfig(target_modules=f".*{name}").all_linear


def test_frozen() -> None:
    config = LoraConfig(**TARGETS)
    for f in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"cannot assign to field '{f.name}'"):
            setattr(config, f.name, getattr(config, f.name))


def test_what_the_caller_passed_is_not_kept() -> None:
    names, ranks, alphas = ["q"], {"q": 2}, {"q": 4.0}
    config = LoraConfig(target_modules=names, rank_pattern=ranks, alpha_pattern=alphas)
    names.append("v")
    ranks["v"] = 3
    alphas.clear()
    assert config == LoraConfig(target_modules=("q",), rank_pattern={"q": 2}, alpha_pattern={"q": 4.0})


def test_equality_is_by_value() -> None:
    config = LoraConfig(**TARGETS | {"target_modules": ["q", "v"]}, rank_pattern={"q": 2})
    assert config == LoraConfig(target_modules=("q", "v"), rank_pattern={"q": 2})
    for changes in ({"r": 4}, {"target_modules": ("v", "q")}, {"rank_pattern": {"q": 3}}, {"use_dora": True}):
        assert config != config.replace(**changes), changes


def test_replace_changes_one_field_and_checks_anew() -> None:
    config = LoraConfig(**TARGETS, lora_alpha=3, alpha_pattern={"q": 1})
    changed = config.replace(r=4)
    assert (changed.r, changed.lora_alpha, changed.alpha_pattern) == (4, 3, {"q": 1})
    assert config.r == 8
    assert changed.replace(r=8) == config
    with pytest.raises(ConfigError, match="r: expected a positive integer, got 0"):
        config.replace(r=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        config.replace(rank=2)


def test_the_first_pattern_that_matches_wins() -> None:
    name = "model.layers.0.self_attn.q_proj"
    broad_first = LoraConfig(**TARGETS, rank_pattern={"q_proj": 2, name: 4}, alpha_pattern={"q_proj": 3, name: 5})
    exact_first = LoraConfig(**TARGETS, rank_pattern={name: 4, "q_proj": 2}, alpha_pattern={name: 5, "q_proj": 3})
    assert (broad_first.rank_of(name), broad_first.alpha_of(name)) == (2, 3)
    assert (exact_first.rank_of(name), exact_first.alpha_of(name)) == (4, 5)
    assert (exact_first.rank_of("x.q_proj"), exact_first.alpha_of("x.q_proj")) == (2, 3)
    assert (exact_first.rank_of("x.v_proj"), exact_first.alpha_of("x.v_proj")) == (8, 8)


@pytest.mark.parametrize(("pattern", "name", "matches"), [
    ("q_proj", "q_proj", True),
    ("q_proj", "layers.0.q_proj", True),
    ("q_proj", "layers.0.xq_proj", False),
    ("q_proj", "layers.0.q_proj.base", False),
    (r"layers\.[01]\..*", "model.layers.1.mlp.up", True),
    (r"layers\.[01]\..*", "model.layers.2.mlp.up", False),
    ("q|v", "a.v", True),
    ("q|v", "a.vq", False),
    (r"^model\.q", "model.q", True),
    (r"^q", "model.q", False),
])  # fmt: skip
def test_patterns_match_as_in_peft(pattern: str, name: str, matches: bool) -> None:
    assert bool(Endings([pattern]).matching(name)) is matches
    assert (get_pattern_key([pattern, ".*"], name) == pattern) is matches


@given(alpha=st.floats(0.1, 100), r=st.integers(1, 512))
def test_scaling_is_alpha_over_r_or_its_root(alpha: float, r: int) -> None:
    assert LoraConfig(**TARGETS).scaling(r, alpha) == pytest.approx(alpha / r, rel=1e-15)
    assert LoraConfig(**TARGETS, use_rslora=True).scaling(r, alpha) == pytest.approx(alpha / r**0.5, rel=1e-15)


# --- PEFT's own objects ----------------------------------------------------------------------------------------

FIELDS: dict[str, Any] = {
    "r": 4, "lora_alpha": 2.5, "lora_dropout": 0.25, "exclude_modules": ["a.q"], "use_rslora": True, "bias": "all",
    "modules_to_save": ["head"], "layers_to_transform": [1, 2], "rank_pattern": {"v": 2, "a.v": 6},
    "alpha_pattern": {"v": 2, "a.v": 1.5}, "init_lora_weights": "gaussian", "target_parameters": ["w"],
    "task_type": "SEQ_CLS", "base_model_name_or_path": "some/base", "trainable_token_indices": {"emb": [3, 1]},
    "ensure_weight_tying": True,
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [{}, *({name: value} for name, value in FIELDS.items()), FIELDS, {"use_dora": True}, {"lora_bias": True},
     {"trainable_token_indices": [5, 2]}, {"target_modules": "all-linear"}, {"target_modules": r".*\.q"},
     {"target_modules": None, "target_parameters": ["w"]}, {"layers_to_transform": [1], "layers_pattern": ["h"]}],
    ids=lambda fields: "+".join(fields)[:40],
)  # fmt: skip
def test_peft_s_objects_mean_the_same(fields: dict[str, Any]) -> None:
    ours = LoraConfig(**TARGETS | fields)
    theirs = ours.to_peft()
    assert isinstance(theirs, peft.LoraConfig)
    assert LoraConfig.from_peft(theirs) == ours
    assert LoraConfig.from_peft(theirs.to_dict()) == ours
    for name, value in fields.items():
        got = getattr(theirs, name)
        assert (sorted(got) if isinstance(got, set) else got) == (value or []), name
    assert list(theirs.rank_pattern) == list(ours.rank_pattern), "the order of patterns decides"


def test_every_field_of_peft_is_known() -> None:
    """A field of a new PEFT that this does not know must not pass unseen."""
    config = peft.LoraConfig(r=4, target_modules={"q", "v"}, inference_mode=True, fan_in_fan_out=True)
    assert LoraConfig.from_peft(config) == LoraConfig(r=4, target_modules=["q", "v"])


@pytest.mark.parametrize(("raw", "message"), [
    ({"use_qalora": True}, "from_peft: use_qalora=True is not supported"),
    ({"layer_replication": [[0, 2]]}, "layer_replication=[[0, 2]] is not supported"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens=[1] is not supported"),
    ({"megatron_config": {"a": 1}}, "megatron_config={'a': 1} is not supported"),
    ({"init_lora_weights": "corda"}, "init_lora_weights='corda' is not supported"),
    ({"peft_type": "IA3"}, "peft_type='LORA', got 'IA3'"),
    ({"peft_type": None}, "peft_type='LORA', got None"),
    ({"loar_alpha": 3}, "there is no such field: loar_alpha. Near names: lora_alpha"),
    ({"r": 0}, "r: expected a positive integer, got 0"),
    ({"target_modules": {"q": 1}}, "target_modules: expected a list, got {'q': 1}"),
    ({"target_modules": None}, "name what to adapt"),
])  # fmt: skip
def test_what_cannot_come_from_peft_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"]} | raw)


@pytest.mark.parametrize("config", [None, 3, "folder", peft.LoraConfig])
def test_what_is_no_configuration_is_refused(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"expected a peft.LoraConfig or a dict, got a "):
        LoraConfig.from_peft(config)


def test_other_methods_of_peft_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"peft_type='LORA', got .*IA3"):
        LoraConfig.from_peft(peft.IA3Config(target_modules=["q"], feedforward_modules=[]))
    with pytest.raises(ConfigError, match=r"loftq_config=.* is not supported"):
        LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"], "loftq_config": {"loftq_bits": 8}})


def test_without_peft_there_is_a_way_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert LoraConfig.from_peft({"peft_type": "LORA", "target_modules": ["q"]}) == LoraConfig(target_modules=["q"])
    with pytest.raises(ConfigError, match=r"to_peft needs PEFT\. Type: pip install peft"):
        LoraConfig(**TARGETS).to_peft()
