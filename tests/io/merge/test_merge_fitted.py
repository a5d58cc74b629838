"""Bases that lack what an adapter brings: a classifier's head, the embeddings of new tokens. PEFT is the oracle."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_oracle import IDS, close, logits
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import funclora as fl
from funclora.cli._app import app
from funclora.errors import ConfigError, FormatError, PeftFormatWarning, UnsupportedError

TEXT: dict[str, Any] = {
    "vocab_size": 17, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
KINDS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def language_model(kind: str, folder: Path, **fields: Any) -> Any:
    """A folder of a language model."""
    import transformers

    torch.manual_seed(3)
    decoder = {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 16}
    if kind == "llama":
        model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT | decoder | fields))
    elif kind == "bert":
        model = transformers.BertForMaskedLM(transformers.BertConfig(**TEXT | fields))
    else:
        model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(**TEXT | fields))
    model.save_pretrained(folder)
    return model


def trained(base: Any, folder: Path, config: peft.LoraConfig) -> Any:
    """PEFT's model with random adapters, saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(base, config).eval()
        with torch.no_grad():
            for value in wrapped.parameters():
                if value.requires_grad:
                    value.copy_(value + torch.randn(value.shape) / 3)
        wrapped.save_pretrained(folder)
    return wrapped


def score(wrapped: Any, ids: Any = IDS) -> Any:
    with torch.no_grad():
        out = wrapped(ids)
    return [out.start_logits, out.end_logits] if hasattr(out, "start_logits") else logits(out)


def with_head(tmp_path: Path, kind: str, task: str, **fields: Any) -> list[Any]:
    import transformers

    language_model(kind, tmp_path / "base")
    auto = getattr(transformers, KINDS[task])
    model = auto.from_pretrained(tmp_path / "base", **fields)
    targets = ["q_proj", "down_proj"] if kind == "llama" else ["query", "value"]
    saved = ["pooler"] if kind == "bert" and task == "SEQ_CLS" else None
    config = peft.LoraConfig(r=2, target_modules=targets, task_type=task, modules_to_save=saved)
    found: list[Any] = score(trained(model, tmp_path / "adapter", config))
    return found


ROWS = [
    ("llama", "SEQ_CLS"), ("llama", "TOKEN_CLS"), ("bert", "SEQ_CLS"),
    ("bert", "TOKEN_CLS"), ("bert", "QUESTION_ANS"), ("roberta", "SEQ_CLS"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "task"), ROWS)
def test_a_classifier_is_merged_into_its_language_model(tmp_path: Path, kind: str, task: str) -> None:
    import transformers

    options = {} if task == "QUESTION_ANS" else {"num_labels": 3}
    wanted = with_head(tmp_path, kind, task, **options)
    report = fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", verify=True)
    assert report.verification is not None
    assert report.verification.logits is not None
    assert {"llama": {"lm_head.weight"}}.get(kind, {"cls", "lm_head"}) & {
        part for key in report.left_out for part in (key, key.split(".")[0])
    }
    auto = getattr(transformers, KINDS[task])
    merged, found = auto.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert not found["mismatched_keys"]
    close(score(merged.eval()), wanted, 1e-5)


def test_a_class_with_other_names_of_layers_is_refused(tmp_path: Path) -> None:
    """transformers would fill all layers of this class with random values."""
    with_head(tmp_path, "llama", "QUESTION_ANS")
    with pytest.raises(FormatError, match=r"LlamaForQuestionAnswering, which has other names for its layers"):
        fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


def test_names_of_classes_are_in_the_result(tmp_path: Path) -> None:
    with_head(tmp_path, "llama", "SEQ_CLS", num_labels=3)
    (tmp_path / "adapter" / "classes.json").write_text('["no", "yes", "perhaps"]')
    fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "perhaps"}
    assert config["label2id"] == {"no": 0, "yes": 1, "perhaps": 2}


