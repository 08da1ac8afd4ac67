"""What every way to make training faster can do: be switched on, work around the batches, and leave the model as it was."""

import contextlib
from collections.abc import Callable
from typing import Any

from torch import nn

from finetune.compat import replace_attribute


class Switch:
    """One way in one run. Only what a way needs is overridden; evaluation and generation never use it."""

    def __init__(self) -> None:
        self.is_on = False
        self._undo = contextlib.ExitStack()

    def find_obstacle(self) -> str | None:
        """Return why the way changes nothing in this run, or None."""
        return None

    def change(self, undo: contextlib.ExitStack) -> None:
        """Change what training computes with; `undo` is given what changes it back."""
        raise NotImplementedError

    def switch_on(self) -> None:
        """Let training use the way from now on."""
        self.change(self._undo)
        self.is_on = True

    def switch_off(self) -> None:
        """Let training do without it again, also where switching it on has failed halfway; a way that is off stays off."""
        self.is_on = False
        self._undo.close()

    def around_batch(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a batch runs forward and backward."""
        return contextlib.nullcontext()

    def follow_optimizer(self) -> None:
        """Follow what a step of the optimizer has changed."""


def replace_in_training(
    stack: contextlib.ExitStack, module: nn.Module, forward: Callable[..., Any], plain: Callable[..., Any]
) -> None:
    """Let a module compute by `forward` while it trains and by `plain` otherwise, until the stack is closed."""

    def run(*arguments: Any, **values: Any) -> Any:
        return (forward if module.training else plain)(*arguments, **values)

    stack.enter_context(replace_attribute(module, "forward", run))
