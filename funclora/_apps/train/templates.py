"""Chat templates, which come with a model's folder: rendered as transformers renders them, within a budget.

jinja2's sandbox keeps a template away from Python. It does not keep one from going on without end, or from making a
text that fills the memory. Here every turn of a loop, every call and every value that grows is counted: a budget, not a
clock, so that what is refused on one machine is refused on all.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import re
import threading
from collections.abc import Callable, Iterator, Sequence, Sized
from contextvars import ContextVar
from typing import Any

from funclora.errors import UnsupportedError

STEPS = 3_000_000  # turns of loops, calls and filters of one rendering
SIZE = 10_000_000  # characters of a value, and of all that is put out
LONGEST = 1 << 18  # characters of a template: those of real models have some 20,000
BITS = 10_000  # of a number

# The methods and filters whose result can be as long as the product of what they are given.
_MULTIPLY = {
    "batch", "center", "expandtabs", "format", "format_map", "indent", "join", "ljust", "replace", "rjust", "round",
    "slice", "to_bytes", "tojson", "translate", "urlize", "xmlattr", "zfill",
}  # fmt: skip
# Widths and precisions in a format: %9d, %(name).9f, {:>9}.
_WIDTHS = re.compile(r"[%:.<>=^)][-+ #0]*(\d+)")


class TooMuchError(Exception):
    """A template takes more than its budget."""


class _Budget:
    """What one rendering may take."""

    def __init__(self) -> None:
        self.steps, self.text, self.used = STEPS, SIZE, False

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise TooMuchError(f"it takes more than {STEPS:,} steps")

    def emit(self, size: int) -> None:
        self.text -= size
        if self.text < 0:
            raise TooMuchError(f"it makes more than {SIZE:,} characters")

    def weigh(self, value: Any) -> int:
        """The characters of a value as a text, or somewhat more."""
        size, seen, todo = 0, 0, [] if isinstance(value, str) else [value]
        if isinstance(value, str):
            size = self._within(len(value))
            self.spend(size // 1024)
        while todo:
            item = todo.pop()
            seen += 1
            if isinstance(item, str | bytes):
                size += len(item) + 4
            elif isinstance(item, dict):
                todo += [*item, *item.values()]
                size += 4
            elif isinstance(item, list | tuple | set | frozenset):
                todo += item
                size += 4
            elif isinstance(item, int):
                size += 8 + item.bit_length() // 3
            else:
                many = len(item) if isinstance(item, Sized) else 0  # of a range, or the items of a map
                size += 8 * (1 + many)
                seen += many // 8
            self._within(size)
        self.spend(seen // 16)
        return size

    @staticmethod
    def _within(size: int) -> int:
        if size > SIZE:
            raise TooMuchError(f"it makes a value of more than {SIZE:,} characters")
        return size

    def read(self, value: Any) -> None:
        """Count that a value is gone through, but not what is in its parts."""
        self.spend(1 + (len(value) // (1024 if isinstance(value, str) else 128) if isinstance(value, Sized) else 0))

    def multiply(self, name: str, own: Any, others: Sequence[Any]) -> None:
        """See that what a method or filter makes of its values is not too large."""
        if name not in _MULTIPLY:
            self.read(own)
            return
        size = max(1, self.weigh(own))
        if name.startswith("format") and isinstance(own, str):
            _check_widths(own)
            others = [part for other in others for part in (other.values() if isinstance(other, dict) else [other])]
        factors = [abs(other) if isinstance(other, int) else self.weigh(other) for other in others]
        if name == "replace" and len(factors) >= 2:
            factors = [factors[1] // max(1, factors[0]), *factors[2:]]
        if size * max(factors, default=1) > 10 * SIZE:
            raise TooMuchError(f"{name} makes a value of more than {SIZE:,} characters")

    def made(self, value: Any) -> Any:
        """The value, within its size; one that is made item by item is counted as it goes."""
        if inspect.isgenerator(value):
            return self._counted(value)
        self.weigh(value)
        return value

    def _counted(self, items: Iterator[Any]) -> Iterator[Any]:
        for item in items:
            self.spend(1)
            self.emit(self.weigh(item))
            yield item


_budget: ContextVar[_Budget | None] = ContextVar("funclora._apps.train.templates.budget", default=None)
_lock = threading.RLock()


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """In the block, transformers renders one chat template, within a budget.

    Raises:
        TooMuchError: the template takes more, raised by transformers' call.
        UnsupportedError: this version of transformers renders in another way, so nothing bounds it.
    """
    import transformers
    from transformers.utils import chat_template_utils as theirs

    unknown = UnsupportedError(
        f"data: how transformers {transformers.__version__} renders chat templates is not known, so that nothing would "
        "bound what they take. Use another version."
    )
    if not hasattr(theirs, "_compile_jinja_template"):
        raise unknown
    budget = _Budget()
    with _lock:  # other threads would get the same texts, without a budget
        compiled = theirs._compile_jinja_template
        theirs._compile_jinja_template = functools.partial(_compile, compiled)
        token = _budget.set(budget)
        try:
            yield
        finally:
            _budget.reset(token)
            theirs._compile_jinja_template = compiled
    if not budget.used:
        raise unknown


def _compile(compiled: Callable[[str], Any], source: str) -> Any:
    """A template in an environment like transformers' own, with budget."""
    budget = _budget.get()
    if budget is not None:
        budget.used = True
    if len(source) > LONGEST:
        raise TooMuchError(f"it has {len(source):,} characters, of {LONGEST:,} at most")
    return _compiled(compiled, source)


