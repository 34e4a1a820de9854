"""Modules of transformers that compute in another way on a CPU, and whether somebody would notice."""

from __future__ import annotations

from functools import cache
from itertools import repeat
from operator import contains, itemgetter
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

if TYPE_CHECKING:
    from collections.abc import Iterable

OF_THIS_PROCESS = {"attention", "copies", "epsilon", "fused", "last", "place", "rotation", "stack"}
"""Attributes of changed modules that are neither copied nor pickled."""


class Changed(nn.Module):
    """A transformers module with another `forward`. Copies and pickles are transformers' own."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        state = {name: value for name, value in self.__dict__.items() if name not in OF_THIS_PROCESS}
        return _blank, (type(self).__bases__[1],), state


def _blank(original: type[nn.Module]) -> nn.Module:
    return original.__new__(original)


@cache
def changed_class(original: Any, change: Any) -> Any:
    """The class of an `original` with the `change`, a `Changed`; it has the original's name."""
    return type(original.__name__, (change, original), {})


def called_otherwise(module: nn.Module) -> bool:
    """Whether a call of it is more than its class's `forward`: it has hooks, or a `forward` of its own."""
    hooks = module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001 (no public name)
    return bool(hooks) or "forward" in module.__dict__


_parts, _training = itemgetter("_modules"), itemgetter("training")


class Untouched:
    """Modules, and whether they are as they were: none watched, trained, or in the place of another.

    Nor is any added or taken away, or has a `forward` of its own. A decoding step asks this of hundreds,
    which are in no cache by then: no loop here is one of Python's.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = list(modules)
        self._own = [module.__dict__ for module in every]
        self._parents = [own for own in self._own if own["_modules"]]
        self._places = [dict(parts) for parts in map(_parts, self._parents)]
        self._hooks = [
            hooks
            for module in every
            for hooks in (module._forward_hooks, module._forward_pre_hooks)  # noqa: SLF001
        ]

    def __bool__(self) -> bool:
        return not (
            _has_any_global_hook()
            or any(self._hooks)
            or any(map(contains, self._own, repeat("forward")))
            or [*map(_parts, self._parents)] != self._places
            or any(map(_training, self._parents))
        )
