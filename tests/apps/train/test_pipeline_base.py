"""The base of a run against transformers: losses, scores, continuations, heads, packing; and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import task_models
import text_models
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import funclora as fl
from funclora._apps.train.base import Base, ByteTokenizer, context_limit, load_base, load_tokenizer
from funclora._apps.train.batches import collate
from funclora._apps.train.rows import Example
from funclora._apps.train.settings import CAUSAL, DECODERS, SEQ2SEQ, SEQUENCE, TASKS, TOKEN, Settings
from funclora.errors import ConfigError, FormatError, UnsupportedError

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.manual_seed(0)
    kinds = ("llama", "gpt2", "bert", "t5")
    return {kind: task_models.save(tmp_path_factory.mktemp(kind), kind) for kind in kinds}


def loaded(folder: Path, task: str, **changes: Any) -> Base:
    settings = Settings(model=folder, task=task, **changes)
    return load_base(settings, load_tokenizer(settings), COLOURS if task in (SEQUENCE, TOKEN) else ())


def batch_of(task: str) -> dict[str, Tensor]:
    """Rows of different lengths, with positions that have no label."""
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    labels: dict[str, list[list[int]]] = {
        CAUSAL: [[-100, -100, 7, 8, 9, 10], [-100, 12, 13]],
        SEQUENCE: [[2], [0]],
        TOKEN: [[-100, 0, 1, 2, -100, 1], [0, -100, 2]],
        SEQ2SEQ: [[20, 21, 2], [22, 23, 24, 25, 2]],
    }
    examples = [Example(ids, label, (len(ids),), "x:1") for ids, label in zip(rows, labels[task], strict=True)]
    return collate(examples, pad=0, task=task)


PAIRS = [(CAUSAL, "llama"), (CAUSAL, "gpt2"), (SEQUENCE, "bert"), (SEQUENCE, "llama"), (SEQUENCE, "gpt2"),
         (TOKEN, "bert"), (SEQ2SEQ, "t5")]  # fmt: skip


@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_the_loss_is_that_of_transformers(folders: dict[str, Path], task: str, kind: str) -> None:
    base, batch = loaded(folders[kind], task), batch_of(task)
    counts = {CAUSAL: 6, SEQUENCE: 2, TOKEN: 6, SEQ2SEQ: 8}
    assert base.count(batch) == counts[task]
    bound = fl.bind(base.model, base.params, {})
    expected = base.model(**batch)  # its own loss is a mean
    loss = base.loss(bound, batch)
    torch.testing.assert_close(loss, expected.loss * counts[task], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(base.logits(bound, batch), expected.logits, rtol=1e-5, atol=1e-6)
    sums = base.score(bound, batch)
    torch.testing.assert_close(sums["loss"], loss)
    if task in (SEQUENCE, TOKEN):
        right = expected.logits.argmax(-1) == batch["labels"]
        assert sums["correct"].item() == right[batch["labels"] != -100].sum().item()
    else:
        assert "correct" not in sums


@pytest.mark.parametrize(("task", "kind"), PAIRS)
def test_gradients_reach_the_adapters_and_nothing_else(folders: dict[str, Path], task: str, kind: str) -> None:
    base, batch = loaded(folders[kind], task), batch_of(task)
    config = fl.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapters = fl.init(base.model, config, params=base.params)
    _, grads = fl.value_and_grad(base.loss)(base.model, base.params, adapters, batch)
    reached = [name for name, rule in grads.items() if bool(rule.b.abs().max() > 0)]  # type: ignore[attr-defined]
    unread = {"bert.pooler.dense.weight"} if task == TOKEN else set()
    assert set(reached) == set(adapters) - unread
    assert not any(p.requires_grad for p in base.model.parameters())
    assert not base.model.training


@pytest.mark.parametrize(("task", "kind"), [(CAUSAL, "llama"), (CAUSAL, "gpt2"), (SEQ2SEQ, "t5")])
@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_a_continuation_is_transformers_greedy_one(
    folders: dict[str, Path], task: str, kind: str, quantize: str
) -> None:
    base = loaded(folders[kind], task, quantize=quantize)
    settings = Settings(model=folders[kind], task=task)
    reference: Any = task_models.CLASSES[task].from_pretrained(folders[kind]).eval()
    reference.load_state_dict(fl.dequantize(base.params))
    ids = torch.tensor([load_tokenizer(settings)("red dog")["input_ids"]])
    out = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    out = out[0, ids.shape[1] :] if task == CAUSAL else out[0]
    text = base.generate(fl.bind(base.model, base.params, {}), "red dog", 6)
    assert text == base.tokenizer.decode(out, skip_special_tokens=True)


def test_a_prompt_that_leaves_no_room_is_read_from_its_end(folders: dict[str, Path]) -> None:
    base = loaded(folders["gpt2"], CAUSAL)
    bound = fl.bind(base.model, base.params, {})
    long = "abcdefgh" * 40
    ids = base.tokenizer(long)["input_ids"]
    assert base.generate(bound, long, 8) == base.generate(bound, base.tokenizer.decode(ids[-120:]), 8)
    with pytest.raises(ConfigError, match="the prompt is empty"):
        base.generate(bound, "", 8)


def test_a_prompt_is_not_ended(folders: dict[str, Path], tmp_path: Path) -> None:
    base = loaded(folders["llama"], CAUSAL)
    ends = dataclasses.replace(base, tokenizer=text_models.tokenizer(begins=True, ends=True))
    bound = fl.bind(base.model, base.params, {})
    assert ends.generate(bound, "red dog", 6) == base.generate(bound, "red dog", 6)


@pytest.mark.parametrize(("task", "kind"), [(SEQUENCE, "bert"), (SEQ2SEQ, "t5")])
def test_a_long_prompt_is_cut_as_in_training(folders: dict[str, Path], task: str, kind: str) -> None:
    base = dataclasses.replace(loaded(folders[kind], task), limit=8)
    seen = []

    class Seen:
        def __call__(self, input_ids: Tensor, **given: Any) -> Any:
            seen.append(input_ids)
            return bound(input_ids=input_ids, **given)

        def generate(self, input_ids: Tensor, **given: Any) -> Any:
            seen.append(input_ids)
            return bound.generate(input_ids=input_ids, **given)

    bound: Any = fl.bind(base.model, base.params, {})
    base.generate(Seen(), "abcdefghijkl", 2)
    assert base.tokenizer.decode(seen[0][0]) == "abcdefg</s>"


def test_what_a_classifier_says_is_a_class(folders: dict[str, Path]) -> None:
    base = loaded(folders["bert"], SEQUENCE)
    ids = torch.tensor([base.tokenizer("red dog")["input_ids"]])
    expected = COLOURS[base.model(input_ids=ids).logits.argmax()]
    assert base.generate(fl.bind(base.model, base.params, {}), "red dog", 6) == expected
    token = loaded(folders["bert"], TOKEN)
    with pytest.raises(UnsupportedError, match="sample: token-classification cannot continue prompts"):
        token.generate(fl.bind(token.model, token.params, {}), "red dog", 6)


def test_new_weights_are_named_and_come_from_the_seed(folders: dict[str, Path], tmp_path: Path) -> None:
    base = loaded(folders["bert"], SEQUENCE)
    assert base.new == ("bert.pooler", "classifier")
    assert loaded(folders["bert"], TOKEN).new == ("classifier",)
    assert loaded(folders["llama"], SEQUENCE).new == ("score",)
    assert loaded(folders["llama"], CAUSAL).new == ()
    before = torch.get_rng_state()
    again, other = loaded(folders["bert"], SEQUENCE), loaded(folders["bert"], SEQUENCE, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    for name in base.params:
        assert torch.equal(base.params[name], again.params[name])
    assert not torch.equal(base.params["classifier.weight"], other.params["classifier.weight"])
    # A head of another size is new too, one of this size is kept.
    base.model.save_pretrained(tmp_path)  # type: ignore[operator]
    base.tokenizer.save_pretrained(tmp_path)
    assert loaded(tmp_path, SEQUENCE).new == ()
    settings = Settings(model=tmp_path, task=SEQUENCE)
    assert load_base(settings, load_tokenizer(settings), ("a", "b")).new == ("classifier",)
    assert load_base(settings, load_tokenizer(settings)).classes == COLOURS


def test_missing_weights_are_no_fresh_start(folders: dict[str, Path], tmp_path: Path) -> None:
    for kind, task, key in (
        ("llama", CAUSAL, "model.layers.1.mlp.up_proj.weight"),
        ("bert", SEQUENCE, "bert.encoder.layer.0.output.dense.weight"),
    ):
        folder = tmp_path / kind
        model = task_models.model(kind, 300)
        model.save_pretrained(folder)
        load_tokenizer(Settings(model=folders[kind])).save_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        del weights[key]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(FormatError, match=f"lack '{key}'"):
            loaded(folder, task)


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_packed_base_computes_with_the_unpacked_weights(folders: dict[str, Path], kind: str) -> None:
    base, batch = loaded(folders["llama"], CAUSAL, quantize=kind), batch_of(CAUSAL)
    packed = {name for name, value in base.params.items() if isinstance(value, fl.Quantized)}
    linear = {f"{n}.weight" for n, m in base.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert packed == linear - {"lm_head.weight"}
    reference = task_models.CLASSES[CAUSAL].from_pretrained(folders["llama"]).eval()
    reference.load_state_dict(fl.dequantize(base.params))
    bound = fl.bind(base.model, base.params, {})
    torch.testing.assert_close(base.logits(bound, batch), reference(**batch).logits, rtol=1e-4, atol=1e-5)
    for name in packed:  # the memory of the dense weights is free
        assert base.model.get_parameter(name).is_meta


def test_double_quantisation_is_asked_for(folders: dict[str, Path]) -> None:
    sizes = [
        sum(v.nbytes for v in loaded(folders["llama"], CAUSAL, quantize="nf4", double_quant=double).params.values())
        for double in (False, True)
    ]
    assert sizes[0] != sizes[1]


def test_the_head_that_is_trained_is_not_packed(folders: dict[str, Path]) -> None:
    base = loaded(folders["bert"], SEQUENCE, quantize="nf4", modules_to_save=("bert.encoder.layer.1",))
    packed = {name for name, value in base.params.items() if isinstance(value, fl.Quantized)}
    assert packed
    assert not any(name.startswith(("classifier", "bert.pooler", "bert.encoder.layer.1.")) for name in packed)


def test_dtypes(folders: dict[str, Path]) -> None:
    base = loaded(folders["llama"], CAUSAL, dtype="bfloat16")
    assert {value.dtype for value in base.params.values()} == {torch.bfloat16}
    loss = base.loss(fl.bind(base.model, base.params, {}), batch_of(CAUSAL))
    assert loss.dtype == torch.float32
    assert {v.dtype for v in loaded(folders["llama"], CAUSAL).params.values()} == {torch.float32}


def test_the_longest_context(folders: dict[str, Path], tmp_path: Path) -> None:
    assert context_limit(Settings()) == 256
    for kind, task, limit in (
        ("llama", CAUSAL, 128),
        ("gpt2", CAUSAL, 128),
        ("bert", TOKEN, 128),
        ("t5", SEQ2SEQ, None),
    ):
        assert context_limit(Settings(model=folders[kind], task=task)) == limit
        assert loaded(folders[kind], task).limit == limit
    # Positions that begin behind the padding id.
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    transformers.RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    assert context_limit(Settings(model=tmp_path, task=SEQUENCE)) == 32


# Tokenizers


def test_bytes_are_the_demos_tokens() -> None:
    tokenizer = load_tokenizer(Settings())
    text = "naïve ∑"
    assert bytes(tokenizer(text)["input_ids"]) == text.encode()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode([0xFF]) == "�"
    assert isinstance(tokenizer, ByteTokenizer)


def test_a_missing_padding_token_is_the_end_token(tmp_path: Path) -> None:
    folder = task_models.save(tmp_path / "model", "llama")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["pad_token"]
    file.write_text(json.dumps(config))
    settings = Settings(model=folder)
    tokenizer = load_tokenizer(settings)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("</s>", 2)
    assert load_base(settings, tokenizer).model.config.pad_token_id == 2  # type: ignore[union-attr]
    del config["eos_token"]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="has no padding token, and neither an end token nor an unknown token"):
        load_tokenizer(settings)


def test_a_padding_token_outside_of_the_embedding(tmp_path: Path) -> None:
    folder = task_models.save(tmp_path / "model", "llama")
    tokenizer = load_tokenizer(Settings(model=folder))
    tokenizer.add_special_tokens({"pad_token": "<fill>"})
    tokenizer.save_pretrained(folder)
    settings = Settings(model=folder)
    tokenizer = load_tokenizer(settings)
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    load_base(settings, tokenizer)
    assert tokenizer.pad_token == "</s>"
    tokenizer = load_tokenizer(settings)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match=r"padding token '<fill>' has the id 261, but the embedding of .* 261 rows"):
        load_base(settings, tokenizer)


# What is refused


def test_folders_that_are_no_models(folders: dict[str, Path], tmp_path: Path) -> None:
    def base(folder: Path, task: str = CAUSAL) -> None:
        settings = Settings(model=folder, task=task)
        load_base(settings, load_tokenizer(settings))

    with pytest.raises(FormatError, match="none is not a directory"):
        base(tmp_path / "none")
    with pytest.raises(FormatError, match=r"contains no config\.json"):
        base(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json: this is not JSON"):
        base(tmp_path)
    (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
    with pytest.raises(FormatError, match=r"finds no tokenizer in .* Put the tokenizer's files next"):
        base(tmp_path)
    load_tokenizer(Settings(model=folders["llama"])).save_pretrained(tmp_path)
    with pytest.raises(FormatError, match=r"contains neither model\.safetensors nor"):
        base(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folders["llama"] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(FormatError, match=r"model\.safetensors: .*cut off"):
        base(tmp_path)


def test_pickles_are_not_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    for file in folders["llama"].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(folders["llama"] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin is a pickle, which can run"):
        loaded(tmp_path, CAUSAL)


def test_a_model_without_a_form_for_the_task(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"type 'llama' .* does not support seq2seq. It supports causal-lm, seq"):
        context_limit(Settings(model=folders["llama"], task=SEQ2SEQ))
    with pytest.raises(ConfigError, match=r"type 't5' .* does not support causal-lm"):
        loaded(folders["t5"], CAUSAL)
    for task in {*TASKS} - {*DECODERS}:
        with pytest.raises(ConfigError, match=f"the demo's base is a causal language model, not for {task}"):
            load_base(Settings(task=task), ByteTokenizer())


def test_an_encoder_is_no_causal_model_unless_it_is_made_one(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=r"BertLMHeadModel\) sees the tokens that it must predict, .*is_decoder"):
        loaded(folders["bert"], CAUSAL)
    assert not caplog.records
    shutil.copytree(folders["bert"], tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"is_decoder": True}))
    loaded(tmp_path, CAUSAL)


def test_devices_that_are_not_there() -> None:
    for device in ("cuda:99", "gpu", "meta-4"):
        with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used here: .* cpu is always available"):
            load_base(Settings(device=device), ByteTokenizer())


def test_the_demo_keeps_no_packed_rows_apart() -> None:
    base = load_base(Settings(), ByteTokenizer())
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(UnsupportedError, match="packing: the demo's base cannot separate"):
        base.loss(fl.bind(base.model, base.params, {}), {"input_ids": ids, "labels": ids, "position_ids": ids})
