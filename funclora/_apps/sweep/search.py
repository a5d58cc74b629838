"""The search: populations are trained from evaluation to evaluation, and members are dropped at every rung.

The data, initial values and schedule of a member are functions of its seed, its options and the step. The other members
of its population change its results only by rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import optree
import torch

import funclora as fl
from funclora._apps.sweep import memory
from funclora._apps.sweep.settings import SearchSettings
from funclora._apps.sweep.space import Member
from funclora._apps.sweep.store import HALVED, LIVE, NOT_FINITE, STOPPED, MemberProgress, Store
from funclora._apps.sweep.task import Task
from funclora._apps.train.scores import Score
from funclora._many.stack import Stack
from funclora._torch.pytree import keyed_copies, leaf_keys
from funclora._train.members import Population
from funclora._train.step import seeded
from funclora.distributed import _ranks as ranks
from funclora.distributed._ranks import part_of
from funclora.errors import ConfigError, FormatError
from funclora.optim import per_member
from funclora.optim._members import MemberTransformation


@dataclass
class Status:
    """The status of a running search.

    Attributes:
        doing: the current activity, in words.
        done: finished member-steps, including those of earlier runs.
        total: member-steps of the whole search, as currently planned.
        fresh: member-steps of this process.
        seconds: their duration.
        size: members trained together.
        step: of the current population.
        ranking: the leaderboard.
        notes: members that were dropped, budgets that were halved.
    """

    doing: str = "loading"
    done: int = 0
    total: int = 0
    fresh: int = 0
    seconds: float = 0.0
    size: int = 0
    step: int = 0
    ranking: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float | None:
        """Seconds left, at the speed of this process."""
        return (self.total - self.done) * self.seconds / self.fresh if self.fresh else None


class _Trained(NamedTuple):
    """What came of the training of some members.

    Attributes:
        lost: member -> the step after which it was not finite.
        losses: member -> training loss and held-out score.
        file: with the tensors of these.
        seconds: how long it took.
    """

    lost: dict[int, int]
    losses: dict[int, tuple[float, Score]]
    file: str | None
    seconds: float


class _TooMany(NamedTuple):
    """A number of members for which the memory did not suffice, and the error."""

    members: int
    said: str


class Search:
    """A search in a folder; `run` starts or continues it."""

    def __init__(
        self,
        task: Task,
        members: Sequence[Member],
        settings: SearchSettings,
        store: Store,
        observe: Callable[[Status], None] = lambda status: None,
    ) -> None:
        self.task = task
        self.members = {member.id: member for member in members}
        self.settings = settings
        self.store = store
        self.observe = observe
        self.status = Status()
        self.step = fl.population_step(task.model, task.loss, per_member(task.optimizer(), lr=[]))
        self._specs: dict[int, Any] = {}
        # Rows of other seeds are of other lengths, and what is drawn for dropout depends on the length.
        self._by_seed = any(member.dropout for member in members)

    @property
    def progress(self) -> dict[int, MemberProgress]:
        """The progress of each member."""
        return self.store.state.members

    @property
    def live(self) -> list[int]:
        """The active members; members of one structure are adjacent, so that populations contain few kinds."""
        alive = [i for i, p in self.progress.items() if p.status == LIVE]
        return sorted(alive, key=lambda i: (*self._kind(i), i))

    def _kind(self, i: int) -> tuple[Any, ...]:
        member = self.members[i]
        return member.seed if self._by_seed else 0, member.method, member.targets, member.rank

    def run(self) -> None:
        """Train, evaluate and cut until the end."""
        state = self.store.state
        n = len(self.members)
        cuts = self.settings.cuts(n)
        self._size()
        self._tell("training")
        for point in self.settings.points(n):
            while pending := [i for i in self.live if self.progress[i].step < point]:
                self._round(pending, point)
            if point in cuts and state.rung <= cuts.index(point):
                self._cut(cuts.index(point))
        self._tell("done")

    def ranking(self) -> list[int]:
        """All members, best first: by number of steps, then by held-out loss. Those that stopped have no more to go."""

        def key(i: int) -> tuple[Any, ...]:
            p, loss = self.progress[i], self.loss(i)
            steps = self._reached() if p.status == STOPPED else p.step
            return p.status == NOT_FINITE, -steps, math.inf if loss is None else loss, i

        return sorted(self.progress, key=key)

    def _reached(self) -> int:
        return max((p.step for p in self.progress.values()), default=0)

    def loss(self, i: int) -> float | None:
        """The held-out loss that counts for a member."""
        p = self.progress[i]
        return p.best_loss if self.settings.keeps_best and p.status != NOT_FINITE else p.loss

    def leaderboard(self) -> list[dict[str, Any]]:
        """The ranking with what is known of each member."""
        return [
            {
                "place": place,
                "member": i,
                "heldout_loss": self.loss(i),
                "step": self.progress[i].step,
                "best_step": self.progress[i].best_step,
                "status": self.progress[i].status,
                **self.members[i].values,
                **self.progress[i].metrics,
            }
            for place, i in enumerate(self.ranking(), start=1)
        ]

    def adapters(self, i: int) -> dict[str, fl.Rule]:
        """The adapters of a member whose tensors were kept."""
        p = self.progress[i]
        file = p.best_file if self.settings.keeps_best else p.file
        assert file is not None
        adapters: dict[str, fl.Rule] = self._loaded(i, file)["adapters"]
        return adapters

    # Populations

    def _size(self) -> None:
        state, settings = self.store.state, self.settings
        if not self.live:
            return
        limit = min(len(self.live), settings.population or len(self.members))
        if state.size is None or state.budget != settings.budget:
            self._tell("measuring memory")
            budget = settings.budget or memory.available(self.task.device)
            state.size, used = min(ranks.gathered(memory.fitting(self._probe, limit, budget)))
            state.budget = settings.budget
            self._note(f"{state.size} members together: {memory.readable(used)} of {memory.readable(budget)}")
            self._commit()
        state.size = min(state.size, settings.population or state.size)
        self.status.size = state.size

    def _probe(self, n: int) -> int:
        """The peak of a step with n members, the largest ones."""
        largest = sorted(self.live, key=lambda i: -self._weight(i))[:n]
        device = self.task.device
        memory.reset_peak(device)
        members, state = self._begun([self._fresh(i) for i in largest], largest)
        self._stepped(members, state, largest, 0)
        return memory.peak(device)

    def _weight(self, i: int) -> float:
        member = self.members[i]
        targets = 10 if member.targets == "all-linear" else len(member.targets.split("+"))
        return member.rank * targets * (1.5 if member.method == "dora" else 1)

    def _halve_population(self, failed: _TooMany) -> None:
        n, said = failed
        if n == 1:
            raise ConfigError(f"memory ran out with a single member: {said}. Lower --batch, --context or --rank.")
        self.store.state.size = self.status.size = n // 2
        self._note(f"memory ran out with {n} members together, continuing with {n // 2}")
        if self.task.device.type == "cuda":
            torch.cuda.empty_cache()

    # Training

    def _round(self, pending: list[int], point: int) -> None:
        """Each process trains some of the members; all take up what came of it, and the first one commits it."""
        state = self.store.state
        own = [pending[k] for k in part_of(len(pending))]
        found: _Trained | _TooMany | None = None
        if own:
            parts = math.ceil(len(own) / (state.size or 1))
            group = own[: math.ceil(len(own) / parts)]
            group = [i for i in group if self._kind(i)[0] == self._kind(group[0])[0]]
            try:
                found = self._advance(group, point)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
                found = _TooMany(len(group), (str(error) or type(error).__name__).splitlines()[0])
        every = ranks.gathered(found)
        for each in every:
            if isinstance(each, _Trained):
                self._take(each, point)
        state.files += ranks.size()
        if too_many := [each for each in every if isinstance(each, _TooMany)]:
            self._halve_population(min(too_many))
        self._commit()
        self._tell("training")

    def _advance(self, group: list[int], point: int) -> _Trained:
        """Train some members to a step and evaluate them; their tensors are written."""
        started = time.perf_counter()
        start = self.progress[group[0]].step
        members, state = self._restored(group)
        sums = dict.fromkeys(group, 0.0)
        lost: dict[int, int] = {}
        for step in range(start, point):
            if not group:
                break
            before = time.perf_counter()
            members, state, metrics = self._stepped(members, state, group, step)
            losses, finite = metrics["loss"].tolist(), metrics["finite"].tolist()
            if not all(finite):
                kept = [k for k, fine in enumerate(finite) if fine]
                lost |= {i: step + 1 for i, fine in zip(group, finite, strict=True) if not fine}
                group, losses = [group[k] for k in kept], [losses[k] for k in kept]
                members, state = (members[kept], state[kept]) if kept else (members, state)
            for i, loss in zip(group, losses, strict=True):
                sums[i] += loss
            self._tick(len(finite), step + 1, time.perf_counter() - before)
        heldout = dict(zip(group, self.task.scores([*members]), strict=True)) if group else {}
        lost |= {i: point for i, score in heldout.items() if not math.isfinite(score.values["loss"])}
        trees = {
            i: keyed_copies({"adapters": m, "state": s})
            for i, m, s in (zip(group, members, state, strict=True) if group else ())
            if i not in lost
        }
        file = self.store.put(trees, self.store.state.files + ranks.rank()) if trees else None
        losses_ = {i: (sums[i] / (point - start), heldout[i]) for i in trees}
        return _Trained(lost, losses_, file, time.perf_counter() - started)

    def _take(self, found: _Trained, point: int) -> None:
        """Take up what came of the training of some members."""
        for i, step in found.lost.items():
            self._record(i, step, None, None, found.seconds)
        for i, (loss, score) in found.losses.items():
            is_best = self._record(i, point, loss, score, found.seconds)
            self.progress[i].file = found.file
            if is_best:
                self.progress[i].best_file = found.file

    def _stepped(self, members: Population, state: Any, group: list[int], step: int) -> tuple[Population, Any, Any]:
        """A step of some members, each with its own rows and dropout."""
        own = [self.members[i] for i in group]
        batch = self.task.batch([member.seed for member in own], step, [member.beta for member in own])
        seeds = self.task.seeds(own, step)
        with seeded(seeds[0], members[0]):  # the model's own dropout, which is drawn for all members at once
            return self.step(self.task.base.params, members, state, batch, seeds=seeds)

    def _record(self, i: int, step: int, train: float | None, heldout: Score | None, seconds: float) -> bool:
        """Take up an evaluation; whether it is the member's best one and its tensors are to be kept."""
        p, patience = self.progress[i], self.settings.patience
        p.step, p.loss = step, None if heldout is None else heldout.values["loss"]
        is_best = False
        if heldout is None or p.loss is None:
            p.status, p.file, p.best_file = NOT_FINITE, None, None
            self._note(f"member {i} dropped at step {step}: its loss is not finite")
        else:
            p.metrics = {name: value for name, value in heldout.values.items() if name not in ("loss", "perplexity")}
            is_best = p.best_loss is None or p.loss < p.best_loss
            p.waited = 0 if is_best else p.waited + 1
            if is_best:
                p.best_step, p.best_loss = step, p.loss
            if patience and p.waited >= patience and step < self.settings.steps:
                p.status = STOPPED
                self._note(f"member {i} stopped at step {step}: no improvement since step {p.best_step}")
        self.store.state.records.append({
            "member": i,
            "step": step,
            "heldout_loss": p.loss,
            "train_loss": train,
            "status": p.status,
            **self.members[i].values,
            **p.metrics,
            "seconds": round(seconds, 3),
        })  # fmt: skip
        return is_best and self.settings.keeps_best

    def _cut(self, rung: int) -> None:
        """Keep the best members at a rung. The others' tensors are kept too, since they may be saved at the end."""
        field_ = [i for i in self.ranking() if self.progress[i].status in (LIVE, STOPPED)]
        keep = math.ceil(len(field_) / self.settings.halving)
        for i in field_[keep:]:
            if self.progress[i].status == LIVE:
                self.progress[i].status = HALVED
        self.store.state.rung = rung + 1
        self._note(f"rung {rung + 1}: the best {keep} of {len(field_)} continue")
        self._commit()
        self._tell("training")

    def _commit(self) -> None:
        self.store.commit()
        ranks.meet()  # others read what was committed, and a commit removes files that it does not know

    # Values

    def _fresh(self, i: int) -> dict[str, fl.Rule]:
        return self.task.start(self.members[i]).adapters

    def _begun(self, adapters: list[dict[str, fl.Rule]], ids: list[int]) -> tuple[Population, Stack[Any]]:
        members = fl.stack(adapters)
        return members, self._optimizer(ids).init(members)

    def _optimizer(self, ids: list[int]) -> MemberTransformation:
        return per_member(self.task.optimizer(), lr=[self.members[i].lr for i in ids])

    def _restored(self, group: list[int]) -> tuple[Population, Stack[Any]]:
        files = [self.progress[i].file for i in group]
        if files[0] is None:
            return self._begun([self._fresh(i) for i in group], group)
        trees = [self._loaded(i, str(file)) for i, file in zip(group, files, strict=True)]
        return fl.stack([tree["adapters"] for tree in trees]), fl.stack([tree["state"] for tree in trees])

    def _loaded(self, i: int, file: str) -> dict[str, Any]:
        if i not in self._specs:
            members, state = self._begun([self._fresh(i)], [i])
            like: Any = {"adapters": members[0], "state": state[0]}
            leaves, spec = optree.tree_flatten(like)
            self._specs[i] = spec, [(leaf.shape, leaf.dtype) for leaf in leaves]
        (spec, kinds), stored = self._specs[i], self.store.load(i, file)
        keys = leaf_keys(spec)
        if {*keys} != {*stored} or [(stored[key].shape, stored[key].dtype) for key in keys] != kinds:
            raise FormatError(
                f"{self.store.tensors / file}: it does not hold the tensors of member {i}. Use another --out."
            )
        tree: dict[str, Any] = spec.unflatten([stored[key].to(self.task.device) for key in keys])
        return tree

    # Telling

    def _tick(self, n: int, step: int, seconds: float) -> None:
        self.status.fresh += n
        self.status.done += n
        self.status.seconds += seconds
        self.status.step = step
        self.observe(self.status)

    def _note(self, text: str) -> None:
        self.status.notes.append(text)
        self.observe(self.status)

    def _tell(self, doing: str) -> None:
        self.status.doing = doing
        self.status.ranking = self.leaderboard()
        self.status.done = sum(p.step for p in self.progress.values())
        self.status.total = self.status.done + self._planned()
        self.observe(self.status)

    def _planned(self) -> int:
        """Remaining member-steps, if no other member is dropped for a non-finite loss."""
        n, total = len(self.live), 0
        steps = [self.progress[i].step for i in self.live]
        for cut in [*self.settings.cuts(len(self.members))[self.store.state.rung :], self.settings.steps]:
            total += sum(max(0, cut - step) for step in steps)
            n = math.ceil(n / self.settings.halving) if self.settings.halving > 1 else n
            steps = [cut] * n
        return total