@functools.lru_cache(maxsize=4)
def _compiled(compiled: Callable[[str], Any], source: str) -> Any:
    theirs = compiled("").environment  # not of the source, whose constants would be computed without a budget
    own = _bounded_class()(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
        finalize=_finalize,
    )
    for ours, kept in ((own.filters, theirs.filters), (own.tests, theirs.tests)):
        ours.update({name: _guarded(name, function) for name, function in kept.items()})
    own.filters.update({_TURN: _turn(), _WEIGH: _weighed()})
    own.globals.update(theirs.globals)
    del own.globals["lipsum"]  # as many words as it is asked for
    return own.from_string(source)


_TURN, _WEIGH = "a turn of a loop", "a value that is looked through"


def _turn() -> Callable[..., bool]:
    import jinja2

    @jinja2.pass_context  # else it is computed once, when the template is compiled
    def turn(_context: Any, size: int) -> bool:
        budget = _budget.get()
        if budget is not None:
            budget.spend(1)
            budget.emit(size)
        return True

    return turn


def _weighed() -> Callable[..., Any]:
    import jinja2

    @jinja2.pass_context
    def weighed(_context: Any, value: Any) -> Any:
        budget = _budget.get()
        if budget is not None:
            budget.weigh(value)
        return value

    return weighed


