"""Several processes under torchrun: data parallel steps, and a base that is divided among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worker
from launch import results, torchrun
from pages import DOCS, blocks
from torch import nn

import funclora as fl
from funclora.errors import ConfigError

HERE = Path(__file__).parent
Results = list[dict[str, Any]]

pytestmark = pytest.mark.slow


def launched(n: int, folder: Path, *checks: str) -> Results:
    """The results of the checks in each of n processes."""
    return results(n, folder, HERE / "worker.py", *checks)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return launched(2, tmp_path_factory.mktemp("two"), *worker.CHECKS)


@pytest.mark.parametrize("check", ["training", "population"])
def test_the_bits_do_not_depend_on_the_number_of_processes(two: Results, check: str) -> None:
    assert two[0][check] == two[1][check] == worker.CHECKS[check]()


def test_four_processes_get_the_same_bits(tmp_path: Path) -> None:
    found = launched(4, tmp_path, "training")
    assert all(each["training"] == worker.check_training() for each in found)


@pytest.mark.parametrize("check", ["weights_of_members", "a_process_without_rows", "gradients"])
def test_the_mean_is_that_of_all_rows(two: Results, check: str) -> None:
    assert [each[check] <= 1e-6 for each in two] == [True, True], two


def test_processes_with_other_adapters_are_refused(two: Results) -> None:
    for each in two:
        assert "the adapters of rank 1 differ from those of rank 0" in each["other_adapters_are_refused"]


@pytest.mark.parametrize("check", ["fsdp", "shards"])
def test_a_divided_base_computes_the_same_bits(two: Results, check: str) -> None:
    for each in two:
        # A population adds its members' parts to the base's result, which a gathered weight gives apart from them.
        limits = {name: 2e-5 if "population" in name else 0.0 for name in each[check] if "bytes" not in name}
        wrong = {name: each[check][name] for name, limit in limits.items() if each[check][name] > limit}
        assert each[check]
        assert not wrong
        shares = {name: value for name, value in each[check].items() if "bytes" in name}
        assert shares
        assert all(value < 0.6 for value in shares.values()), shares  # tables of quantised values stay whole


def test_a_graph_gathers_the_weights_of_a_divided_base(two: Results) -> None:
    for each in two:
        assert each["compiled"] == {"gradients": pytest.approx(0, abs=1e-6)}


def test_adapters_on_a_mesh_compute_what_one_process_does(two: Results) -> None:
    for each in two:
        found = each["tensor_parallel"]
        assert len(found) == 2 * (1 + 2 * 15) + 1
        assert found.pop("transformers: bytes") == found.pop("torch: bytes") < 0.56
        assert {name: value for name, value in found.items() if value > 1e-5} == {}
        assert {name: value for name, value in found.items() if value and "other processes" in name} == {}


def test_what_cannot_be_adapted_on_a_mesh_is_refused(two: Results) -> None:
    leave, module = "Leave it out of the targets", "or run the model as transformers (tp_plan) or torch"
    expected = {
        "quantised": ("ParamsError: quantize: 'model.layers.0.self_attn.o_proj.weight' is a DT", "or leave it out"),
        "quantised by layers": ("is Quantized([64, 64], torch.float32, live): it is divided", "Quantise whole weights"),
        "shard": ("ConfigError: shard: 'model.embed_tokens.weight' is a DTensor", "Pass whole params"),
        "torch.func": ("UnsupportedError: params are divided over a mesh, which torch.func does not", "value_and_grad"),
        "adapters on the mesh": ("ParamsError: adapters['model.layers.0.self_attn.o_proj.weight']", "full_tensor()"),
        "not parallelised": ("its input is not a tensor of the mesh", module),
        "not parallelised, no gradients": ("its input is not a tensor of the mesh", module),
        "a share of the gradient": ("UnsupportedError: 'model.layers.0.self_attn.q_norm.weight' is in a part", leave),
        "experts": ("weights of experts that are divided over a mesh cannot have an adapter", "or use fully_shard"),
        "tied": ("'lm_head.weight' is divided over a mesh of devices, and LinearLayer on it has no form", leave),
        "eva": ("'model.layers.0.self_attn.o_proj.weight' is divided over a mesh", "where a process sees a part"),
        "pissa": ("is divided over a mesh", "decompose it in one process, and divide the new params after that"),
    }
    for each in two:
        found = each["tensor_parallel_refuses"]
        assert found.keys() == expected.keys()
        for name, parts in expected.items():
            assert all(part in found[name] for part in parts), found[name]
        assert {name: text for name, text in found.items() if "\n" in text} == {}


def test_merged_weights_stay_divided(two: Results) -> None:
    for each in two:
        found = each["merge"]
        wholes = {name: value for name, value in found.items() if "whole weights" in name}
        assert len(wholes) == 4
        # Of 16: the old weight, the new one, with DoRA that before it is scaled; gloo frees others a moment later.
        assert {name: value for name, value in wholes.items() if value > 5} == {}
        others = {name: value for name, value in found.items() if name not in wholes}
        assert len(others) == 6
        assert {name: value for name, value in others.items() if value} == {}


def test_a_divided_tie_is_reported_when_one_of_its_weights_changes(two: Results) -> None:
    for each in two:
        plain, *divided = each["tied_merge"]
        assert "are one tied parameter; only 'model.embed_tokens.weight' is rewritten" in plain
        assert divided == [plain, plain]


def test_the_next_weight_is_on_its_way(two: Results) -> None:
    for each in two:
        found = each["prefetch"]
        first, *later = found.pop("on their way")
        assert first < 0.2
        assert all(share > 0.9 for share in later), later
        assert found.pop("weights held") < 5  # of 11: the one in use and the next one; gloo frees others a moment later
        assert len(found) == 7
        assert {name: value for name, value in found.items() if value != 0} == {}


def test_a_folder_is_read_in_pieces(two: Results) -> None:
    for each in two:
        found = each["load_sharded"]
        assert not any(value for name, value in found.items() if "different" in name or "other buffers" in name), found
        assert all(value for name, value in found.items() if "meta" in name or "settings" in name)
        assert found["llama: apply"] == found["llama: generate"] == 0
        shares = {name: value for name, value in found.items() if "bytes" in name and "resnet" not in name}
        assert len(shares) == 16
        assert all(value < 0.56 for value in shares.values()), shares  # a resnet's weights are too small to be divided


def test_the_base_of_the_page_is_read(two: Results) -> None:
    assert two[0]["page"] == two[1]["page"]
    assert two[0]["page"] == [
        "Quantized([96, 64], torch.float32, sharded)",
        "Quantized([96, 64], torch.float32, sharded)",
    ]


def test_every_process_gets_the_error_of_one(two: Results) -> None:
    for each, other in ((two[0], "rank 1: "), (two[1], "")):
        expected = {
            "one mesh": "nothing",
            "a mesh of two dimensions": "ConfigError: group: expected a process group or a mesh of one dimension",
            "another kind": "rank 1 has read another model than rank 0",
            "a part of a tie": "ConfigError: targets: 'model.embed_tokens.weight', 'lm_head.weight' are one parameter",
            "targets": "ConfigError: double_quant and targets say how to quantise; set quantize too",
            "another class": "ArgumentError: make: expected a function that returns a transformers model",
            "another dtype": "ConfigError: make: it made the model in torch.float32, but the weights are to be",
            "no head": "FormatError: ",
            "a missing file": f"FormatError: {other}",
        }
        found = each["load_sharded_refuses"]
        assert {name: found[name] for name, said in expected.items() if said not in found[name]} == {}
        assert "does not contain 'score.weight'" in found["no head"]
        assert "which does not exist" in found["a missing file"]


def test_a_module_over_a_divided_base_trains_in_ddp(two: Results) -> None:
    for each in two:
        assert each["module_over_fsdp"]["gradients"] <= 1e-6
        assert "Apply fully_shard to the model" in each["module_over_fsdp"]["refused"]


# What the page's script has merged, written and read.
MERGED = """
from pathlib import Path

