"""The frozen model of a run: loading, quantisation, losses, scores and continuations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funclora._apps.train.device import device_of
from funclora._apps.train.folder import (
    CLASSES,
    PROBLEM_TYPES,
    empty_model,
    load_config,
    load_divided,
    load_model,
    longest_context,
)
from funclora._apps.train.qlora import forget, pack, packed_names, splits_weights
from funclora._apps.train.rows import IGNORED
from funclora._apps.train.settings import (
    AUTO,
    CAUSAL,
    DECODERS,
    MULTI,
    REGRESSION,
    SEQ2SEQ,
    SEQUENCE,
    SINGLE,
    TOKEN,
    Settings,
)
from funclora._apps.train.tokenizer import ByteTokenizer as ByteTokenizer
from funclora._apps.train.tokenizer import begun
from funclora._apps.train.tokenizer import load_tokenizer as load_tokenizer
from funclora._bind.apply import bind
from funclora._bind.params import base_params
from funclora.errors import ConfigError, UnsupportedError
from funclora.io.hf.library import reading
from funclora.rules.base import Params

DEMO = "the demo's base"
THRESHOLD = 0.5  # probability from which on a text is of a class
CPU = torch.device("cpu")

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Base:
    """A frozen model, its weights and its tokens.

    Attributes:
        name: for messages: the folder, or `DEMO`.
        model: in evaluation mode; only its structure is used where `params` are given. Never changed.
        params: its weights on the device of the run, quantised if requested.
        tokenizer: as `load_tokenizer` gives it.
        task: one of `settings.TASKS`.
        limit: maximum context in tokens; None if there is no limit.
        classes: names of the classes, by number; empty for tasks without.
        new: full names of modules whose weights are not in the folder, such as a new head.
        device: where the run computes.
        problem: what labels of texts are, one of `settings.PROBLEMS`.
        together: whether all processes compute each batch together, and the mean of their gradients is that of the
            batch; otherwise each has batches of its own.

    Examples:
        >>> import funclora as fl
        >>> base = load_base(Settings(), ByteTokenizer())
        >>> ids = torch.tensor([list(b"import os")])
        >>> bound = fl.bind(base.model, base.params, {})
        >>> batch = {"input_ids": ids, "labels": ids}
        >>> base.count(batch), bool(base.loss(bound, batch) > 0)
        (8, True)
    """

    name: str
    model: nn.Module
    params: Params
    tokenizer: Any
    task: str
    limit: int | None
    classes: tuple[str, ...] = ()
    new: tuple[str, ...] = ()
    device: torch.device = CPU
    problem: str = SINGLE
    together: bool = False

    def loss(self, bound: Any, batch: Batch) -> Tensor:
        """The SUM of the losses of all positions with a label, float32; divide by `count`.

        It is in nats; for numbers it is the square of their unit. Numbers, and the classes of a text that has several,
        are one label each.

        Args:
            bound: the model with adapters, as from `funclora.bind`.
            batch: as from `batches.collate`, on any device.

        Returns:
            A scalar.
        """
        return self._loss(self.logits(bound, batch), self._labels(batch).to(self.device))

    @property
    def constants(self) -> dict[str, Mapping[str, Tensor]]:
        """All tensors that the losses depend on and that are not trained, by name."""
        return {"base model": self.params}

    @property
    def watched(self) -> tuple[str, ...]:
        """Names of what is watched in training besides the loss."""
        return ()

    def prepared(self, batch: Batch) -> Batch:
        """A batch with what its loss needs and does not depend on the adapters that are trained."""
        return batch

    def watch(self, bound: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; and what is watched, by name, each as a sum and the number of values in it, `[2]`.

        Args:
            bound: as for `loss`.
            batch: from `prepared`.
        """
        return self.loss(bound, batch), {}

    def count(self, batch: Batch) -> int:
        """The number of positions that `loss` sums over, counted on the batch's device without synchronisation."""
        return int((self._labels(batch) != IGNORED).sum())

    def score(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """Sums over the positions with a label: "loss", and for classification "correct". No gradient.

        What is a mean over something else is its sum and the number of values in it, `[2]`.
        """
        with torch.no_grad():
            logits, labels = self.logits(bound, batch), self._labels(batch).to(self.device)
            sums = {"loss": self._loss(logits, labels)}
            if self.classifies:
                sums["correct"] = ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()
        return sums

    def by_row(self, bound: Any, batch: Batch) -> dict[str, Tensor]:
        """The scores of each row.

        Args:
            bound: as for `loss`; also the model of one member, as in `funclora.evaluate`.
            batch: as for `loss`.

        Returns:
            "loss", the sum over the positions with a label, `[batch]`; and for classification "predicted", the class at
            each position, `[batch]` or `[batch, seq]`, or "outputs", `[batch, outputs]`: the numbers, or the
            probabilities of several classes.
        """
        logits, labels = self.logits(bound, batch).float(), self._labels(batch).to(self.device)
        losses = self._losses(logits, labels)
        found = {"loss": losses.unflatten(0, labels.shape).reshape(len(labels), -1).sum(1)}
        if self.classifies:
            found["predicted"] = logits.argmax(-1)
        elif self.task == SEQUENCE:
            found["outputs"] = self.shares(logits)
        return found

    @property
    def classifies(self) -> bool:
        """Whether each label is one class."""
        return self.task == TOKEN or (self.task == SEQUENCE and self.problem == SINGLE)

    def shares(self, logits: Tensor) -> Tensor:
        """What the outputs of a head mean: probabilities, or the numbers themselves."""
        if self.problem == REGRESSION:
            return logits.float()
        return logits.float().sigmoid() if self.problem == MULTI else logits.float().softmax(-1)

    @torch.no_grad()
    def generate(self, bound: Any, prompt: str, tokens: int) -> str:
        """The model's greedy continuation of a prompt, without the prompt; for classification, the class.

        Args:
            bound: as for `loss`.
            prompt: a text. If it is too long for the model's context, a causal model reads its end, and other models
                read its beginning, as in training.
            tokens: maximum number of generated tokens.

        Raises:
            ConfigError: the prompt has no tokens.
            UnsupportedError: the task has a class for each token.
        """
        if self.task == TOKEN:
            raise UnsupportedError("sample: token-classification cannot continue prompts. Leave it out.")
        cut = {} if self.limit is None else {"truncation": True, "max_length": self.limit}
        ids = begun(self.tokenizer, prompt) if self.task in DECODERS else self.tokenizer(prompt, **cut)["input_ids"]
        if not ids:
            raise ConfigError("sample: the prompt is empty, so there is no token to continue. Give at least one word.")
        if isinstance(self.tokenizer, ByteTokenizer):
            said: bytes = bound.generate(bytes(ids), tokens, temperature=0.0)
            return self.tokenizer.decode(said[len(ids) :])
        if self.limit is not None and self.task in DECODERS:
            tokens = min(tokens, self.limit - 1)
            ids = ids[-(self.limit - tokens) :]
        read = torch.tensor([ids], device=self.device)
        given = {"input_ids": read, "attention_mask": torch.ones_like(read)}
        if self.task == SEQUENCE:
            return self._said(self.shares(bound(**given).logits[0]).tolist())
        out = bound.generate(
            **given, max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=self.tokenizer.pad_token_id
        )[0]
        text: str = self.tokenizer.decode(out[len(ids) :] if self.task in DECODERS else out, skip_special_tokens=True)
        return text

    def logits(self, bound: Any, batch: Batch) -> Tensor:
        """The logits of a batch: `[batch, seq, vocabulary]`, or `[batch, classes]`.

        Args:
            bound: as for `loss`.
            batch: as for `loss`. For seq2seq the decoder reads the labels.

        Raises:
            UnsupportedError: rows are packed, which the demo's base does not support.
        """
        given = {key: value.to(self.device) for key, value in batch.items() if key != "labels"}
        if "token_type_ids" in given and not self._has_segments:
            del given["token_type_ids"]
        if isinstance(self.tokenizer, ByteTokenizer):
            if "position_ids" in given:
                raise UnsupportedError(f"packing: {DEMO} cannot separate the examples of a row. Leave it out.")
            return bound(given["input_ids"])  # type: ignore[no-any-return]
        if self.task == SEQ2SEQ and "decoder_input_ids" not in given:
            given["decoder_input_ids"] = self.decoder_ids(batch["labels"].to(self.device))
        if takes(type(self.model).forward, "use_cache"):
            return bound(**given, use_cache=False).logits  # type: ignore[no-any-return]
        return bound(**given).logits  # type: ignore[no-any-return]

    def _labels(self, batch: Batch) -> Tensor:
        """The label of each position of the logits."""
        labels = batch["labels"]
        # The labels are shifted, not the logits: a slice of these would be a copy.
        return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if self.task == CAUSAL else labels

    @functools.cached_property
    def _has_segments(self) -> bool:
        """Whether the model tells the texts of a pair apart by more than their tokens."""
        sizes: int = getattr(self.model.config, "type_vocab_size", 2)
        return sizes > 1 and takes(type(self.model).forward, "token_type_ids")

    def _said(self, shares: list[float]) -> str:
        """What a head says of a text, in words."""
        if self.problem == REGRESSION:
            return ", ".join(f"{share:.4g}" for share in shares)
        if self.problem == MULTI:
            return ", ".join(name for name, share in zip(self.classes, shares, strict=True) if share >= THRESHOLD)
        return self.classes[shares.index(max(shares))]

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self._losses(logits, labels, reduction="sum")

    def _losses(self, logits: Tensor, labels: Tensor, reduction: str = "none") -> Tensor:
        """The loss of each label, flattened, or their sum."""
        flat, wanted = logits.float().flatten(0, -2), labels.flatten()
        if self.task == SEQUENCE and self.problem == REGRESSION:
            return F.mse_loss(flat.flatten(), wanted, reduction=reduction)
        if self.task == SEQUENCE and self.problem == MULTI:
            return F.binary_cross_entropy_with_logits(flat.flatten(), wanted, reduction=reduction)
        return F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction=reduction)

    def decoder_ids(self, labels: Tensor) -> Tensor:
        """The decoder's input for labels: the same, shifted by one."""
        model: Any = self.model
        if hasattr(model, "prepare_decoder_input_ids_from_labels"):
            return model.prepare_decoder_input_ids_from_labels(labels=labels)  # type: ignore[no-any-return]
        start = model.config.decoder_start_token_id
        return F.pad(labels.masked_fill(labels == IGNORED, self.tokenizer.pad_token_id), (1, 0), value=start)[:, :-1]


