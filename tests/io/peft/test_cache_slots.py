"""`AdapterCache(..., params=params)`: whatever comes and goes, every row is computed as if it were alone."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import funclora as fl
from funclora.errors import ParamsError
from funclora.rules import dora

KINDS: list[dict[str, Any]] = [
    {"r": 2}, {"r": 2, "lora_alpha": 3}, {"r": 2, "use_dora": True}, {"r": 3, "use_rslora": True}, {"r": 2},
    {"r": 2, "use_dora": True, "lora_alpha": 5}, {"r": 2, "bias": "all"}, {"r": 2, "modules_to_save": ["2"]},
]  # fmt: skip
NAMES = [f"customer-{i}" for i in range(len(KINDS))]
X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def moved(model: nn.Module, config: fl.LoraConfig, seed: int) -> Any:
    g = torch.Generator().manual_seed(seed)
    return fl.optim.apply_updates(
        fresh := fl.init(model, config, generator=g),
        torch.utils._pytree.tree_map(lambda x: torch.randn(x.shape, generator=g) / 3, fresh),
    )


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def save(model: nn.Module, folder: Path, number: int, seed: int) -> None:
    options: dict[str, Any] = {"target_modules": ["0", "2"], **KINDS[number]}
    if "modules_to_save" in options:
        options["target_modules"] = ["0"]
    config = fl.LoraConfig(**options)
    fl.save_peft(folder / NAMES[number], moved(model, config, seed), config)


@pytest.fixture
def folder(model: nn.Module, tmp_path: Path) -> Path:
    for i in range(len(KINDS)):
        save(model, tmp_path, i, i)
    return tmp_path


class Alone:
    """The results of every adapter alone, in the version that the folder has now."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.model, self.params = model, fl.base_params(model)
        self.adapters: dict[str | None, Any] = {name: fl.load_peft(folder / name, model)[0] for name in NAMES}
        self.adapters[None] = {}

    def rows(self, ids: list[str | None]) -> Tensor:
        rows = [fl.apply(self.model, self.params, self.adapters[n], X[i : i + 1]) for i, n in enumerate(ids)]
        return torch.cat(rows)


def batches(seed: int, n: int) -> list[list[str | None]]:
    chosen = random.Random(seed)
    return [chosen.choices([*NAMES, None], k=chosen.randint(1, 6)) for _ in range(n)]


def test_batches_that_still_run_keep_their_adapters(model: nn.Module, folder: Path) -> None:
    alone = Alone(model, folder)
    cache = fl.AdapterCache(model, folder, memory=1000, params=alone.params)  # some are dropped, and loaded again
    running: list[tuple[list[str | None], nn.Module]] = []
    for ids in batches(0, 60):
        running.append((ids, fl.bind(model, alone.params, cache.route(ids))))
        del running[: len(running) - 4]
        for earlier, bound in running:
            for _ in range(2):
                torch.testing.assert_close(bound(X[: len(earlier)]), alone.rows(earlier))
    assert cache.stats().evictions > 20
    assert cache.stats().bytes <= 1000


def test_a_batch_that_is_gone_leaves_its_memory_to_the_next(model: nn.Module, folder: Path) -> None:
    cache = fl.AdapterCache(model, folder, memory=2**20, params=fl.base_params(model))
    first = cache.route([NAMES[0], NAMES[4], None])
    places = {storage(first)}
    assert storage(cache.route([NAMES[4], NAMES[0]])) in places  # they are there already
    del first
    for ids in [[NAMES[0], NAMES[1]], [NAMES[4], NAMES[1]], [NAMES[1], NAMES[0]]] * 5:
        places.add(storage(cache.route(ids)))
    assert len(places) == 1


def storage(routed: Any) -> int:
    address: int = routed["0.weight"].rules[0].a.untyped_storage().data_ptr()
    return address


def test_norms_are_computed_when_an_adapter_is_loaded(
    model: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = Alone(model, folder)
    cache = fl.AdapterCache(model, folder, memory=2**20, params=alone.params)
    ids: list[str | None] = [NAMES[2], NAMES[5], NAMES[2]]
    cache.route(ids)
    expected = alone.rows(ids)
    for name in ("weight_norms", "constant_norms", "output_norms_of_many"):
        monkeypatch.delattr(dora, name)
    torch.testing.assert_close(fl.apply(model, alone.params, cache.route(ids), X[:3]), expected)
    torch.testing.assert_close(fl.apply(model, alone.params, cache.route(ids[:1]), X[:1]), expected[:1])


@pytest.mark.parametrize("prepares", [False, True])
def test_a_folder_that_is_written_again_is_another_version(prepares: bool, model: nn.Module, folder: Path) -> None:
    before = Alone(model, folder)
    cache = fl.AdapterCache(model, folder, memory=2**20, params=before.params if prepares else None)
    ids: list[str | None] = [NAMES[0], NAMES[2], None]
    running = fl.bind(model, before.params, cache.route(ids))
    for number in (0, 2):
        save(model, folder, number, seed=100)
    after = Alone(model, folder)
    torch.testing.assert_close(fl.apply(model, before.params, cache.route(ids), X[:3]), after.rows(ids))
    torch.testing.assert_close(running(X[:3]), before.rows(ids))
    assert cache.stats().misses == 4
    assert cache.stats().adapters == 2


def test_threads_get_the_adapters_that_they_name(model: nn.Module, folder: Path) -> None:
    alone = Alone(model, folder)
    cache = fl.AdapterCache(model, folder, memory=1000, params=alone.params)

    def wrong(seed: int) -> int:
        count = 0
        for ids in batches(seed, 40):
            bound = fl.bind(model, alone.params, cache.route(ids))
            for _ in range(3):
                count += not torch.allclose(bound(X[: len(ids)]), alone.rows(ids), atol=1e-5)
        return count

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(wrong, range(4))] == [0] * 4


def test_inference_mode_leaves_nothing_behind(model: nn.Module, folder: Path) -> None:
    alone = Alone(model, folder)
    cache = fl.AdapterCache(model, folder, memory=2**20, params=alone.params)
    with torch.inference_mode():
        bound = fl.bind(model, alone.params, cache.route([NAMES[0], NAMES[2]]))
        for _ in range(3):
            bound(X[:2, None])
    fl.bind(model, alone.params, cache.route([NAMES[4], NAMES[2]]))
    x = X[:2, None].clone().requires_grad_()
    for _ in range(3):
        bound(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(bound(x)[:, 0], alone.rows([NAMES[0], NAMES[2]]))


def test_weights_of_another_model_are_refused(model: nn.Module, folder: Path) -> None:
    params = fl.base_params(nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)))
    cache = fl.AdapterCache(model, folder, memory=2**20, params=params)
    with pytest.raises(ParamsError, match=r"'0\.weight'"):
        cache.route([NAMES[0]])
    assert not cache.held()
