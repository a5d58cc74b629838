"""Other people's trainers on `as_module`: the losses of their runs with PEFT, and a base that no run changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from cases import llama
from datasets import Dataset
from oracle import close, snapshot
from safetensors.torch import load_file
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, TensorDataset
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import funclora as fl

pytestmark = [
    # the trainers' own, of each other's names and of their defaults
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]
CHECKPOINTED = {"activation_checkpointing": True}


@pytest.fixture(scope="module")
def base() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return llama()


@pytest.fixture
def unchanged(base: Any) -> Iterator[None]:
    """Whatever the test does, the base is what it was: bit for bit, flag for flag."""

    def configs() -> Any:
        return base.config.to_dict(), base.generation_config.to_dict(), [m.training for m in base.modules()]

    check, before = snapshot(base, fl.base_params(base)), configs()
    yield
    check()
    assert configs() == before


def lora(targets: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"), **options: Any) -> fl.LoraConfig:
    return fl.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)


def module_of(base: Any, config: fl.LoraConfig) -> Any:
    adapters = fl.init(base, config, generator=torch.Generator().manual_seed(1))
    return fl.as_module(base, fl.base_params(base), adapters, config)


def peft_of(base: Any, config: fl.LoraConfig, folder: Path) -> Any:
    """PEFT's model under the adapter that `module_of` starts from."""
    module_of(base, config).save_pretrained(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)


def history(trainer: Any, *keys: str) -> list[list[float]]:
    return [[entry[key] for entry in trainer.state.log_history if key in entry] for key in keys]


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "seed": 0, "disable_tqdm": True,
        "dataloader_pin_memory": False,
    } | more  # fmt: skip


# --- transformers' Trainer -------------------------------------------------------------------------------------


def sequences() -> Dataset:
    ids = torch.randint(17, (24, 9), generator=torch.Generator().manual_seed(2)).tolist()
    return Dataset.from_list([{"input_ids": row, "labels": row, "unused": 1} for row in ids])