@functools.cache
def takes(forward: Any, argument: str) -> bool:
    """Whether a function has an argument with this name."""
    return argument in inspect.signature(forward).parameters


def context_limit(settings: Settings) -> int | None:
    """The longest context of the model, from its configuration alone.

    Raises:
        FormatError: the folder is no model.
        ConfigError: the model does not support the task.
    """
    if settings.model is None:
        _refuse_demo(settings)
        from funclora.demo.model import ByteLMConfig

        return ByteLMConfig().context
    return longest_context(empty_model(settings.model, settings.task))


def known_classes(settings: Settings) -> tuple[str, ...]:
    """The classes that the model's folder has a head for, in the order of its outputs; empty if they have no names.

    Raises:
        FormatError: the folder is no model.
    """
    if settings.model is None or not known_head(settings):
        return ()
    names = _labels(settings.model, load_config(settings.model))
    return names if names != tuple(f"LABEL_{i}" for i in range(len(names))) else ()


def known_problem(settings: Settings) -> str:
    """What labels are: as the settings say, else as the model's own head was trained; `settings.AUTO` without one."""
    if settings.problem != AUTO or settings.model is None or settings.task != SEQUENCE or not known_head(settings):
        return settings.problem
    config = load_config(settings.model)
    named = {name: problem for problem, name in PROBLEM_TYPES.items()}
    return named.get(config.problem_type, REGRESSION if config.num_labels == 1 else AUTO)


