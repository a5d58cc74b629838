"""Embeddings: the training of sentence-transformers with PEFT, batches in parts, and files that it loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import task_models
import torch
import transformers
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses as theirs
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_runs import close
from torch import Tensor
from typer.testing import CliRunner

import funclora as fl
from funclora._apps.train.batches import Batches, collate
from funclora._apps.train.embedding import EmbeddingBase, token_weights
from funclora._apps.train.journal import Journal
from funclora._apps.train.loop import train
from funclora._apps.train.plan import plan
from funclora._apps.train.reading import read
from funclora._apps.train.run import run
from funclora._apps.train.settings import EMBEDDING, Settings
from funclora._apps.train.setup import Ready, ready
from funclora._apps.train.step import Steps, training_model
from funclora._train.step import seeded, value_and_grad
from funclora.cli._app import app
from funclora.errors import ConfigError, FormatError
from funclora.io.hf.sentence import Pooling as Ours
from funclora.io.hf.sentence import read_pooling, write_pooling
from funclora.io.peft.folder import load_peft


class SameDtype(torch.nn.MSELoss):
    """For sentence-transformers, which makes scores float32 whatever the embeddings are."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target.to(input.dtype))


WORDS = task_models.WORDS
TEXTS = [f"{word} {other}" for word in WORDS[:4] for other in WORDS[3:]]
RECORDS: dict[str, list[dict[str, Any]]] = {
    "pairs": [{"anchor": f"the {a}", "positive": f"{a}, a {b}"} for a, b in zip(WORDS * 2, TEXTS, strict=False)],
    "negatives": [
        {"anchor": f"the {a}", "positive": f"{a} {b}", "negative": [f"no {b}", b * 2]}
        for a, b in zip(WORDS * 2, TEXTS, strict=False)
    ],
    "triplets": [
        {"anchor": f"the {a}", "positive": f"{a} {b}", "negative": f"no {b}"}
        for a, b in zip(WORDS * 2, TEXTS, strict=False)
    ],
    "scored": [{"sentence1": f"the {a}", "sentence2": b, "score": i / 7 - 1}
               for i, (a, b) in enumerate(zip(WORDS * 2, TEXTS, strict=False))],
}  # fmt: skip
MODES = {"mean": "mean", "first": "cls", "last": "lasttoken"}
# Records, kind of model, options -> the loss of sentence-transformers.
CASES: dict[str, tuple[str, str, dict[str, Any], Callable[[Any], Any]]] = {
    "in-batch": ("pairs", "bert", {}, theirs.MultipleNegativesRankingLoss),
    "negatives": ("negatives", "bert", {"scale": 5.0, "pooling": "first"},
                  lambda model: theirs.MultipleNegativesRankingLoss(model, scale=5.0)),
    "decoder": ("pairs", "llama", {"method": "dora"}, theirs.MultipleNegativesRankingLoss),
    "triplets": ("triplets", "bert", {"objective": "triplet", "margin": 0.5, "normalize": False},
                 lambda model: theirs.TripletLoss(model, triplet_margin=0.5)),
    "cosent": ("scored", "bert", {"pooling": "last"}, theirs.CoSENTLoss),
    "cosine": ("scored", "llama", {"objective": "cosine", "pooling": "mean"},
               lambda model: theirs.CosineSimilarityLoss(model, loss_fct=SameDtype())),
    "in parts": ("pairs", "bert", {"chunk": 2},
                 lambda model: theirs.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3)),
}  # fmt: skip


