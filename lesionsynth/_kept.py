"""A property that is computed once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property as kept
else:

    class kept:
        """`functools.cached_property` as Python 3.12 has it: without a lock.

        That of Python 3.11 is one for all instances: threads that ask different pairs wait for each other,
        and a process that is forked meanwhile waits for ever.
        """

        def __init__(self, function: Any) -> None:
            self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            """Compute it, unless another thread has; later the instance's own attribute is found first."""
            if instance is None:
                return self
            return instance.__dict__.setdefault(self.name, self.function(instance))


__all__ = ["kept"]
