"""What a pruned model leaves behind: methods that are not copied, and prompts that follow their cache."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prismprune import InvalidOptionError
from prismprune.pruning import _Prompts, _Replaced


def test_a_method_of_a_pruned_model_is_not_copied_or_pickled() -> None:
    """A copy of the model would call the original."""
    replaced = _Replaced(SimpleNamespace(), len, len)  # type: ignore[arg-type]
    with pytest.raises(InvalidOptionError, match="copied"):
        copy.deepcopy(replaced)
    with pytest.raises(InvalidOptionError, match="pickled"):
        replaced.__reduce__()


def test_rows_of_prompts_follow_their_cache() -> None:
    """Two of each of two prompts, reordered: what is known of them is of the same rows."""
    asked, mask = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0, 1], [1, 1]])
    prompts: Any = _Prompts(asked, mask, torch.tensor([5, 6])).of_rows(torch.tensor([3, 0]), 4)
    assert prompts.asked.tolist() == [[3, 4], [1, 2]]
    assert prompts.mask.tolist() == [[1, 1], [0, 1]]
    assert prompts.following.tolist() == [6, 5]
