"""How a run ends, as seen by what started it. Imports no torch.

Every launcher hands a rank's code on: `deepspeed` that of the first rank it finds ended.
"""

from __future__ import annotations

USER_ERROR = 2  # a setting, a file: the same again until somebody mends it
PREEMPTED = 75  # EX_TEMPFAIL: asked to stop; a checkpoint is there, the same command goes on
HUNG = 76  # no progress: stacks are in run.dir/hang
DIVERGED = 77  # the loss guard left out too many steps in a row: the same again
PEER_LOST = 78  # another rank or the launcher died


class EndsRun(Exception):
    """Ends every rank alike, at the same step, with a code of its own and one line.

    Args:
        code: of the process.
        line: what to say.
    """

    def __init__(self, code: int, line: str) -> None:
        super().__init__(line)
        self.code = code
