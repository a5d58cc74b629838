"""The example scripts, at a small size: what each of them sets out to show is so."""

import functools
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from safetensors.torch import load_file

import funclora as fl

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> Any:
    """That example as a module."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up the module of their annotations
    spec.loader.exec_module(module)
    return module


def run(name: str, *argv: str) -> Any:
    """What `main` of that example returns."""
    return load(name).main(list(argv))


def test_mlp_lora_vs_dora(capsys: pytest.CaptureFixture[str]) -> None:
    results = run("mlp_lora_vs_dora", "--pretrain-steps=300", "--steps=120", "--lr=1e-2")
    assert list(results) == ["base model", "LoRA", "DoRA", "full fine-tuning"]
    for name in ("LoRA", "DoRA", "full fine-tuning"):
        assert results[name].train_loss < 0.2 * results["base model"].train_loss, name
        assert results[name].heldout_loss < 0.25 * results["base model"].heldout_loss, name
    assert results["base model"].trainable == 0
    # DoRA adds a magnitude per output unit to what LoRA trains.
    assert results["DoRA"].trainable == results["LoRA"].trainable + 128 + 128 + 8
    assert results["LoRA"].trainable < 0.15 * results["full fine-tuning"].trainable
    printed = capsys.readouterr().out
    assert "2,144 of 19,720 = 10.87 % trainable" in printed
    for result in results.values():
        assert f"{result.heldout_loss:.4f}" in printed


@pytest.mark.parametrize("options", [[], ["--dora"]], ids=["lora", "dora"])
def test_transformer_qv(options: list[str]) -> None:
    result = run("transformer_qv", "--pretrain-steps=60", "--steps=100", "--rank=16", "--lr=1.5e-2", *options)
    blocks = [f"blocks.{i}.attention.1" for i in range(2)]
    assert result.trained == [f"{block}.{proj}.weight" for block in blocks for proj in ("q_proj", "v_proj")]
    assert result.last_loss < 0.1 * result.first_loss
    assert result.copied["base model"] > 0.9
    assert result.reversed["base model"] < 0.01
    assert result.reversed["adapted model"] > 0.5
    assert result.base_unchanged


def test_cnn_conv_adapters() -> None:
    results = run("cnn_conv_adapters", "--pretrain-steps=60", "--steps=60", "--images=256")
    base = results.pop("base model")
    assert base.clean_accuracy > 0.9
    assert base.accuracy < 0.4
    assert list(results) == ["LoRA", "DoRA"]
    for name, result in results.items():
        assert result.loss < 0.2 * base.loss, name
        assert result.accuracy > 0.7, name


@pytest.mark.parametrize("options", [[], ["--dora"]], ids=["lora", "dora"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # in sentence-transformers
def test_sentence_trainer(options: list[str]) -> None:
    result = run("sentence_trainer", *options)
    assert result.before < 0.5
    assert result.after > 0.7
    assert result.difference < 1e-5
    assert result.base_unchanged


@pytest.mark.parametrize("model", ["unet", "transformer"])
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers' schedulers
def test_styles_in_one_batch(model: str) -> None:
    result = run("styles_in_one_batch", f"--model={model}", "--images=5", "--steps=2")
    assert result.difference < 1e-5
    assert result.effect > 1e-2
    assert result.calls == 2


def test_qlora() -> None:
    results = run("qlora", "--pretrain-steps=30", "--steps=40", "--lr=1e-2")
    plain, packed = results["float32"], results["nf4"]
    assert packed.megabytes < 0.3 * plain.megabytes
    for result in results.values():
        assert result.after < 0.1 * result.before
        assert result.merged == pytest.approx(result.after, rel=1e-3)
    assert packed.after == pytest.approx(plain.after, abs=0.1)


@pytest.mark.parametrize("options", [[], ["--dora"]], ids=["lora", "dora"])
def test_merge_into_plain_model(options: list[str], tmp_path: Path) -> None:
    out = tmp_path / "merged.safetensors"
    result = run("merge_into_plain_model", "--steps=150", f"--out={out}", *options)
    assert result.last_loss < 0.25 * result.first_loss
    assert result.merged_difference < 1e-5
    assert result.file_difference == 0
    # float32 and float64 may round to neighbours where the exact value lies all but halfway.
    assert result.once < 1e-3
    assert result.twice > 0.1
    assert result.lost > 0.1
    assert result.params_unchanged
    assert {name: tensor.shape for name, tensor in load_file(out).items()} == {
        "0.weight": torch.Size([128, 4]),
        "0.bias": torch.Size([128]),
        "2.weight": torch.Size([128, 128]),
        "2.bias": torch.Size([128]),
        "4.weight": torch.Size([2, 128]),
        "4.bias": torch.Size([2]),
    }


def test_combine_adapters() -> None:
    result = run("combine_adapters", "--steps=150")
    for task in ("left", "right"):
        assert result.losses[f"{task} alone"][task] < 0.2
    both = {name: row["both"] for name, row in result.losses.items()}
    # The sum does both tasks, and so does the best approximation of half its rank; sums of factors do not.
    assert max(both["sum"], both["sum, recompressed"]) < 0.2
    assert min(both["left alone"], both["right alone"], both["linear"]) > 0.3
    assert abs(both["svd"] - both["sum, recompressed"]) < 1e-3
    assert both["cat"] == both["sum"]
    assert (result.ranks["sum"], result.ranks["sum, recompressed"]) == (8, 4)
    assert result.undone < 1e-5
    assert result.folder < 1e-6


@pytest.mark.parametrize("options", [[], ["--rslora"]], ids=["lora", "rslora"])
def test_gguf_export(options: list[str], tmp_path: Path) -> None:
    result = run("gguf_export", f"--out={tmp_path / 'adapter.gguf'}", *options)
    assert result.last_loss < 0.2 * result.first_loss
    assert result.metadata["general.architecture"] == "llama"
    assert abs(result.metadata["adapter.lora.alpha"] - (16 * 8**0.5 if options else 16)) < 1e-5
    assert len(result.shapes) == 2 * 2 * 7
    assert result.shapes["blk.1.attn_k.weight.lora_b"] == (32, 8)
    assert result.shapes["blk.1.ffn_down.weight.lora_a"] == (4, 128)
    assert result.difference < 1e-4
    assert (tmp_path / "adapter.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("options", [[], ["--dora"]], ids=["lora", "dora"])
def test_trainer(options: list[str], tmp_path: Path) -> None:
    result = run("trainer", f"--out={tmp_path}", *options)
    assert result.last_loss < 0.2 * result.first_loss
    assert result.counted[3:] == [13, 16, 19, 22, 25, 28]
    assert result.base_unchanged
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # TRL's names for transformers' options
def test_sft_trainer() -> None:
    result = run("sft_trainer")
    assert result.last_loss < 0.2 * result.first_loss
    assert result.continued == "still waters run deep"
    assert result.base_unchanged


def test_peft_in_and_out(tmp_path: Path) -> None:
    result = run("peft_in_and_out", "--steps=25", f"--out={tmp_path}")
    assert result.read_difference < 1e-4
    assert result.last_loss < 0.8 * result.first_loss
    assert result.written_difference < 1e-4
    assert result.folded_difference < 1e-4
    assert result.folded_scalings == {1.0}
    assert result.model_unchanged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folded", "peft"]


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_merge_sharded_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("merge_sharded_checkpoint")
    assert result.difference < 0.05 * result.effect
    assert not result.tied
    assert result.report.untied == ("lm_head.weight",)
    assert len([name for name in result.files if name.endswith(".safetensors")]) > 2
    assert result.report.verification.logits is not None
    assert set(result.extracted.saved) == {"lm_head.weight"}
    assert "untied: lm_head.weight" in capsys.readouterr().out


def test_preference(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("preference", "--steps=5")
    assert result["loss"] == pytest.approx(result["two passes"], rel=1e-5)
    assert result["gap"] < 1e-5
    assert all(margin > 0 for margin in result["margins"])
    assert "the gradients differ by at most" in capsys.readouterr().out
    # The reference may be another adapter, or the policy itself; only the policy gets a gradient.
    example: Any = load("preference")
    model = example.load_base()
    params = fl.base_params(model)
    for method in (False, True):
        config = fl.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, use_dora=method)
        policy, other = (fl.init(model, config, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
        ids, labels = example.rows(example.PAIRS[:2])
        batch = {"ids": ids, "labels": labels, "beta": torch.full((4,), 0.3)}
        for reference in (None, other, policy):
            batch["reference"] = example.said_by(model, params, reference, ids, labels)
            want, wanted = fl.value_and_grad(example.two_passes)(model, params, policy, batch)
            tree: Any = policy
            leaves, spec = optree.tree_flatten(tree)
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            loss = example.preference_loss(model, params, spec.unflatten(leaves), reference, ids, labels, beta=0.3)
            torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-5)
            wanted_tree: Any = wanted
            for got, expected in zip(torch.autograd.grad(loss, leaves), optree.tree_leaves(wanted_tree), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_grpo(capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = run("grpo", "--rank=1", "--steps=6").values()
    assert sum(result.rewards[-2:]) > sum(result.rewards[:2]) + 0.2
    assert result.after > result.before
    assert "rank 1, 7,296 values" in capsys.readouterr().out


def test_grpo_rewards_lines_of_python() -> None:
    example: Any = load("grpo")
    assert [example.reward(line) for line in (b"x = 1\n", b"x = 1", b"x =\n", b"x = '\\d'\n", b"\0\n")] == [
        1,
        0,
        0,
        1,
        0,
    ]
    rewards = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    expected = torch.tensor([[2.0, -1.0, -1.0], [0.0, 0.0, 0.0]]) / 3**0.5
    torch.testing.assert_close(example.advantages(rewards), expected.flatten(), rtol=1e-3, atol=1e-5)
    ids, labels, lines = example.sample(example.load_base(), ["if ", "print("], 9, torch.Generator().manual_seed(0))
    for row, wanted, line, prompt in zip(
        ids.tolist(), labels.tolist(), lines, [b"if "] * 9 + [b"print("] * 9, strict=True
    ):
        assert line.startswith(prompt)
        assert line.count(b"\n") <= 1
        assert bytes(token for token in wanted if token != -100) == line[len(prompt) :]
        assert all(b in (a, -100) for a, b in zip(row, wanted, strict=True))
        assert bytes(row).lstrip().startswith(line)
        assert line.endswith(b"\n") or len(line) == len(prompt) + example.LENGTH


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3], ids=["same-policy", "likelier", "less-likely"])
def test_grpo_has_the_gradient_of_the_paper(shift: float) -> None:
    """A token weighs ratio * advantage, or nothing where that is clipped, plus beta * (exp(log ref - log p) - 1)."""
    example: Any = load("grpo")
    model = example.load_base()
    params = {name: tensor.double() for name, tensor in fl.base_params(model).items()}
    config = fl.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    policy: Any = fl.init(model, config, generator=torch.Generator().manual_seed(0))
    policy = optree.tree_map(lambda x: x.double(), policy)
    prompts = ["x = ", "print("]
    ids, labels, _ = example.sample(model, prompts, 3, torch.Generator().manual_seed(0))
    old, reference = example.scored(model, params, policy, ids, labels)
    for log_probs, adapters in ((old, policy), (reference, {})):
        alone = fl.losses.token_log_probs(fl.bind(model, params, adapters), ids, labels)
        torch.testing.assert_close(log_probs, alone, rtol=1e-8, atol=1e-8)
    advantages = torch.tensor([1.5, -0.5, -1.0, 0.7, 0.7, -1.4], dtype=torch.float64)
    batch = {"ids": ids, "labels": labels, "old": old - shift, "reference": reference, "advantages": advantages}
    loss = functools.partial(example.grpo_loss, beta=0.5)
    grads: Any
    (value, divergence), grads = fl.value_and_grad(loss, has_aux=True)(model, params, policy, batch)

    tree: Any
    leaves, tree = optree.tree_flatten(policy)
    leaves = [x.requires_grad_() for x in leaves]
    weights = dict(params)
    for name, rule in tree.unflatten(leaves).items():
        weights[name] = params[name] + rule.scaling * rule.b @ rule.a
    logits = torch.func.functional_call(model, weights, (ids,)).log_softmax(-1)
    weighed, expected, far = torch.zeros((), dtype=torch.float64), 0.0, 0.0
    for row, advantage in enumerate(advantages.tolist()):
        places = (labels[row] != -100).nonzero().flatten().tolist()
        for place in places:
            log_prob = logits[row, place - 1, ids[row, place]]
            ratio = math.exp(log_prob.item() - batch["old"][row, place].item())
            behind = reference[row, place].item() - log_prob.item()
            kl = math.exp(behind) - behind - 1
            gain = min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            clipped = ratio > 1.2 if advantage > 0 else ratio < 0.8
            slope = (0 if clipped else ratio * advantage) + 0.5 * (math.exp(behind) - 1)
            share = 1 / len(places) / len(ids)
            weighed = weighed - share * slope * log_prob
            expected += share * (0.5 * kl - gain)
            far += share * kl
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert divergence.item() == pytest.approx(far, rel=1e-6)
    assert far > 0.01
    for got, want in zip(optree.tree_leaves(grads), torch.autograd.grad(weighed, leaves), strict=True):
        assert want.abs().max() > 1e-4
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_benchmark_merge(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = run("benchmark_merge", "--size=0.02", "--rounds=1", "--no-peft", f"--folder={tmp_path}")
    assert all(cost.done for cost in results.values())
    assert list(results) == ["cp -r", "funclora merge"]
    assert results["funclora merge"].peak < 1 << 30
    assert "times as long as cp -r" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_benchmark_files(capsys: pytest.CaptureFixture[str]) -> None:
    medians = run("benchmark_files", "--quick", "--adapters=3", "--rounds=1")
    assert sorted(medians) == ["load, PEFT", "load, funclora", "save, PEFT", "save, funclora"]
    assert "ratio" in capsys.readouterr().out


def test_a_method_with_frozen_tensors() -> None:
    result = run("method_vera")
    assert result.last < 0.5 * result.first
    assert result.loaded == result.last


def test_a_method_of_low_rank() -> None:
    result = run("method_loha")
    assert result.last < 0.5 * result.first


def test_per_example_gradients() -> None:
    result = run("per_example_gradients")
    assert result.difference < 1e-4
    assert result.found_by_norm > 0.75
    assert result.found_by_influence > 3 * 0.12  # a choice at random finds 12 %
    assert result.accuracy.pop("not trained") < 0.3
    assert list(result.accuracy) == ["plain", "clipped, noise 0", "clipped, noise 1"]
    assert min(result.accuracy.values()) > 0.9


def test_clipped_gradients_move_no_further_than_one_example_may() -> None:
    module = load("per_example_gradients")
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    params = fl.base_params(model)
    start: Any = fl.init(model, fl.LoraConfig(r=2, target_modules=["0"]))
    generator = torch.Generator().manual_seed(0)
    step = module.private_step(model, fl.optim.sgd(1.0), clip=0.01, noise=0.0, size=1.0)
    x = 100 * torch.randn(1, 4)
    batch = x, model(x).argmin(-1)  # the class that the model takes for the least likely: its gradient is large
    after, _ = step(params, start, fl.optim.sgd(1.0).init(start), batch, generator)
    moved = torch.cat([(after["0.weight"].a - start["0.weight"].a).flatten(), after["0.weight"].b.flatten()])
    torch.testing.assert_close(moved.norm(), torch.tensor(0.01))


def test_hypernetwork() -> None:
    result = run("hypernetwork", "--steps=150")
    assert result.answered < 0.15 * result.base
    assert result.shuffled > 3 * result.answered
    assert result.base_unchanged


def test_ensemble() -> None:
    result = run("ensemble", "--members=8", "--steps=100")
    assert result.ensemble.accuracy > result.single.accuracy + 0.03
    assert result.ensemble.loss < 0.6 * result.single.loss
    assert result.ensemble.calibration < 0.6 * result.single.calibration
    assert result.ensemble.confidence_far < result.single.confidence_far - 0.1
    assert result.error_of_sure < 0.7 * result.error_of_unsure


def test_lora_vs_dora(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result = run("lora_vs_dora", "--quick", f"--out={tmp_path}")
    assert result.methods == ["LoRA", "DoRA", "full", "random"]
    for method in result.methods:
        (found,) = result.matched(method)
        assert all(len(moved.rows) == 2 * 28 for moved in found.moved.values())
        if method != "random":
            assert found.losses[8] < 0.95 * result.base_loss
    assert "| correlation of ΔM and ΔD, per output | LoRA | DoRA | full | random |" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["lora-vs-dora.json", "lora-vs-dora.png"]


def test_the_page_of_lora_vs_dora_has_the_numbers_of_its_file() -> None:
    docs = EXAMPLES.parent / "docs"
    found = json.loads((docs / "lora-vs-dora.json").read_text(encoding="utf-8"))
    page = (docs / "lora-vs-dora.md").read_text(encoding="utf-8")
    for table in load("lora_vs_dora").tables(found).split("\n\n"):
        assert table in page


def test_full_rates(capsys: pytest.CaptureFixture[str]) -> None:
    losses = run("full_rates", "--steps=6", "--batch=2", "--context=32", "--rows=8", "--rates", "1e-6", "1e-3", "1")
    printed = capsys.readouterr().out
    base = float(printed.split("held-out loss of ")[1].split()[0])
    assert losses[1e-6] == pytest.approx(base, abs=1e-3)  # which is nearly the base
    assert losses[1e-3] < base < losses[1.0]
    assert f"1e-03  {losses[1e-3]:.4f}  best" in printed