from safetensors.torch import load_file

(whole,) = [load_file(file) for file in Path("whole").glob("*.safetensors")] if rank == 0 else [{}]
loaded = {name: weight.full_tensor() for name, weight in model.state_dict().items()}
for name, weight in fl.merge(params, adapters).items():
    assert torch.equal(loaded[name], weight), name
    assert rank or torch.equal(whole[name], weight), name
    assert "bias" in name or not torch.equal(weight, params[name]), name
"""


def test_the_script_of_the_page_runs(tmp_path: Path) -> None:
    script = tmp_path / "many.py"
    *parts, last = [block.code for block in blocks(DOCS / "many-devices.md") if block.title == "many.py"]
    script.write_text("\n".join([*parts, MERGED, last]), encoding="utf-8")
    torchrun(2, tmp_path, script)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    adapters, _ = fl.load_peft(tmp_path / "adapter", model)
    assert all(rule.b.abs().sum() > 0 for rule in adapters.values() if isinstance(rule, fl.LoRA))


def test_processes_that_are_not_connected_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = nn.Linear(2, 1, bias=False)
    params = {"weight": torch.zeros(1, 2)}
    tree = {"weight": fl.LoRA(torch.ones(1, 2), torch.ones(1, 1))}
    sgd = fl.optim.sgd(0.1)
    step = fl.train_step(model, lambda bound, x: bound(x).mean(), sgd, reduce=fl.distributed.mean())
    with pytest.raises(ConfigError, match=r"2 processes were started, but they are not connected.*init_process_group"):
        step(params, tree, sgd.init(tree), torch.ones(1, 2))
    with pytest.raises(ConfigError, match="not connected"):
        fl.distributed.shard(params)


def test_a_weight_must_be_a_number() -> None:
    tree = {"weight": fl.LoRA(torch.ones(1, 2), torch.ones(1, 1))}
    sgd = fl.optim.sgd(0.1)
    reduce = fl.distributed.mean(weight=lambda batch: batch)
    step = fl.train_step(nn.Linear(2, 1, bias=False), lambda bound, x: bound(x).mean(), sgd, reduce=reduce)
    with pytest.raises(ConfigError, match=r"weight: expected a number for a batch, got a tensor of shape \[1, 2\]"):
        step({"weight": torch.zeros(1, 2)}, tree, sgd.init(tree), torch.ones(1, 2))
