"""How a run through a block can end other than with a graph."""

from __future__ import annotations

from tokenmix.blocks.op import Tensor
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake

__all__ = ["Exhausted", "Failed", "Refused"]


class Failed(Exception):
    """The block has findings; they are already noted.

    Attributes:
        outputs: what comes out all the same, where the findings leave no doubt about its shape.
    """

    def __init__(self, outputs: tuple[Tensor, ...] | None = None):
        super().__init__()
        self.outputs = outputs


class Refused(Mistake):
    """The check of an op fails.

    Attributes:
        outputs: what would come out, if its shape is beyond doubt.
    """

    def __init__(self, mistake: Mistake, call: syntax.Call, outputs: tuple[Tensor, ...] | None):
        Exception.__init__(self, str(mistake))
        self.finding = mistake.finding
        self.about = mistake.about or call
        self.outputs = outputs


class Exhausted(Exception):
    """A limit of the whole model is passed; the finding is noted and nothing more is looked at."""
