"""How entries of lists match the full names of modules and parameters, as in PEFT."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Set


def endings(name: str) -> Iterator[str]:
    """The full name, and the part after each dot.

    Examples:
        >>> list(endings("layers.0.q_proj"))
        ['layers.0.q_proj', '0.q_proj', 'q_proj']
    """
    yield name
    at = name.find(".")
    while at >= 0:
        yield name[at + 1 :]
        at = name.find(".", at + 1)


def named(name: str, entry: str) -> bool:
    """Whether an entry of a list is the full name, or its last components."""
    return name == entry or name.endswith(f".{entry}")


def named_among(name: str, entries: Set[str]) -> bool:
    """Whether one of the entries names it. The time depends on the length of the name, not on the number of entries."""
    return any(ending in entries for ending in endings(name))


def unnamed(entries: Collection[str], names: Iterable[str]) -> list[str]:
    """The entries that match none of the names."""
    wanted = frozenset(entries)
    found = {ending for name in names for ending in endings(name) if ending in wanted}
    return [entry for entry in entries if entry not in found]


def inside(name: str, module: str) -> bool:
    """Whether a module or parameter is the given module, or inside it."""
    return name == module or name.startswith(f"{module}.")


def suffixes(names: Iterable[str]) -> list[str]:
    """Last components first, then full names: candidates for what the user meant."""
    listed = [n for n in names if n]
    return [*dict.fromkeys(n.rpartition(".")[2] for n in listed), *listed]