def _finalize(value: Any) -> Any:
    """What is put out, as a text."""
    budget = _budget.get()
    if budget is None:
        return value
    if not isinstance(value, str):
        budget.weigh(value)
        value = str(value)
    budget.emit(len(value))
    return value


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter or test within the budget."""
    first = 1 if getattr(function, "jinja_pass_arg", None) is not None else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        if budget is None or len(args) <= first:
            return function(*args, **kwargs)
        budget.multiply(name, args[first], [*args[first + 1 :], *kwargs.values()])
        return budget.made(function(*args, **kwargs))

    return guarded


@functools.cache
def _bounded_class() -> Any:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    def filtered(node: Any, name: str) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)

    def turn(node: Any, size: int) -> Any:
        return nodes.ExprStmt(filtered(nodes.Const(size, lineno=node.lineno), _TURN), lineno=node.lineno)

    class Counting(NodeTransformer):
        """Puts a step into every loop, macro and output, and looks at what grows, or is compared, without a call.

        Its methods have the names of jinja2's nodes.
        """

        def visit_For(self, node: Any) -> Any:  # noqa: N802
            if node.test is not None:
                node.test = nodes.And(turn(node, 0).node, node.test, lineno=node.lineno)
            return self._body(node)

        def _body(self, node: Any) -> Any:
            self.generic_visit(node)
            node.body.insert(0, turn(node, 0))
            return node

        visit_Macro = visit_CallBlock = _body  # noqa: N815

        def visit_Output(self, node: Any) -> Any:  # noqa: N802
            size = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            size += sum(len(str(const.value)) for const in node.find_all(nodes.Const))
            self.generic_visit(node)
            return [turn(node, size), node]

        def visit_Compare(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            node.expr = filtered(node.expr, _WEIGH)
            for operand in node.ops:
                operand.expr = filtered(operand.expr, _WEIGH)
            return node

        def visit_Concat(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            joined, *rest = (filtered(part, _WEIGH) for part in node.nodes)
            for part in rest:
                joined = filtered(nodes.Concat([joined, part], lineno=node.lineno), _WEIGH)
            return joined

        def visit_List(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            return node if getattr(node, "ctx", "load") != "load" else filtered(node, _WEIGH)

        visit_Tuple = visit_Dict = visit_List  # noqa: N815

        def visit_Getitem(self, node: Any) -> Any:  # noqa: N802
            self.generic_visit(node)
            if isinstance(node.arg, nodes.Slice):
                node.node = filtered(node.node, _WEIGH)
            return node

    class Bounded(ImmutableSandboxedEnvironment):
        """transformers' environment with a budget."""

        intercepted_binops = frozenset(["*", "**", "+", "-", "%", "/", "//"])

        def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
            return Counting().visit(super()._parse(source, name, filename))

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            budget = _budget.get()
            if budget is None:
                return super().call(context, function, *args, **kwargs)
            budget.spend(1)
            name = getattr(function, "__name__", "")
            own = getattr(inspect.unwrap(function) if callable(function) else function, "__self__", None)
            if isinstance(own, str | bytes | int | float | list | tuple | dict):
                budget.multiply(name, own, [*args, *kwargs.values()])
            elif any(
                own is extension for extension in self.extensions.values()
            ):  # it looks at all that was put out before
                budget.spend((SIZE - budget.text) // 1024)
            return budget.made(super().call(context, function, *args, **kwargs))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            budget = _budget.get()
            if budget is not None:
                budget.spend(1)
                self._check(budget, operator, left, right)
            return super().call_binop(context, operator, left, right)

        @staticmethod
        def _check(budget: _Budget, operator: str, left: Any, right: Any) -> None:
            if isinstance(left, int) and isinstance(right, int):
                a, b = left.bit_length(), right.bit_length()
                bits = {"*": a + b, "**": a * max(0, right)}.get(operator, max(a, b))
                if bits > BITS:
                    raise TooMuchError(f"it makes a number of more than {BITS:,} bits")
            elif operator == "+":
                if budget.weigh(left) + budget.weigh(right) > SIZE:
                    raise TooMuchError(f"it makes a value of more than {SIZE:,} characters")
            elif operator == "*":
                size, times = (left, right) if isinstance(right, int) else (right, left)
                if isinstance(times, int) and budget.weigh(size) * times > SIZE:
                    raise TooMuchError(f"it makes a value of more than {SIZE:,} characters")
            elif operator == "%" and isinstance(left, str):
                budget.multiply("format", left, right if isinstance(right, tuple) else [right])

    return Bounded


def _check_widths(text: str) -> None:
    """Refuse a format whose fields are wider than any text."""
    widths = _WIDTHS.findall(text)
    if any(len(width) > len(str(SIZE)) for width in widths) or sum(map(int, widths)) > SIZE:
        raise TooMuchError(f"it makes a value of more than {SIZE:,} characters")
