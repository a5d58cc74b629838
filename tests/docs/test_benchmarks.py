"""The benchmarks, at tiny sizes: they compare what computes the same, and their pages say what was measured."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "benchmarks": "benchmark",
    "benchmarks-many": "benchmark_many",
    "benchmarks-train": "benchmark_train",
    "benchmarks-preference": "benchmark_preference",
    "benchmarks-embeddings": "benchmark_embeddings",
    "benchmarks-serving": "benchmark_serving",
    "benchmarks-growth": "benchmark_growth",
}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of other libraries


@pytest.fixture(autouse=True)
def _examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def load(name: str) -> Any:
    return importlib.import_module(name)


def run(name: str, *argv: str) -> Any:
    """The result of a quick run."""
    return load(name).main(["--quick", *argv])


# --- what they share -------------------------------------------------------------------------------------------


def test_goals_say_what_was_reached_and_why_not() -> None:
    tools = load("benchmark_tools")
    row = tools.Row({"own": [1.2, 1.0, 1.1], "base": [1.0, 1.0, 1.0], "other": [3.0, 4.0, 5.0]}, {"own": 3 << 20})
    lines = [
        tools.compared("step", row, "own", "base", 1.1, "the reason", floor=1.04).line(),
        tools.compared("step", row, "own", "base", 1.05, "the reason", against="the base").line(),
        tools.compared("step", row, "other", "own", 4.0, "the reason", at_least=True).line(),
        tools.compared("step", row, "own", "JAX", 1.0, "the reason").line(),
        tools.Goal("start", "–", 0.4, "the reason", 0.404, unit=" s").line(),
        tools.Goal("start", "–", 0.4, "the reason", 0.406, unit=" s").line(),
    ]
    assert lines == [
        "| step | base | 1.10 (1.00–1.20) | ≤ 1.10 | 1.04 | 3 / – | reached |",
        "| step | the base | 1.10 (1.00–1.20) | ≤ 1.05 | – | 3 / – | **missed**: the reason |",
        "| step | own | 4.00 (2.50–4.55) | ≥ 4.00 | – | – / 3 | reached |",
        "| step | JAX | – | ≤ 1.00 | – | 3 / – | not measured |",
        "| start | – | 0.40 s | ≤ 0.40 s | – | – / – | reached |",
        "| start | – | 0.41 s | ≤ 0.40 s | – | – / – | **missed**: the reason |",
    ]


def test_the_time_that_remains() -> None:
    remaining = load("benchmark_tools").remaining
    assert remaining(["a", "b"], {}, {"a": 1.0, "b": 2.0}) == 3
    assert remaining(["b"], {"a": 3.0}, {"a": 1.0, "b": 2.0}) == 6  # this run is three times as slow
    assert remaining(["new"], {"a": 3.0, "c": 1.0}, {"a": 1.0}) == 2  # as long as the others
    unknown = remaining(["new"], {}, {"a": 1.0})
    assert unknown != unknown


def test_everyone_comes_after_everyone_else() -> None:
    tools = load("benchmark_tools")
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    seconds = tools.measure(tools.Bench(rounds=6), runs, warm=False)
    assert {name: len(some) for name, some in seconds.items()} == {"A": 6, "B": 6, "C": 6}
    turns = ["".join(order[i : i + 3]) for i in range(0, 18, 3)]
    assert turns == ["ABC", "CBA", "BCA", "ACB", "CAB", "BAC"]


LARGE_TENSORS = """
import torch
from benchmark_tools import Benchmark, peak

def memory_of(bench, mib):
    return {"row": {mib: peak(lambda: torch.ones(int(mib), 2**18).sum())}}

NAMES = "16", "216"
BENCHMARK = Benchmark("b", __file__, (), lambda *_: (), lambda _: iter(["text"]), None, lambda _: NAMES, memory_of)
if __name__ == "__main__":
    BENCHMARK.main()
