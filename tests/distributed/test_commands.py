"""Commands that torchrun starts: their results are those of one process, bit for bit, and they end with one line."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import commands
import optree
import pytest
import task_models
import text_models
import torch
from launch import torchrun
from safetensors.torch import load
from transformers import LlamaConfig, LlamaForCausalLM

from funclora._apps.sweep.search import Search

HERE = Path(__file__).parent

WORDS = {"good": "yes", "bad": "no"}

pytestmark = pytest.mark.slow

DATA = ("--data", "data.jsonl", "--validation-split", "0.2", "--context", "48", "--device", "cpu")
# The last step of an epoch has three micro-batches of the four.
SETTINGS = (*DATA, "--batch", "2", "--accumulation", "4", "--steps", "6", "--eval-every", "2", "--rank", "2", "--lr",
            "0.01", "--schedule", "constant", "--warmup", "1", "--final", "last")  # fmt: skip
LORA = ("train", *SETTINGS, "--dropout", "0.1")
DORA = ("train", *SETTINGS, "--method", "dora", "--optimizer", "adafactor", "--sample", "def ")
NF4 = ("train", *SETTINGS, "--model", "model", "--quantize", "nf4", "--checkpointing")
TAGS = ("train", "--data", "classes.jsonl", "--model", "bert", "--task", "sequence-classification", "--steps", "2",
        "--accumulation", "2", "--batch", "4", "--rank", "2", "--device", "cpu")  # fmt: skip
SWEEP = ("sweep", *DATA, "--batch", "4", "--steps", "4", "--lr", "1e-3,1e-2,3e-2", "--rank", "1,2", "--targets",
         "q_proj", "--method", "lora", "--halving", "2", "--rungs", "2", "--population", "2")  # fmt: skip
PAIRS = ("--model", "model", "--task", "preference", "--validation", "pairs.jsonl", "--data")
PREFERENCES = ("--context", "48", "--device", "cpu", "--batch", "2", "--accumulation", "4", "--steps", "4", "--rank",
               "2", "--lr", "0.05", "--schedule", "constant", "--warmup", "1", "--eval-every", "2", "--dropout", "0.1",
               "--final", "last")  # fmt: skip
DPO = ("train", *PAIRS, "pairs.jsonl", *PREFERENCES, "--packing")
KTO = ("train", *PAIRS, "pairs.jsonl", *PREFERENCES, "--loss", "kto", "--method", "dora")
SEARCH = ("--model", "bert", "--task", "embedding", "--data", "search.jsonl", "--validation", "search.jsonl",
          "--device", "cpu", "--steps", "4", "--eval-every", "2", "--rank", "2", "--lr", "0.01", "--final",
          "last")  # fmt: skip
TRIPLETS = ("train", *SEARCH, "--objective", "triplet", "--batch", "2", "--accumulation", "4")
NEGATIVES = ("train", *SEARCH, "--batch", "5", "--chunk", "2")  # three parts; in the last step of an epoch, two
READ = ("--device", "cpu", "--json")
COMMANDS: dict[str, tuple[str, ...]] = {
    "lora": LORA,
    "dora": DORA,
    "nf4": NF4,
    "tags": TAGS,
    "dpo": DPO,
    "kto": KTO,
    "triplets": TRIPLETS,
    "negatives": NEGATIVES,
    "sweep": SWEEP,
    "eval": ("eval", "lora/adapter", "dora/adapter", "--data", "data.jsonl", *READ),
    "generate": ("generate", "lora/adapter", "dora/adapter", "--file", "prompts.jsonl", "--max-tokens", "4", "--batch",
                 "2", "--temperature", "0.9", *READ),
    "eval of pairs": ("eval", "dpo/adapter", "kto/adapter", "--model", "model", "--task", "preference", "--data",
                      "pairs.jsonl", *READ),
    "predict": ("predict", "tags/adapter", "--model", "bert", "--data", "classes.jsonl", "--batch", "2", *READ),
}  # fmt: skip


def line(name: str, out: str = "", *more: str) -> list[str]:
    """A command line; training and searches write into a folder of the same name."""
    words = COMMANDS[name]
    return [*words, *more, *(("--out", out or name) if words[0] in ("train", "sweep") else ())]


def given(folder: Path) -> None:
    """What the commands read."""
    data = [{"text": f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 3)} for i in range(18)]
    prompts = [{"prompt": f"def f{i}", "adapter": ("lora/adapter", "dora/adapter", None)[i % 3]} for i in range(7)]
    classes = [{"text": f"{word} " * (1 + i % 4), "label": label} for i in range(5) for word, label in WORDS.items()]
    pairs = [
        {"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": f" {'no ' * (i % 3)}{i}."} for i in range(11)
    ]
    search = [
        {"anchor": f"{word} {i}", "positive": f"{i} {word} " * (1 + i % 3), "negative": f"no {i}"}
        for i in range(7) for word in WORDS
    ]  # fmt: skip
    files: dict[str, list[Any]] = {
        "data": data,
        "prompts": prompts,
        "classes": classes,
        "pairs": pairs,
        "search": search,
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        task_models.save(folder / "bert", "bert")
        tokenizer = text_models.tokenizer(None, begins=True, ends=False)
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
        LlamaForCausalLM(config).save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


def done(n: int, folder: Path, lines: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
    """What the commands came to in each of n processes, in the order of the commands."""
    (folder / "commands.json").write_text(json.dumps(lines), encoding="utf-8")
    torchrun(n, folder, HERE / "commands.py", "commands.json")
    each = [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(n)]
    return [list(ends) for ends in zip(*each, strict=True)]


def adapter(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def numbers(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{k: v for k, v in line.items() if "second" not in k} for line in lines]


def is_the_search(found: Path, wanted: Path) -> None:
    """Assert that a search came to what another one did."""
    boards = [json.loads((out / "leaderboard.json").read_text()) for out in (found, wanted)]
    assert [row["member"] for row in boards[0]] == [row["member"] for row in boards[1]]
    for ours, theirs in zip(*boards, strict=True):
        assert ours == theirs | {"heldout_loss": pytest.approx(theirs["heldout_loss"], abs=1e-5)}
    names = [sorted(path.name for path in (out / "adapters").iterdir()) for out in (found, wanted)]
    assert names[0] == names[1]
    lines = [json.loads(text) for text in (found / "results.jsonl").read_text().splitlines()]
    assert len({(row["member"], row["step"]) for row in lines}) == len(lines)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The commands in one process; and a longer run."""
    folder = tmp_path_factory.mktemp("alone")
    given(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ends = {name: commands.ended(line(name)) for name in COMMANDS}
        for name, steps in LONGER.items():
            words = line(name, f"longer-{name}")
            words[words.index("--steps") + 1] = steps
            ends[f"longer {name}"] = commands.ended(words)
    assert {name: end for name, end in ends.items() if end["code"]} == {}
    return folder, ends


LONGER = {"lora": "8", "kto": "6"}  # steps of a run that goes on
REFUSED = {
    "out": line("lora"),
    "passes": ["train", *DATA, "--out", "other"],
    "parts": ["train", *SEARCH, "--batch", "6", "--out", "other"],
    "option": ["train", "--ranks", "3"],
    "device": ["cpu:0" if word == "cpu" else word for word in line("lora", "other")],
    "conversation": ["generate", "lora/adapter", "--device", "cpu"],
    "command": ["inspect", "lora/adapter"],
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The commands in two processes, with a divided base too; a search that one process began; what is refused."""
    folder = tmp_path_factory.mktemp("two")
    given(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def stopped(*_: object) -> None:
            raise KeyboardInterrupt

        patch.setattr(Search, "_cut", stopped)
        assert commands.ended(line("sweep", "begun"))["code"] == 130
    assert "before.json" in {file.name for file in (folder / "begun").iterdir()}
    lines = {name: line(name) for name in COMMANDS} | {
        "divided lora": line("lora", "divided-lora", "--shard"),
        "divided nf4": line("nf4", "divided-nf4", "--shard"),
        "divided kto": line("kto", "divided-kto", "--shard"),
        "divided negatives": line("negatives", "divided-negatives", "--shard"),
        "begun": line("sweep", "begun"),
        **REFUSED,
    }
    return folder, dict(zip(lines, done(2, folder, [*lines.values()]), strict=True))


@pytest.mark.parametrize(
    "name", ["lora", "dora", "nf4", "tags", "dpo", "kto", "triplets", "divided lora", "divided nf4"]
)
def test_a_run_of_two_processes_is_that_of_one(two: Any, alone: Any, name: str) -> None:
    (folder, ends), (whole, _) = two, alone
    assert [end["code"] for end in ends[name]] == [0, 0], ends[name]
    out = name.replace(" ", "-")
    assert adapter(folder / out) == adapter(whole / name.rpartition(" ")[2])
    assert numbers(folder / out) == numbers(whole / name.rpartition(" ")[2])
    first, second = ends[name]
    assert f"wrote {out}{os.sep}adapter" in first["out"]
    assert "step " in first["err"]
    assert second["out"] == ""
    assert "step " not in second["err"]  # other packages may have something to say


@pytest.mark.parametrize("name", ["negatives", "divided negatives", "divided kto"])
def test_a_run_of_two_processes_is_that_of_one_up_to_rounding(two: Any, alone: Any, name: str) -> None:
    """Where sums are in another order: over the parts of a batch, and over weights for the norms of DoRA."""
    (folder, ends), (whole, _) = two, alone
    assert [end["code"] for end in ends[name]] == [0, 0], ends[name]
    out = name.replace(" ", "-")
    got, wanted = (load(adapter(path)) for path in (folder / out, whole / name.rpartition(" ")[2]))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(numbers(folder / out), numbers(whole / name.rpartition(" ")[2]), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["sweep", "begun"])
def test_a_search_of_two_processes_is_that_of_one(two: Any, alone: Any, name: str) -> None:
    (folder, ends), (whole, _) = two, alone
    assert [end["code"] for end in ends[name]] == [0, 0], ends[name]
    is_the_search(folder / name, whole / "sweep")
    assert ends[name][1]["out"] == ends[name][1]["err"] == ""


@pytest.mark.parametrize("name", ["eval", "eval of pairs", "generate", "predict"])
def test_rows_are_divided_and_come_in_their_order(two: Any, alone: Any, name: str) -> None:
    (_, ends), (_, whole) = two, alone
    first, second = ends[name]
    assert first["code"] == second["code"] == 0, ends[name]
    got, wanted = optree.tree_flatten(json.loads(first["out"])), optree.tree_flatten(json.loads(whole[name]["out"]))
    assert got[1] == wanted[1]
    for ours, theirs in zip(got[0], wanted[0], strict=True):
        assert ours == (pytest.approx(theirs, abs=1e-5) if isinstance(theirs, float) else theirs)
    assert second["out"] == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out", "out: lora contains a run. Continue it with --resume, or use another folder."),
        ("passes", "accumulation: 1 forward pass of a step cannot be divided among 2 processes. Give --accumulation 2"),
        ("parts", "chunk: 1 part of a batch cannot be divided among 2 processes. Give --batch 6 --chunk 3, or smaller"),
        ("option", "No such option: --ranks"),
        ("device", "device: cpu:0 cannot be that of 2 processes."),
        ("conversation", "a conversation is with one process."),
        ("command", "this command works in one process. Start it without torchrun."),
    ],
)
def test_an_error_is_one_line_of_one_process(two: Any, name: str, message: str) -> None:
    folder, ends = two
    assert [end["code"] for end in ends[name]] == [2, 2], ends[name]
    said = "".join(end["err"] for end in ends[name])
    assert message in said
    assert said.count("\n") == 1, said
    assert not (folder / "other").exists()


def test_a_divided_base_needs_processes(alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(alone[0])
    end = commands.ended(line("lora", "other", "--shard"))
    assert end["code"] == 2
    assert "shard: there is one process. Start several: torchrun" in end["err"]


@pytest.mark.parametrize("name", LONGER)
def test_a_run_continues_in_another_number_of_processes(
    two: Any, alone: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(two[0])
    end = commands.ended(["train", "--out", name, "--resume", "--steps", LONGER[name]])
    assert end["code"] == 0, end
    assert adapter(two[0] / name) == adapter(alone[0] / f"longer-{name}")


def test_killed_processes_are_started_again_and_lose_nothing(tmp_path: Path, alone: Any) -> None:
    given(tmp_path)
    output = torchrun(2, tmp_path, HERE / "dies.py", *line("lora"), restarts=2)
    assert "Continuing after step 2 of 6" in output
    assert "Continuing after step 4 of 6" in output
    assert "Traceback" not in output
    assert adapter(tmp_path / "lora") == adapter(alone[0] / "lora")


def test_killed_searches_are_started_again_and_lose_nothing(tmp_path: Path, alone: Any) -> None:
    given(tmp_path)
    output = torchrun(2, tmp_path, HERE / "dies.py", *line("sweep", "", "--json"), restarts=2)
    (resumed,) = re.findall(r'"resumed_member_steps": (\d+)', output)
    assert int(resumed) == 3 * 2 + 3 * 3  # after the second death: of 6 members, half had been dropped
    assert "Traceback" not in output
    is_the_search(tmp_path / "sweep", alone[0] / "sweep")


def test_four_processes_train_the_same_adapter(tmp_path: Path, alone: Any) -> None:
    given(tmp_path)
    (ends,) = done(4, tmp_path, [line("lora")])
    assert [end["code"] for end in ends] == [0] * 4, ends
    assert adapter(tmp_path / "lora") == adapter(alone[0] / "lora")
    assert numbers(tmp_path / "lora") == numbers(alone[0] / "lora")
