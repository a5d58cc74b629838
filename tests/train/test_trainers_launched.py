"""Other people's trainers on `as_module` in two processes: what one process does, or a message that says why not."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_runs
from launch import python, results
from pages import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # the trainers' advice about loaders, loggers and processes
]
WAIT = 540  # seconds; pytest gives a test 600
ALIKE = ["run_trainer", "run_sft", "run_accelerate", "run_lightning"]
# What each says to do.
MESSAGES = {
    "refused_lightning_model_parallel": "2 processes train the result of as_module outside of DistributedDataParallel",
    "refused_plain_loop": "each trains an adapter of its own",
    "refused_without_gradients": "nothing",
    "refused_accelerate_fsdp": "Apply fully_shard to the model, take base_params of it",
    "refused_fsdp_around": "the base would stay whole in every process",
    "refused_fsdp1": "the base would stay whole in every process",
    "refused_fsdp1_base": "Divide the model with torch.distributed.fsdp.fully_shard",
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    script = Path(trainer_runs.__file__)
    return results(2, tmp_path_factory.mktemp("two"), script, *trainer_runs.RUNS, within=WAIT)


def close(got: Any, want: Any) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(torch.tensor(got[name]), torch.tensor(value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALIKE)
def test_two_processes_train_what_one_does(two: list[Any], name: str, tmp_path: Path) -> None:
    assert two[0][name] == two[1][name], "the same adapter, bit for bit, and the same losses"
    one = trainer_runs.RUNS[name](tmp_path)
    close(two[0][name]["adapter"], one["adapter"])
    for key in {"history"} & one.keys():
        torch.testing.assert_close(torch.tensor(two[0][name][key]), torch.tensor(one[key]), rtol=1e-5, atol=1e-5)


def test_a_trainer_takes_a_base_that_is_divided_among_the_processes(two: list[Any]) -> None:
    for each in two:
        close(each["run_trainer_over_fsdp"]["adapter"], two[0]["run_trainer"]["adapter"])


def test_one_process_writes_what_all_have_trained_and_resumed(two: list[Any]) -> None:
    assert two[0]["run_trainer_resumed"] == two[1]["run_trainer_resumed"]
    assert two[0]["run_trainer_resumed"]


@pytest.mark.parametrize("name", MESSAGES)
def test_an_adapter_that_nobody_would_average_is_no_surprise(two: list[Any], name: str) -> None:
    for each in two:
        assert MESSAGES[name] in each[name]


@pytest.mark.ray
def test_workers_of_ray_train_what_one_process_does(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    printed = python(tmp_path, str(ROOT / "examples" / "ray_train.py"), within=WAIT)
    found = re.search(r"2 workers differ from one process by (\S+)", printed)
    assert found, printed
    assert float(found[1]) < 1e-5


def test_every_run_is_looked_at() -> None:
    looked = {*ALIKE, *MESSAGES, "run_trainer_over_fsdp", "run_trainer_resumed"}
    assert looked == set(trainer_runs.RUNS)
