"""What the tests of this folder tried, and what was lost: counted by kind, and printed after a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

tried: Counter[str] = Counter()
lost: Counter[str] = Counter()


@contextmanager
def trial(kind: str) -> Iterator[None]:
    """Count one hostile input, or one injected fault; it is lost where the block raises.

    Parameters
    ----------
    kind : str
        Row of the table: "interrupts", "removals", "weights", ...
    """
    tried[kind] += 1
    try:
        yield
    except BaseException:
        lost[kind] += 1
        raise


def counts() -> dict[str, dict[str, int]]:
    """Return both counters, for the process that prints."""
    return {"tried": dict(tried), "lost": dict(lost)}


def add(other: Mapping[str, Mapping[str, int]]) -> None:
    """Add another process's counts."""
    tried.update(other["tried"])
    lost.update(other["lost"])


def table() -> list[str]:
    """Return a line for each kind, and one for all."""
    rows = [(kind, n, lost[kind]) for kind, n in sorted(tried.items())]
    rows.append(("all", sum(tried.values()), sum(lost.values())))
    return [f"{kind:24}{n:8} tried{n - gone:8} survived{gone:6} lost" for kind, n, gone in rows]