def jsonl(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models without dropout, in float64: rounding grows from step to step."""
    torch.manual_seed(0)
    found = {}
    for kind in ("bert", "llama"):
        found[kind] = path = task_models.save(tmp_path_factory.mktemp(kind), kind)
        config = {key: 0.0 if "drop" in key else x for key, x in json.loads((path / "config.json").read_text()).items()}
        (path / "config.json").write_text(json.dumps(config))
        cls: Any = transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM
        cls.from_pretrained(path, dtype=torch.float64).save_pretrained(path)
    return found


def begun(folder: Path, out: Path, records: str, **options: Any) -> Ready:
    out.mkdir(exist_ok=True)
    tiny: dict[str, Any] = {
        "validation_split": 0.0, "rank": 2, "alpha": 4.0, "lr": 1e-2, "batch": 7, "warmup": 0.0, "steps": 20,
        "init": "false",
    }  # fmt: skip
    data = jsonl(out / "data.jsonl", RECORDS[records])
    return ready(Settings(model=folder, task=EMBEDDING, data=(data,), out=out / "run", **tiny | options), out)


def sentence_model(folder: Path, adapter: Path, base: EmbeddingBase, *, trains: bool = False) -> Any:
    """sentence-transformers' model with an adapter in PEFT."""
    body = Transformer(str(folder))
    body.model = peft.PeftModel.from_pretrained(body.model, str(adapter), is_trainable=trains)
    size = body.model.config.hidden_size
    modules = [body, Pooling(size, MODES[base.pooling.tokens]), *([Normalize()] if base.pooling.normalize else [])]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.mark.parametrize("name", CASES)
def test_twenty_steps_are_those_of_sentence_transformers(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    records, kind, options, loss_of = CASES[name]
    made = begun(folders[kind], tmp_path, records, **options)
    base, settings, start = made.start.base, made.settings, made.start
    assert isinstance(base, EmbeddingBase)
    fl.save_peft(tmp_path / "begin", start.adapters, start.config)
    model = sentence_model(folders[kind], tmp_path / "begin", base, trains=True)
    loss_fn = loss_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + np.cos(np.pi * k / 20)) / 2)
    batches, want = Batches.of(settings, made.data.train, base.tokenizer.pad_token_id), []
    for k in range(20):
        rows = [RECORDS[records][int(example.source.rpartition(":")[2]) - 1] for example in batches.rows(k)]
        texts = [[t for x in row.values() if not isinstance(x, float) for t in ([x] if isinstance(x, str) else x)]
                 for row in rows]  # fmt: skip
        features = [model.preprocess([*column]) for column in zip(*texts, strict=True)]
        loss = loss_fn(features, torch.tensor([row.get("score", 0.0) for row in rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        schedule.step()
        want.append(loss.item())
    inside = next(module for module in model.modules() if isinstance(module, peft.PeftModel))
    inside.save_pretrained(str(tmp_path / "end"))
    with Journal(settings, quiet=True) as journal:
        outcome = train(base, start.adapters, made.data, settings, journal)
    ours = [loss for _, loss in outcome.losses["train"]]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(want), rtol=1e-5, atol=1e-6)
    close(outcome.adapters, load_peft(tmp_path / "end", base.model)[0], 1e-4)
    assert max(ours) - min(ours) > 0.05


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_batch_in_parts_has_the_same_gradient(folders: dict[str, Path], tmp_path: Path, dropout: float) -> None:
    """Whatever the parts are without dropout; with dropout, as if nothing were computed again."""
    made = begun(folders["bert"], tmp_path, "negatives", dropout=dropout)
    base, batch = made.start.base, collate(made.data.train, pad=0, task=EMBEDDING)
    assert isinstance(base, EmbeddingBase)

    def gradient(chunk: int, checkpointed: bool = True) -> tuple[Tensor, Any]:
        settings = replace(made.settings, chunk=chunk)
        own = replace(base, settings=settings)
        if not checkpointed:
            parts = _Plain(**{name: getattr(own, name) for name in own.__dataclass_fields__})
            own = parts
        with seeded(7, made.start.adapters):
            model = training_model(own, settings)
            return value_and_grad(own.loss)(model, base.params, made.start.adapters, batch)

    loss, grads = gradient(3)
    other_loss, other = gradient(0) if not dropout else gradient(3, checkpointed=False)
    torch.testing.assert_close(loss, other_loss, rtol=1e-6, atol=1e-6)
    close(grads, other, 1e-5)
    if dropout:
        assert not torch.allclose(gradient(0)[0], loss), "dropout acts"


class _Plain(EmbeddingBase):
    """Keeps everything for the backward pass."""

    def embedded(self, bound: Any, batch: Any) -> list[Tensor]:
        with torch.enable_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr("funclora._apps.train.embedding.checkpoint", lambda f, *x, use_reentrant: f(*x))
            return super().embedded(bound, batch)


def test_only_a_part_of_a_batch_is_kept(folders: dict[str, Path], tmp_path: Path) -> None:
    kept = []
    for chunk in (0, 2):
        made = begun(folders["bert"], tmp_path / str(chunk), "pairs", chunk=chunk, batch=14)
        steps = Steps(made.start.base, made.start.adapters, made.data, made.settings)
        sizes: list[int] = []
        values = steps.vectors.of(made.start.adapters)

        def keep(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            steps(0, values, steps.init(values))
        kept.append(sum(sizes))
    assert kept[1] < kept[0] / 4


def test_weights_of_tokens() -> None:
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert token_weights(mask, "last").tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
    assert token_weights(mask, "first").tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(token_weights(mask, "mean")[0], torch.tensor([1 / 3, 1 / 3, 1 / 3, 0]))


# The results


def invoke(*args: object) -> Any:
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def complaint(*args: object) -> str:
    result = CliRunner().invoke(app, [*map(str, args)])
    assert result.exit_code == 2, result.output
    return result.stderr


@pytest.fixture(scope="module", params=["pairs", "scored"])
def trained(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Two adapters of one base; for pairs an encoder, for scores a decoder."""
    records, path = request.param, tmp_path_factory.mktemp("embeds")
    folder = folders["bert" if records == "pairs" else "llama"]
    held = jsonl(path / "held.jsonl", RECORDS[records])
    for name, method in (("one", "lora"), ("two", "dora")):
        made = begun(folder, path / name, records, method=method, normalize=records == "pairs")
        settings = replace(made.settings, validation=held, eval_every=10, merge=name == "one", pooling="auto")
        run(settings, quiet=True)
        shutil.copytree(path / name / "run" / "adapter", path / "adapters" / name)
    return records, folder, path


def test_sentence_transformers_gives_the_same_embeddings(
    trained: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, folder, path = trained
    data = jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    adapter, tables = path / "adapters" / "one", {}
    for suffix in ("npy", "safetensors", "jsonl"):
        out = tmp_path / f"vectors.{suffix}"
        found = invoke("predict", adapter, "--model", folder, "--data", data, "--embeddings", out, "--json")
        assert (found["records"], found["size"]) == (len(TEXTS), 16)
        tables[suffix] = out
    ours = np.load(tables["npy"])
    assert ours.dtype == np.float32
    lines = [json.loads(line) for line in tables["jsonl"].read_text().splitlines()]
    assert [line["text"] for line in lines] == TEXTS
    np.testing.assert_array_equal(load_file(tables["safetensors"])["embedding"].numpy(), ours)
    np.testing.assert_allclose(np.array([line["embedding"] for line in lines]), ours, rtol=1e-6)
    normal = np.linalg.norm(ours, axis=1)
    assert (abs(normal - 1) < 1e-5).all() == (records == "pairs")
    pooling = Ours("mean" if records == "pairs" else "last", records == "pairs")
    for place in (adapter, path / "one" / "run" / "merged"):
        assert read_pooling(place) == pooling
    # The code of the card; the merged model; and the adapter's folder, for which transformers wants a newer PEFT.
    card = (adapter / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(path / "adapters")
    scope: dict[str, Any] = {}
    exec(code.replace('"adapter"', '"one"'), scope)
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    merged, whole = (SentenceTransformer(str(p), device="cpu") for p in (path / "one" / "run" / "merged", adapter))
    for model in (scope["model"], merged, whole):
        np.testing.assert_allclose(model.encode(TEXTS), ours, rtol=1e-4, atol=1e-5)
    plain = SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert abs(plain - ours).max() > 0.01


def test_each_text_has_its_own_adapter(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, folder, path = trained
    names = [("one", "two", None)[i % 3] for i in range(len(TEXTS))]
    mixed = jsonl(tmp_path / "mixed.jsonl", [{"text": t, "adapter": n} for t, n in zip(TEXTS, names, strict=True)])
    args = ("predict", path / "adapters", "--model", folder, "--data", mixed, "--json", "--embeddings")
    invoke(*args, tmp_path / "mixed.npy")
    alone = []
    plain = jsonl(tmp_path / "plain.jsonl", [{"text": t} for t in TEXTS])
    for name in ("one", "two"):
        out = tmp_path / f"{name}.npy"
        invoke("predict", path / "adapters" / name, "--model", folder, "--data", plain, "--json", "--embeddings", out)
        alone.append(np.load(out))
    got = np.load(tmp_path / "mixed.npy")
    for i, own in enumerate(names):
        if own is not None:
            np.testing.assert_allclose(got[i], alone[own == "two"][i], rtol=1e-4, atol=1e-5)
    assert abs(alone[0] - alone[1]).max() > 1e-3


def test_scores_are_those_of_the_run_and_of_scipy(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    from scipy.stats import pearsonr, spearmanr  # type: ignore[import-untyped]

    records, folder, path = trained
    data = path / "held.jsonl"
    found = invoke("eval", path / "adapters", "--model", folder, "--data", data, "--json")
    assert found["records"] == {"held.jsonl": 14}
    for name in ("one", "two"):
        lines = [json.loads(line) for line in (path / name / "run" / "metrics.jsonl").read_text().splitlines()]
        best = min((line for line in lines if "validation_loss" in line), key=lambda line: line["validation_loss"])
        for key in ("loss", "recall_at_1", "recall_at_10") if records == "pairs" else ("loss", "spearman", "pearson"):
            assert found[key][name]["held.jsonl"] == pytest.approx(best[f"validation_{key}"], rel=1e-4, abs=1e-6)
            assert key in found["base"]
    made = begun(folder, tmp_path, records)
    model = sentence_model(folder, path / "adapters" / "one", made.start.base)  # type: ignore[arg-type]
    first, second = (
        torch.tensor(model.encode([row[key] for row in RECORDS[records]]))
        for key in (("anchor", "positive") if records == "pairs" else ("sentence1", "sentence2"))
    )
    similar = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=-1)
    if records == "pairs":
        nearest = similar.argsort(1, descending=True)
        for k in (1, 10):
            share = sum(i in nearest[i, :k] for i in range(14)) / 14
            assert found[f"recall_at_{k}"]["one"]["held.jsonl"] == pytest.approx(share)
        loss = torch.nn.functional.cross_entropy(20 * similar, torch.arange(14))
        assert found["loss"]["one"]["held.jsonl"] == pytest.approx(float(loss), rel=1e-4)
    else:
        scores = [row["score"] for row in RECORDS[records]]
        for name, of in (("spearman", spearmanr), ("pearson", pearsonr)):
            want = of(scores, similar.diagonal().tolist())[0]
            assert found[name]["one"]["held.jsonl"] == pytest.approx(want, abs=1e-5)


def test_training_goes_on_with_the_same_pooling(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    records, folder, path = trained
    adapter = path / "adapters" / "two"
    options: dict[str, Any] = {"adapter": adapter, **{k: getattr(Settings, k) for k in ("rank", "alpha", "init")}}
    made = begun(folder, tmp_path, records, **options)
    assert made.settings.pooling == ("mean" if records == "pairs" else "last")
    with pytest.raises(ConfigError, match=r"pooling: .*two was trained with \w+, not first. Leave it out"):
        begun(folder, tmp_path, records, pooling="first", **options)
    shown = plan(made).examples[0]
    assert shown.parts[0][0].strip() in ("the red", "<s>the red", "the red</s>")


# What cannot be used


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([{"anchor": "a"}], {}, "data.jsonl:1: expected anchor and positive, optionally negative; or sentence1, "),
        ([{"anchor": "a", "positive": "b"}], {"objective": "triplet"}, ":1: expected anchor, positive and negative"),
        ([{"anchor": "a", "positive": "b"}], {"objective": "cosine"}, ":1: expected sentence1, sentence2 and score"),
        ([{"anchor": "a", "positive": 3}], {}, ":1: positive: expected a text, got 3"),
        (
            [{"anchor": "a", "positive": "b", "negative": ["c", 1]}],
            {},
            r":1: negative: expected a text, got \['c', 1\]",
        ),
        (
            [
                {"anchor": "a", "positive": "b", "negative": ["c"]},
                {"anchor": "a", "positive": "b", "negative": ["c"] * 2},
            ],
            {},
            ":2: has 4 texts, and the first record has 3. Give each record the same number of negatives",
        ),
        ([{"sentence1": "a", "sentence2": "b", "score": "high"}], {}, ":1: score: expected a number, got 'high'"),
        (
            [{"sentence1": "a", "sentence2": "b", "score": 1.0, "anchor": "a", "positive": "b"}],
            {},
            ":1: has pairs with and without scores",
        ),
    ],
)
def test_records_that_cannot_be_used(
    folders: dict[str, Path], tmp_path: Path, records: Any, options: Any, message: str
) -> None:
    file = jsonl(tmp_path / "data.jsonl", records)
    settings = Settings(model=folders["bert"], task=EMBEDDING, data=(file,), validation_split=0.0, **options)
    with pytest.raises(FormatError, match=message):
        ready(settings, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accumulation": "2"}, "accumulation: the texts of a batch are compared .* Set --batch to its whole size"),
        ({"margin": "2"}, "margin: has an effect only if objective is triplet"),
        (
            {"objective": "triplet", "scale": "2"},
            "scale: has an effect only if objective is auto or in-b",
        ),
        ({"sample": ["a"]}, "sample: embedding cannot continue prompts"),
        ({"init": "eva"}, "init: eva needs one text per example, but embedding has several"),
        ({"chunk": "2", "compile": True}, "chunk: torch.compile decides what to compute again"),
    ],
)
def test_settings_that_contradict_themselves(given: dict[str, Any], message: str) -> None:
    whole = {"task": EMBEDDING, "model": "m", "data": ["d"]}
    read(None, whole)
    with pytest.raises(ConfigError, match=message):
        read(None, whole | given)
    with pytest.raises(ConfigError, match="chunk: only embedding uses it"):
        read(None, {"model": "m", "data": ["d"], "chunk": "2"})


def test_models_without_one_embedding(folders: dict[str, Path], tmp_path: Path) -> None:
    file = jsonl(tmp_path / "data.jsonl", RECORDS["pairs"])
    with pytest.raises(ConfigError, match="the demo's base embeds no texts"):
        ready(Settings(task=EMBEDDING, data=(file,)), tmp_path)
    t5 = task_models.save(tmp_path / "t5", "t5")
    with pytest.raises(ConfigError, match="has an encoder and a decoder, so a text has no single embedding"):
        ready(Settings(model=t5, task=EMBEDDING, data=(file,)), tmp_path)


def test_files_that_are_not_known(tmp_path: Path) -> None:
    assert read_pooling(tmp_path) is None
    write_pooling(tmp_path, Ours("last", normalize=True), 8, 64)
    assert read_pooling(tmp_path) == Ours("last", normalize=True)
    config = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    for change, message in (
        ({"pooling_mode_mean_tokens": True}, "expected one pooling of mean, cls and lasttoken, got .*mean_tokens"),
        ({"pooling_mode_lasttoken": False, "pooling_mode_max_tokens": True}, r"got \['pooling_mode_max_tokens'\]"),
    ):
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(FormatError, match=message):
            read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "a.Transformer"}, {"type": "a.Dense"}]))
    with pytest.raises(FormatError, match=r"modules.json: expected a Transformer, .* got \['Transf.*'Dense'\]"):
        read_pooling(tmp_path)
    (tmp_path / "modules.json").write_text("{}")
    with pytest.raises(FormatError, match=r"modules.json: expected a list of modules"):
        read_pooling(tmp_path)


def test_options_of_predict(trained: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, folder, path = trained
    data = jsonl(tmp_path / "d.jsonl", [{"text": "a"}])
    args = ("predict", path / "adapters" / "one", "--model", folder, "--data", data)
    out = tmp_path / "v.npy"
    assert "--embeddings: the task is embedding. Give a file" in complaint(*args)
    assert "ends with .npy, .safetensors, .jsonl, got" in complaint(*args, "--embeddings", tmp_path / "v.csv")
    assert "--out: with --embeddings nothing is classified" in complaint(*args, "--embeddings", out, "--out", out)
    result = CliRunner().invoke(app, [*map(str, (*args, "--embeddings", out))])
    assert (result.exit_code, result.stdout) == (0, f"{out}: 1 embeddings of 16 numbers\n")
    assert "--embeddings: " in (said := complaint(*args, "--embeddings", out))
    assert "already exists. Give another file, or --overwrite" in said
    jsonl(data, [{"text": 3}])
    assert "d.jsonl:1: expected a text under 'text', got 3" in complaint(*args, "--embeddings", tmp_path / "w.npy")
