"""The computation of `funclora generate`: continuations, each row with its own adapter."""

from __future__ import annotations

import codecs
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import funclora as fl
from funclora._apps.train.base import Base, ByteTokenizer, takes
from funclora._apps.train.settings import CAUSAL
from funclora._torch.memory import is_out_of_memory
from funclora._train.step import micro_seed
from funclora.cli._loader import Loader
from funclora.cli._prompts import Prompt
from funclora.distributed import _ranks as ranks
from funclora.errors import ConfigError, FuncloraError, FuncloraWarning
from funclora.io.hf.library import first_line

Write = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        tokens: maximum number of generated tokens.
        temperature: divides the logits; 0 takes the most likely token.
        top_p: sample from the most likely tokens of this total probability; None for all.
        top_k: sample from this many of the most likely tokens; None for all.
        seed: of the samples.
    """

    tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """A continuation.

    Attributes:
        text: without special tokens.
        tokens: number of generated tokens, including the end token.
        ended: whether the model ended it; otherwise it was cut off.
    """

    text: str
    tokens: int
    ended: bool


class Generator:
    """Continues prompts with a frozen model and adapters that are loaded when a prompt names them.

    Args:
        base: the model.
        folders: PEFT folders by name.
        sampling: how tokens are chosen.
        model: the model's folder, which adapters are compared with; None if it is in none.
    """

    def __init__(self, base: Base, folders: Mapping[str, Path], sampling: Sampling, model: Path | None = None) -> None:
        self._base, self._sampling = base, sampling
        self._loader = Loader(base, folders, model)
        self._random = torch.Generator(base.device).manual_seed(sampling.seed)

    def load(self, name: str | None) -> None:
        """Load an adapter, for its errors.

        Raises:
            ConfigError: it does not load, or belongs to another model.
        """
        self._loader.route([name])

    def batches(self, prompts: Sequence[Prompt], rows: int) -> Iterator[list[Answer]]:
        """The answers, in the order of the prompts, so many rows at a time."""
        # Rows of one batch get the same number of tokens: none runs over the end of the context.
        batches: list[tuple[int, list[Prompt]]] = []
        for _, alike in itertools.groupby(prompts, lambda prompt: (self._room(prompt), self._length(prompt))):
            together = list(alike)
            batches += enumerate((together[i : i + rows] for i in range(0, len(together), rows)), start=len(batches))

        def answered(batch: tuple[int, list[Prompt]]) -> list[Answer]:
            number, some = batch
            self._random.manual_seed(micro_seed(self._sampling.seed, number))  # any process may answer it
            return self._answers(some, self._room(some[0]))

        short: list[str] = []
        for (_, some), answers in zip(batches, ranks.computed(batches, answered), strict=True):
            short += [p.where for p, answer in zip(some, answers, strict=True) if self._is_short(p, answer)]
            yield answers
        self._tell_short(short)

    def stream(self, prompt: Prompt, write: Write) -> Answer:
        """The answer to one prompt, whose text is also written as it comes."""
        (answer,) = self._answers([prompt], self._room(prompt), write)
        self._tell_short([prompt.where] if self._is_short(prompt, answer) else [])
        return answer

    def _is_short(self, prompt: Prompt, answer: Answer) -> bool:
        """Whether the model's context has cut an answer off."""
        return not answer.ended and answer.tokens == self._room(prompt) < self._sampling.tokens

    def _tell_short(self, where: list[str]) -> None:
        if where:
            answers = f"{len(where)} answers are" if len(where) > 1 else "an answer is"
            warnings.warn(
                f"{where[0]}: {answers} cut off before --max-tokens {self._sampling.tokens}: the context of "
                f"{self._base.name} has {self._base.limit} tokens, including the prompt.",
                FuncloraWarning,
                stacklevel=3,
            )

    def _room(self, prompt: Prompt) -> int:
        """How many tokens the answer may have."""
        limit = self._base.limit
        if limit is None or isinstance(self._base.tokenizer, ByteTokenizer):
            return self._sampling.tokens
        # What a decoder of an encoder's begins with takes a position too.
        return min(self._sampling.tokens, limit - (len(prompt.ids) if self._base.task == CAUSAL else 1))

    def _length(self, prompt: Prompt) -> int | None:
        """The length that a prompt shares with all rows of its batch; None if shorter ones can be filled up."""
        base = self._base
        if base.task != CAUSAL or isinstance(base.tokenizer, ByteTokenizer):
            return None
        # What stands on the left moves a row, and a model that cannot be told so counts it, or carries it on.
        told = takes(type(base.model).forward, "position_ids") and not getattr(base.model, "_is_stateful", False)
        return None if told else len(prompt.ids)

    @torch.no_grad()
    def _answers(self, prompts: Sequence[Prompt], room: int, write: Write | None = None) -> list[Answer]:
        base = self._base
        adapters = self._loader.route([prompt.adapter for prompt in prompts])
        bound = fl.bind(base.model, base.params, adapters)
        rows = [prompt.ids for prompt in prompts]
        if isinstance(base.tokenizer, ByteTokenizer):
            return _bytes(bound, rows, room, base.limit or 0, self._next, base.device, write)
        return self._transformers(bound, rows, room, write)

    def _next(self, logits: Tensor) -> Tensor:
        """`[rows, vocabulary]` -> `[rows]`."""
        if not self._sampling.temperature:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=self._random)[:, 0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Of each token to be drawn: `[rows, vocabulary]`, in the order of transformers: temperature, top-k, top-p."""
        sampling = self._sampling
        logits = logits / sampling.temperature
        if sampling.top_k is not None:
            least = logits.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if sampling.top_p is not None:
            ordered, places = logits.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            dropped = (before >= sampling.top_p).scatter(-1, places, before >= sampling.top_p)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits.softmax(-1)

    def _transformers(self, bound: Any, rows: list[list[int]], room: int, write: Write | None) -> list[Answer]:
        base, tokenizer = self._base, self._base.tokenizer
        longest = max(map(len, rows))
        # A decoder's rows end at one place, from which all go on; an encoder's begin at its first position.
        side = "left" if base.task == CAUSAL else "right"
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=filler, padding_side=side).to(
                base.device
            )
            for some, filler in (
                ([torch.tensor(row) for row in rows], tokenizer.pad_token_id),
                ([torch.ones(len(row), dtype=torch.long) for row in rows], 0),
            )
        )
        with torch.random.fork_rng(devices=[base.device] if base.device.type == "cuda" else []):
            # transformers draws from the global generators: give them the state of ours, one batch after the other.
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._random, device=base.device)))
            try:
                settings = self._settings(room)
                out = bound.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=settings,
                    streamer=None if write is None else _streamer(tokenizer, write),
                )
            except Exception as error:  # generation_config.json may hold anything
                if isinstance(error, FuncloraError) or is_out_of_memory(error):
                    raise
                raise ConfigError(
                    f"{base.name}: transformers refuses to generate: {first_line(error)}. Does generation_config.json "
                    "ask for something else than sampling, or the likeliest token?"
                ) from error
        new = out[:, longest:] if base.task == CAUSAL else out[:, 1:]
        return [self._answer(row, set(settings.eos_token_id or ())) for row in new.tolist()]

    def _answer(self, ids: list[int], ends: set[int]) -> Answer:
        count = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        ended = bool(count) and ids[count - 1] in ends
        return Answer(self._base.tokenizer.decode(ids[:count], skip_special_tokens=True), count, ended)

    def _settings(self, room: int) -> Any:
        """The folder's own generation settings, with what the command line says in their place."""
        import copy

        sampling, model = self._sampling, self._base.model
        settings: Any = copy.deepcopy(model.generation_config)
        settings.update(
            max_new_tokens=room,
            max_length=None,
            do_sample=bool(sampling.temperature),
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            use_cache=True,
            pad_token_id=self._base.tokenizer.pad_token_id,
            temperature=sampling.temperature or None,
            top_p=(sampling.top_p or 1.0) if sampling.temperature else None,
            top_k=(sampling.top_k or 0) if sampling.temperature else None,
        )
        # A chat model's folder names the ends of its turns; training puts the tokenizer's own after each completion.
        ends = settings.eos_token_id
        known = [ends] if isinstance(ends, int) else [*(ends or ())]
        own = self._base.tokenizer.eos_token_id
        settings.eos_token_id = [*known, *([own] if own is not None and own not in known else [])] or None
        return settings


def _streamer(tokenizer: Any, write: Write) -> Any:
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        """Writes words as soon as they are whole."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def _bytes(
    bound: Any,
    rows: list[list[int]],
    room: int,
    context: int,
    following: Callable[[Tensor], Tensor],
    device: torch.device,
    write: Write | None,
) -> list[Answer]:
    """Continuations by the demo's base, which sees the last `context` bytes of each row and has no end mark."""
    texts = [list(row) for row in rows]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for step in range(room):
        seen = [text[-context:] for text in texts]
        # Filled up on the right, where no causal position looks.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in seen], batch_first=True).to(device)
        last = torch.tensor([len(row) - 1 for row in seen], device=device)
        chosen = following(bound(ids)[torch.arange(len(seen), device=device), last].float()).tolist()
        for text, byte in zip(texts, chosen, strict=True):
            text.append(byte)
        if write is not None:
            write(decoder.decode(bytes(chosen), final=step == room - 1))
    new = [bytes(text[len(row) :]) for text, row in zip(texts, rows, strict=True)]
    return [Answer(text.decode("utf-8", "replace"), len(text), ended=False) for text in new]
