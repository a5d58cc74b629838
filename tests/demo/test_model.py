import itertools
import math
import os
import runpy
import subprocess
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import funclora
from funclora.demo.corpus import base_text, split_text, windows
from funclora.demo.model import WEIGHTS, ByteLM, ByteLMConfig, load_base, load_weights, next_byte_loss

TRAIN = Path(__file__).parents[2] / "examples" / "train_base.py"
SMALL = ByteLMConfig(dim=16, layers=2, heads=2, hidden=24, context=16)


@pytest.fixture(scope="module")
def base() -> ByteLM:
    return load_base()


def test_the_file_is_small() -> None:
    assert len((resources.files("funclora.demo") / WEIGHTS).read_bytes()) <= 3_000_000


def test_load_gives_the_same_frozen_float32_model_every_time(base: ByteLM) -> None:
    again = load_base().state_dict()
    assert not base.training
    assert again.keys() == base.state_dict().keys()
    for name, parameter in base.named_parameters():
        assert parameter.dtype == torch.float32
        assert not parameter.requires_grad
        assert torch.equal(parameter, again[name])


def test_no_byte_sees_a_later_one(base: ByteLM) -> None:
    ids = torch.randint(256, (1, 40))
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 1) % 256
    before, after = base(ids), base(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_positions_matter(base: ByteLM) -> None:
    assert not torch.allclose(base(torch.tensor([[65, 66, 67]]))[:, -1], base(torch.tensor([[66, 65, 67]]))[:, -1])


def test_the_base_predicts_text_that_it_was_not_trained_on(base: ByteLM) -> None:
    # Windows from all files; where this Python is not the one of the training, many are nearly training text.
    _, unseen = split_text(base_text())
    loss = next_byte_loss(base, windows(unseen, count=16, context=256))
    assert loss < 1.3 < math.log(256)


def test_the_stored_weights_are_well_within_float16(base: ByteLM) -> None:
    for name, parameter in base.named_parameters():
        assert parameter.isfinite().all(), name
        assert parameter.abs().max() < 100, name


def test_too_long_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 16 bytes a row, got 17"):
        ByteLM(SMALL)(torch.zeros(1, 17, dtype=torch.int64))


def test_generate_continues_the_prompt(base: ByteLM) -> None:
    prompt = b"def __init__(self"
    one, two = (base.generate(prompt, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one == two
    assert len(one) == len(prompt) + 8
    assert one.startswith(prompt)
    assert base.generate(prompt, 1, temperature=0) == base.generate(prompt, 2, temperature=0)[:-1]


def test_generate_goes_on_beyond_the_context() -> None:
    model = ByteLM(SMALL)
    assert len(model.generate(b"a" * 15, 5)) == 20
    assert len(model.generate(b"a" * 30, 2)) == 32


def test_generate_refuses_an_empty_prompt() -> None:
    with pytest.raises(ValueError, match="at least one byte"):
        ByteLM(SMALL).generate(b"", 1)


def loss_of(model: ByteLM, params: dict[str, Tensor], rows: Tensor) -> Tensor:
    return next_byte_loss(lambda ids: functional_call(model, params, (ids,)), rows)


# Torch scripts its own forward-mode formulas, on first use, with the compiler that it deprecates.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
def test_torch_func_takes_the_model() -> None:
    model, rows = ByteLM(SMALL).double(), torch.randint(256, (2, 13))
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    population = {name: torch.stack([value, 1.5 * value]) for name, value in params.items()}
    next_byte_loss(model, rows).backward()
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels know neither vmap nor forward-mode derivatives
        gradients = vmap(grad(lambda p: loss_of(model, p, rows)))(population)
        slope = jvp(lambda p: loss_of(model, p, rows), (params,), (params,))[1]
    assert all(torch.allclose(gradients[n][0], p.grad) for n, p in model.named_parameters() if p.grad is not None)
    assert slope.item() == pytest.approx(sum((gradients[n][0] * params[n]).sum().item() for n in params))


def test_the_model_compiles_into_one_graph(base: ByteLM) -> None:
    # The eager backend still traces everything; generating machine code would only test the compiler.
    compiled = torch.compile(base, fullgraph=True, backend="eager")
    ids = torch.randint(256, (2, 9))
    torch.testing.assert_close(compiled(ids), base(ids))


def test_training_writes_a_file_that_loads(tmp_path: Path) -> None:
    out = tmp_path / "small.safetensors"
    shape = {"dim": 16, "layers": 1, "heads": 2, "hidden": 24, "context": 16}
    options = {**shape, "out": out, "steps": 20, "warmup": 5, "batch": 4, "report": 10, "probes": 4}
    flags = itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in options.items())
    # The package under test, wherever it was imported from.
    environment = {**os.environ, "PYTHONPATH": str(Path(funclora.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, str(TRAIN), *flags], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "step     20" in done.stdout
    assert "final: train" in done.stdout
    assert load_weights(str(out)).config == ByteLMConfig(**shape)
    assert [file.name for file in tmp_path.iterdir()] == [out.name]


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    schedule = runpy.run_path(str(TRAIN))["schedule"]
    assert [schedule(step, 100, 10) for step in (5, 10, 55, 100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