"""


def test_memory_is_that_of_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "large_tensors.py").write_text(LARGE_TENSORS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "examples"))
    result = load("large_tensors").BENCHMARK.main(["--quick", f"--out={tmp_path}"])
    peaks = result.rows["row"].peaks
    assert peaks["216"] - peaks["16"] == pytest.approx(200 << 20, rel=0.25)
    said = capsys.readouterr().out
    assert re.search(r"^2/2 memory of 216: [0-9.]+ min so far, about [0-9.]+ min to go$", said, re.MULTILINE)
    assert (tmp_path / "b.md").read_text(encoding="utf-8") == "text\n"


def test_a_name_that_nothing_has(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run("benchmark_growth", "--only=nothing", f"--out={tmp_path}")
    assert "nothing is called 'nothing', only init, targets, bind, targets" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_a_page_without_numbers(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"There is no .*benchmarks-many.json: run python .*benchmark_many.py first"):
        load("benchmark_many").main(["--page-only", f"--out={tmp_path}"])


# --- pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SCRIPTS if (ROOT / f"docs/{name}.json").exists()])
def test_the_page_has_the_numbers_of_its_file(name: str) -> None:
    benchmark = load(SCRIPTS[name]).BENCHMARK
    assert benchmark.name == name
    result = load("benchmark_tools").Result.read(ROOT / f"docs/{name}.json")
    assert benchmark.text(result) == (ROOT / f"docs/{name}.md").read_text(encoding="utf-8")


def test_all_pages_are_linked_and_written_by_one_command() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("benchmarks*.md")}
    assert {f"{name}.md" for name in SCRIPTS} == pages - {"benchmarks-gpu.md"}
    for file in ("README.md", "docs/index.md", "docs/benchmarks.md", "mkdocs.yml"):
        linked = set(re.findall(r"benchmarks[a-z-]*\.md", (ROOT / file).read_text(encoding="utf-8")))
        assert pages - linked <= {Path(file).name}, file
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    found = re.search(r"^BENCHMARKS := (.*)$", makefile, re.MULTILINE)
    assert found
    assert sorted(found[1].split()) == sorted(SCRIPTS.values())


# --- each of them ----------------------------------------------------------------------------------------------


def test_one_adapter(tmp_path: Path) -> None:
    result = run("benchmark", "--only=gpt2 r=64", f"--out={tmp_path}")
    assert [*result.rows] == ["gpt2 r=64 forward", "gpt2 r=64 single", "gpt2 r=64 train"]
    assert 0 < max(result.about["agreement"]) < 1e-4
    page = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "A quick run" in page
    assert "| 64 | DoRA |" in page
    assert (tmp_path / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    peaks = load("benchmark").main(["--quick", "--memory-of=llama PEFT DoRA"]).rows
    assert {name: [*row.peaks] for name, row in peaks.items()} == {
        f"llama r=16 {work}": ["PEFT DoRA"]
        for work in ("single", "forward", "train on 16 tokens", "train on 64 tokens", "train")
    }


def test_many_adapters(tmp_path: Path) -> None:
    module = load("benchmark_many")
    for only, contenders in (
        ("forward", ["base", "rows", "rows, route and bind too", "rows, DoRA", "PEFT mixed", "merged models"]),
        ("change", ["base", "change, LoRA", "change, DoRA"]),
    ):
        (row,) = module.main(["--quick", f"--only={only} 1", f"--out={tmp_path}"]).rows.values()
        assert [*row.seconds] == contenders
    peaks = module.main(["--quick", "--memory-of=train 4 × 1 × 16: rows"]).rows["train 4 × 1 × 16"].peaks
    assert peaks.keys() == {"rows"}
    with pytest.raises(RuntimeError, match=r"rows and PEFT mixed disagree by 1\.0e\+00"):
        module.check("forward", {"rows": lambda: torch.zeros(2), "PEFT mixed": lambda: torch.ones(2)})


@pytest.mark.slow
def test_a_compiled_population(tmp_path: Path) -> None:
    result = run("benchmark_many", "--only=compiled", f"--out={tmp_path}")
    row = result.rows["compiled 32 × 1 × 16"]
    assert row.first_call["rows, compiled"] > row.median("rows, compiled") > 0
    assert "| 32 × 1 × 16 |" in (tmp_path / "benchmarks-many.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["preference", "embeddings"])
def test_steps_beside_another_library(name: str, tmp_path: Path) -> None:
    module = load(f"benchmark_{name}")
    result = module.main(["--quick", "--only=time", f"--out={tmp_path}"])
    assert [*result.rows] == [case.name for case in module.cases(load("benchmark_tools").Bench(quick=True))]
    assert all([*row.seconds] == [module.OURS, module.THEIRS] for row in result.rows.values())
    assert result.about["apart"] < 1e-4
    assert f"| {[*result.rows][-1]} |" in (tmp_path / f"benchmarks-{name}.md").read_text(encoding="utf-8")


def test_nothing_is_timed_that_computes_something_else() -> None:
    module = load("benchmark_embeddings")
    own, other = ((1.0, {"a": torch.tensor([x, 1.0])}) for x in (0.5, 0.6))
    with pytest.raises(RuntimeError, match=r"The gradients differ, in a by 1\.0e-01 of the largest value"):
        module.agree(own, other)


def test_serving(tmp_path: Path) -> None:
    module = load("benchmark_serving")
    result = module.main(["--quick", "--only=time", f"--out={tmp_path}"])
    assert [*result.rows["serving"].seconds] == [module.BASE, module.LORA, module.DORA, module.PEFT, module.MERGED]
    assert all(0 < first <= late for first, late in result.about["first"].values())
    assert "| merged, in turn |" in (tmp_path / "benchmarks-serving.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_training(tmp_path: Path) -> None:
    result = run("benchmark_train", "--only=time", "--threads=1", f"--out={tmp_path}")
    for curves in result.about["losses"].values():
        ours, theirs = curves.values()
        assert len(ours) == 4
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert (tmp_path / "benchmarks-train.png").read_bytes().startswith(b"\x89PNG")


def test_growth(threads: None, tmp_path: Path) -> None:
    result = run("benchmark_growth", "--only=members", f"--out={tmp_path}")
    assert [*result.rows] == [f"{work}, members" for work in ("stack", "route", "routed", "cache", "population")]
    assert all([*row.seconds] == ["1", "2", "4"] for row in result.rows.values())
    assert load("benchmark_growth").exponent({1: 9.0, 10: 1.0, 100: 100.0, 1000: 1e4}) == pytest.approx(2)
    assert "## Members" in (tmp_path / "benchmarks-growth.md").read_text(encoding="utf-8")
    assert (tmp_path / "benchmarks-growth.png").read_bytes().startswith(b"\x89PNG")


def test_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main = load("benchmark_gpu").main
    assert main([f"--out={tmp_path / 'none'}"]) == []
    assert "nothing was measured or written" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()
    tables = main(["--device=cpu", "--only=routed", f"--out={tmp_path}"])
    assert [list(table.seconds) for table in tables] == 2 * [["base", "LoRA", "DoRA", "PEFT, adapter_names"]]
    assert "### 4 rows of one token" in (tmp_path / "benchmarks-gpu.md").read_text(encoding="utf-8")
    assert len(json.loads((tmp_path / "benchmarks-gpu.json").read_text(encoding="utf-8"))) == 3