def test_inspect_shows_the_head(tmp_path: Path) -> None:
    with_head(tmp_path, "llama", "SEQ_CLS", num_labels=3)
    found = CliRunner().invoke(app, ["inspect", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--json"])
    assert found.exit_code == 0, found.output
    assert "score.weight" in {row["name"] for row in json.loads(found.stdout)["rows"]}


def test_a_module_that_would_be_random_is_refused(tmp_path: Path) -> None:
    """The pooler of BERT's classifier is new, and PEFT saves it only if it is asked to."""
    import transformers

    language_model("bert", tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    trained(model, tmp_path / "adapter", config)
    with pytest.raises(FormatError, match=r"needs 'bert.pooler.dense.(weight|bias)'.*would be random"):
        fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_heads_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for task in ("SEQ_CLS", "TOKEN_CLS"):
        with_head(tmp_path / task, "llama", task)
    folders = [tmp_path / task / "adapter" for task in ("SEQ_CLS", "TOKEN_CLS")]
    with pytest.raises(ConfigError, match="no model has both heads"):
        fl.merge_checkpoint(tmp_path / "SEQ_CLS" / "base", folders, tmp_path / "merged")


def test_a_model_without_such_a_class_is_refused(tmp_path: Path) -> None:
    with_head(tmp_path, "llama", "SEQ_CLS")
    config = json.loads((tmp_path / "base" / "config.json").read_text()) | {"model_type": "clip"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="no AutoModelForSequenceClassification for a model of type 'clip'"):
        fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")


# --- a vocabulary that has grown ---------------------------------------------------------------------------------


def grown(tmp_path: Path, *, tied: bool = False, **options: Any) -> tuple[Any, Any]:
    """The resized model, and PEFT's model of it."""
    base = language_model("llama", tmp_path / "base", tie_word_embeddings=tied)
    base = type(base).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(20, mean_resizing=False)
    before = copy.deepcopy(base)
    config = peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
    return before, trained(base, tmp_path / "adapter", config)


IDS_WITH_NEW = torch.tensor([[1, 17, 3, 19], [4, 18, 2, 2]])


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_beside_the_adapter_are_its_values(tmp_path: Path, tied: bool) -> None:
    """A resized model whose new rows are others: PEFT takes those of the file."""
    _, wrapped = grown(tmp_path, tied=tied)
    wanted = score(wrapped, IDS_WITH_NEW)
    import transformers

    model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    torch.manual_seed(11)
    model.resize_token_embeddings(20, mean_resizing=False)
    with pytest.warns(PeftFormatWarning, match=r"other values of .*'model.embed_tokens'.* than the model has"):
        adapters, config = fl.load_peft(tmp_path / "adapter", model)
    assert isinstance(adapters["model.embed_tokens.weight"], fl.Full)
    close(logits(fl.apply(model, fl.base_params(model), adapters, IDS_WITH_NEW)), wanted, 1e-5)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "adapter")).eval()
    close(score(theirs, IDS_WITH_NEW), wanted, 1e-5)
    fl.save_peft(tmp_path / "again", adapters, config)
    again, _ = fl.load_peft(tmp_path / "again", model)
    close(logits(fl.apply(model, fl.base_params(model), again, IDS_WITH_NEW)), wanted, 1e-5)


def test_equal_embeddings_are_no_values_of_the_adapter(tmp_path: Path) -> None:
    model, _ = grown(tmp_path)
    adapters, _ = fl.load_peft(tmp_path / "adapter", model)
    assert not any(isinstance(rule, fl.Full) for rule in adapters.values())


def test_a_model_that_was_not_resized_is_refused_with_the_number(tmp_path: Path) -> None:
    grown(tmp_path)
    import transformers

    model: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.raises(FormatError, match=r"trained with 20 tokens, and the model has 17. Call model.resize_token_emb"):
        fl.load_peft(tmp_path / "adapter", model)


@pytest.mark.parametrize("tied", [False, True])
def test_merge_writes_the_larger_embeddings(tmp_path: Path, tied: bool) -> None:
    import transformers

    _, wrapped = grown(tmp_path, tied=tied)
    with pytest.warns(PeftFormatWarning, match="other values of"):
        report = fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", verify=True)
    assert report.verification is not None
    assert report.verification.logits is not None
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["vocab_size"] == 20
    merged, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert merged.get_input_embeddings().num_embeddings == 20
    close(score(merged.eval(), IDS_WITH_NEW), score(wrapped, IDS_WITH_NEW), 1e-5)


def test_more_rows_without_their_values_are_refused(tmp_path: Path) -> None:
    """Only the output layer is in the file: the new rows of the embeddings are in no folder."""
    grown(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "embed_tokens" not in key}, file)
    refused = pytest.raises(FormatError, match=r"needs 'model\.embed_tokens\.weight'.*would be random")
    with refused, pytest.warns(PeftFormatWarning, match="other values of 'lm_head'"):
        fl.merge_checkpoint(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
