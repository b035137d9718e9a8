from __future__ import annotations

from collections import Counter

import pytest

from tests.hostile import tally


def test_a_trial_that_raises_is_lost(monkeypatch) -> None:
    monkeypatch.setattr(tally, "tried", Counter())
    monkeypatch.setattr(tally, "lost", Counter())
    for _ in range(3):
        with tally.trial("kind"):
            pass
    with pytest.raises(KeyError), tally.trial("other"):
        raise KeyError
    tally.add({"tried": {"kind": 2}, "lost": {"kind": 1}})
    assert [line.split() for line in tally.table()] == [
        ["kind", "5", "tried", "4", "survived", "1", "lost"],
        ["other", "1", "tried", "0", "survived", "1", "lost"],
        ["all", "6", "tried", "4", "survived", "2", "lost"],
    ]