def trainer_of(model: Any, folder: Path, **more: Any) -> Any:
    def metrics(prediction: Any) -> dict[str, float]:
        return {"mean_logit": float(prediction.predictions.mean())}

    args = TrainingArguments(**options(folder, **more))
    data = sequences()
    return Trainer(
        model=model, args=args, train_dataset=data, eval_dataset=data.select(range(8)), compute_metrics=metrics
    )


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("config", "more", "tolerance"),
    [
        (lora(), {}, 1e-5),
        (lora(use_dora=True), {"gradient_accumulation_steps": 2}, 1e-5),
        (lora(use_dora=True), CHECKPOINTED | {"activation_checkpointing_kwargs": {"use_reentrant": True}}, 1e-5),
        (lora(), CHECKPOINTED | {"activation_checkpointing_kwargs": {"use_reentrant": False}}, 1e-5),
        (lora(modules_to_save=["lm_head"]), {"label_smoothing_factor": 0.1}, 1e-5),
        (lora(("q_proj", "embed_tokens")), {"neftune_noise_alpha": 5.0}, 1e-5),
        (lora(use_dora=True), {"bf16": True}, 2e-2),
    ],
    ids=["lora", "accumulation", "reentrant", "non-reentrant", "full-head", "neftune", "bfloat16"],
)
def test_trainer_has_the_losses_of_peft(
    base: Any, config: fl.LoraConfig, more: dict[str, Any], tolerance: float, tmp_path: Path
) -> None:
    keys = ("loss", "grad_norm", "eval_loss", "eval_mean_logit")
    module = module_of(base, config)
    runs = []
    for model in (module, peft_of(base, config, tmp_path / "adapter")):
        trainer = trainer_of(model, tmp_path, **more)
        trainer.train()
        trainer.evaluate()
        runs.append(history(trainer, *keys))
    for key, got, want in zip(keys, *runs, strict=True):
        assert len(got) == (5 if key in ("loss", "grad_norm") else 1)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=tolerance, atol=tolerance, msg=key)
    assert not module.training, "evaluation came last"


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(base: Any, best: bool, tmp_path: Path) -> None:
    config = lora(lora_dropout=0.3)
    more = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    if best:
        more |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    whole = trainer_of(module_of(base, config), tmp_path, **more)
    whole.train()
    assert sorted(load_file(tmp_path / "checkpoint-2/model.safetensors")) == sorted(whole.model.state_dict())
    resumed = trainer_of(module_of(base, config), tmp_path / "again", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert history(resumed, "loss") == history(whole, "loss")
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    resumed.model.save_pretrained(tmp_path / "adapter")
    adapters, _ = fl.load_peft(tmp_path / "adapter", base)
    ids = torch.arange(6)[None]
    plain = copy.deepcopy(base).eval()
    close(fl.apply(plain, fl.base_params(plain), adapters, ids).logits, resumed.model.eval()(ids).logits, 0)


# --- TRL's SFTTrainer ------------------------------------------------------------------------------------------


def tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter."""
    from tokenizers import Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    letters = Tokenizer(WordLevel({letter: i for i, letter in enumerate("_^$abcdefgh ")}, unk_token="_"))
    letters.pre_tokenizer = Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="_", bos_token="^", eos_token="$")


def texts() -> Dataset:
    return Dataset.from_list([{"text": ("abcdefgh "[i % 9 :] + "bad cab")[: 6 + i % 7]} for i in range(24)])


def sft_of(model: Any, folder: Path, **more: Any) -> Any:
    args = SFTConfig(**options(folder, bf16=False, **more))
    return SFTTrainer(
        model=model, args=args, train_dataset=texts(), eval_dataset=texts().select(range(8)),
        processing_class=tokenizer(),
    )  # fmt: skip


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(
    ("config", "more"),
    [
        (lora(), {}),
        (lora(use_dora=True), {"activation_checkpointing_kwargs": {"use_reentrant": True}}),
        (lora(use_dora=True), {"activation_checkpointing": False, "gradient_accumulation_steps": 2}),
        (lora(), {"packing": True, "max_length": 14}),
    ],
    ids=["lora", "dora-reentrant", "dora-accumulation", "packing"],
)
def test_sft_trainer_has_the_losses_of_peft(
    base: Any, config: fl.LoraConfig, more: dict[str, Any], tmp_path: Path
) -> None:
    keys = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "eval_loss")
    module = module_of(base, config)
    runs = []
    for model in (module, peft_of(base, config, tmp_path / "adapter")):
        trainer = sft_of(model, tmp_path, **more)
        trainer.train()
        trainer.evaluate()
        runs.append(history(trainer, *keys))
    for key, got, want in zip(keys, *runs, strict=True):
        assert len(got) == (1 if "eval" in key else 5)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5, msg=key)
    module.save_pretrained(tmp_path / "trained")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "trained")).eval()
    ids = torch.arange(6)[None]
    close(module.eval()(ids).logits, theirs(ids).logits, 1e-5)


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_sft_trainer_trains_an_adapter_on_the_head(base: Any, use_dora: bool, tmp_path: Path) -> None:
    """TRL multiplies by the head's weight itself. PEFT's adapters there are refused, as they would do nothing."""
    config = lora(("q_proj", "lm_head"), use_dora=use_dora)
    module = module_of(base, config)
    params = fl.base_params(base)
    ids = torch.arange(12).reshape(2, 6)
    sft_of(module, tmp_path)
    module(input_ids=ids, labels=ids, fused_lm_head=True).loss.backward()
    loss, expected = fl.value_and_grad(lambda bound: bound(ids, labels=ids).loss)(base, params, module.adapters)
    close(module(input_ids=ids, labels=ids, fused_lm_head=True).loss, loss, 1e-5)
    got = {name: fl.LoRA(rule.a.grad, rule.b.grad) for name, rule in module.adapters.items()}
    for name, rule in expected.items():
        close([got[name].a, got[name].b], [rule.a, rule.b], 1e-4)  # type: ignore[attr-defined]
    sft_of(module_of(base, config), tmp_path).train()


# --- TRL's GRPOTrainer -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchanged")
@pytest.mark.parametrize(("config", "beta"), [(lora(), 0.0), (lora(use_dora=True), 0.0), (None, 0.1)])
def test_grpo_trainer_has_the_rewards_of_peft(
    base: Any, config: fl.LoraConfig | None, beta: float, tmp_path: Path
) -> None:
    """With a beta, TRL loads the base again, from its folder, as the reference; PEFT's is the adapter at the start."""
    copy.deepcopy(base).save_pretrained(tmp_path / "base")  # which writes into the configuration
    model = type(base).from_pretrained(tmp_path / "base")
    config = config or fl.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])  # which starts as the base
    keys = ("loss", "grad_norm", "reward", "entropy", *(("kl",) if beta else ()))
    runs = []
    for each in (module_of(model, config), peft_of(model, config, tmp_path / "adapter")):
        trainer = GRPOTrainer(
            model=each, processing_class=tokenizer(), train_dataset=Dataset.from_dict({"prompt": ["abc", "bad"] * 8}),
            reward_funcs=lambda completions, **_: [text.count("a") / 8 for text in completions],
            args=GRPOConfig(
                **options(tmp_path, max_steps=3, per_device_train_batch_size=8), bf16=False, num_generations=4,
                max_completion_length=8, beta=beta,
            ),
        )  # fmt: skip
        trainer.train()
        runs.append(history(trainer, *keys))
    for key, got, want in zip(keys, *runs, strict=True):
        assert len(got) == 3
        assert any(want), key
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-5, msg=key)