def known_head(settings: Settings) -> bool:
    """Whether the model's folder has a head for the task."""
    if settings.model is None or settings.task not in (SEQUENCE, TOKEN):
        return False
    head = CLASSES[settings.task].removeprefix("AutoModel")
    return any(str(name).endswith(head) for name in load_config(settings.model).architectures or ())


def _labels(folder: Path, config: Any) -> tuple[str, ...]:
    """The names of the classes in a folder's configuration, which may be of any kind."""
    with reading(folder, f"model: id2label in {folder / 'config.json'} does not name the classes"):
        return tuple(str(config.id2label[i]) for i in range(config.num_labels))


def load_base(settings: Settings, tokenizer: Any, classes: Sequence[str] = ()) -> Base:
    """The model of a run, on its device.

    `quantize` quantises all linear layers except the output layer and the fully fine-tuned ones, whether or not they
    are targets, as QLoRA does, and frees the memory of their dense weights. Where `init` splits the weights first,
    `adapters.begin` quantises them.

    Args:
        settings: `model`, `task`, `problem`, `dtype`, `attention`, `quantize`, `double_quant`, `device`, `init`,
            `modules_to_save` and `seed` are used.
        tokenizer: from `load_tokenizer`.
        classes: for classification; those of the folder's configuration if empty.

    Raises:
        FormatError: the folder contains no model, or a broken one.
        ConfigError: the model does not support the task, or sees the tokens that it must predict; or the device cannot
            be used.
        UnsupportedError: bitsandbytes or transformers is missing.

    Examples:
        >>> load_base(Settings(), ByteTokenizer()).limit
        256
    """
    device = device_of(settings.device)
    problem = SINGLE if settings.problem == AUTO else settings.problem
    model: nn.Module
    new: tuple[str, ...] = ()
    packed: dict[str, Tensor] = {}
    limit: int | None
    if settings.model is None:
        _refuse_demo(settings)
        from funclora.demo.model import load_base as load_demo

        demo = load_demo()
        demo = demo if settings.dtype == "auto" else demo.to(getattr(torch, settings.dtype))
        model, name, limit = demo, DEMO, demo.config.context
    else:
        if _is_read_divided(settings):
            model, packed = _divided(settings, settings.model, device)
        else:
            model, new = load_model(
                settings.model,
                settings.task,
                dtype=settings.dtype,
                attention=settings.attention,
                classes=classes,
                problem=problem,
                seed=settings.seed,
            )
        name, limit = str(settings.model), longest_context(model)
        _set_padding(model, tokenizer, name)
        if settings.task == SEQ2SEQ and getattr(model.config, "decoder_start_token_id", None) is None:
            raise ConfigError(
                f"model: the config.json of {name} has no decoder_start_token_id, the token that a decoder begins "
                "with. Add it; for T5 it is the padding id."
            )
        if settings.task in (SEQUENCE, TOKEN) and not classes:
            classes = _labels(settings.model, model.config)
    if settings.quantize != "none" and not splits_weights(settings) and not packed:
        packed = pack(base_params(model), packed_names(model, settings, new), settings, device)
        forget(model, packed)
    _move(model, device)
    params = base_params(model) | packed
    base = Base(name, model, params, tokenizer, settings.task, limit, tuple(classes), new, device, problem)
    if settings.task in DECODERS:
        _check_causal(base)
    return base


