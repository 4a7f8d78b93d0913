"""torch.compile, so that each contender is really compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """For the shapes of one case. Forgets those before: past eight, torch would run the function uncompiled."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