# --- accelerate and Lightning ----------------------------------------------------------------------------------


def regression() -> tuple[nn.Sequential, Any, TensorDataset]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.2), nn.Linear(7, 3))
    config = fl.LoraConfig(r=2, target_modules=["0"], modules_to_save=["3"], use_dora=True, lora_dropout=0.1)
    module = fl.as_module(model, fl.base_params(model), fl.init(model, config), config)
    return model, module, TensorDataset(torch.randn(16, 5), torch.randn(16, 3))


def plain_loop(module: Any, data: TensorDataset, epochs: int) -> list[float]:
    """What the trainers must come to."""
    optimizer = optim.SGD(module.parameters(), lr=0.1)
    losses: list[float] = []
    for _ in range(epochs):
        for x, y in DataLoader(data, batch_size=4):
            torch.manual_seed(len(losses))  # for dropout
            loss = F.mse_loss(module(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def same(module: Any, expected: Any) -> None:
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_accelerate_takes_it_as_any_module(tmp_path: Path) -> None:
    model, module, data = regression()
    check = snapshot(model, fl.base_params(model))
    expected = copy.deepcopy(module).train()
    losses = plain_loop(expected, data, 1)
    accelerator = Accelerator(cpu=True)
    prepared, optimizer, loader = accelerator.prepare(
        module.train(), optim.SGD(module.parameters(), lr=0.1), DataLoader(data, batch_size=4)
    )
    assert accelerator.unwrap_model(prepared) is module
    for i, (x, y) in enumerate(loader):
        torch.manual_seed(i)
        loss = F.mse_loss(prepared(x), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        assert loss.item() == pytest.approx(losses[i], rel=1e-6)
    same(module, expected)
    accelerator.save_state(str(tmp_path))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    accelerator.load_state(str(tmp_path))
    same(module, expected)
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path / "adapter", is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(prepared),
    )  # fmt: skip
    adapters, _ = fl.load_peft(tmp_path / "adapter", model)
    close(adapters, module.adapters, 0)
    check()


class Lightning(lightning.LightningModule):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.losses: list[float] = []
        self.modes: list[bool] = []

    def loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.mse_loss(self.module(x), y)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        torch.manual_seed(len(self.losses))
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        once, again = self.loss(batch), self.loss(batch)
        self.modes.append(bool(once == again))

    def configure_optimizers(self) -> optim.Optimizer:
        return optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore::UserWarning")  # its advice about loaders, loggers and processes
def test_lightning_takes_it_as_any_module(tmp_path: Path) -> None:
    model, module, data = regression()
    check = snapshot(model, fl.base_params(model))
    expected = copy.deepcopy(module).train()
    losses = plain_loop(expected, data, 2)
    wrapped = Lightning(module.train())
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, logger=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(wrapped, DataLoader(data, batch_size=4), DataLoader(data, batch_size=16))
    assert wrapped.modes == [True, True], "no dropout in validation"
    torch.testing.assert_close(torch.tensor(wrapped.losses), torch.tensor(losses), rtol=1e-6, atol=1e-7)
    same(module, expected)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    wrapped.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    same(module, expected)
    check()