def _is_read_divided(settings: Settings) -> bool:
    """Whether each process reads only its share: new heads and adapters that split weights need whole ones first."""
    return settings.shard and settings.task in (*DECODERS, SEQ2SEQ) and not splits_weights(settings)


def _divided(settings: Settings, folder: Path, device: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model in pieces, quantised if requested."""
    quantization: dict[str, Any] = {}
    if settings.quantize != "none":
        names = packed_names(empty_model(folder, settings.task), settings, ())
        double = settings.double_quant and settings.quantize != "int8"
        quantization = {"quantize": settings.quantize, "double_quant": double, "targets": names}
    return load_divided(
        folder, settings.task, dtype=settings.dtype, attention=settings.attention, device=device, **quantization
    )


def _check_causal(base: Base) -> None:
    """Raise `ConfigError` if the logits of a position depend on later tokens; this is tested by running the model.

    transformers also makes causal models from encoders, without changing their attention: BERT without `is_decoder`
    would learn to copy the next token from its input.
    """
    rows, half = vocabulary(base.model), min(8, base.limit or 8) // 2
    first = torch.arange(2 * half).remainder(rows)[None]
    other = torch.cat([first[:, :half], (first[:, half:] + 1 + rows // 2).remainder(rows)], 1)
    bound = bind(base.model, base.params, {})
    with torch.no_grad():
        one, two = (
            base.logits(bound, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, :half]
            for ids in (first, other)
        )
    # Not bit for bit: later tokens change the batches of the experts.
    scale = one.float().abs().max().item() * torch.finfo(one.dtype).eps ** 0.5
    if not torch.allclose(one.float(), two.float(), rtol=0, atol=scale, equal_nan=True):
        raise ConfigError(
            f"task: {base.name} ({type(base.model).__name__}) sees the tokens that it must predict, so it is not a "
            'causal language model. Give a decoder, or one with "is_decoder": true in its config.json.'
        )


def _refuse_demo(settings: Settings) -> None:
    if settings.task not in DECODERS:
        raise ConfigError(
            f"task: {DEMO} is a causal language model, not for {settings.task}. Give another with --model."
        )


def _move(model: nn.Module, device: torch.device) -> None:
    """As `model.to(device)`, past parameters on the meta device."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _set_padding(model: nn.Module, tokenizer: Any, name: str) -> None:
    """Check that the model has the padding token, and set its padding id.

    Models that classify by the last token of a row find it by the padding id.
    """
    rows = vocabulary(model)
    if tokenizer.pad_token_id >= rows:
        end = tokenizer.eos_token_id
        if end is None or end >= rows:
            raise ConfigError(
                f"model: the padding token {tokenizer.pad_token!r} has the id {tokenizer.pad_token_id}, but the "
                f"embedding of {name} has {rows} rows. Set another one: tokenizer.pad_token = ... and "
                "tokenizer.save_pretrained(folder)."
            )
        tokenizer.pad_token = tokenizer.eos_token
    config: Any = model.config
    config.get_text_config().pad_token_id = config.pad_token_id = tokenizer.pad_token_id


def vocabulary(model: nn.Module) -> int:
    """Number of token ids that a model's embedding has."""
    table: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else model.embed  # type: ignore[operator]
    return int(table.num_embeddings)
