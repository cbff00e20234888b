"""Named places at which a job can be made to die, for tests: ``SHARDKIT_FAILPOINT=copying:kill``.

``<state>`` is reached when the state has been recorded and before its effect, ``<state>.done`` after the effect and
before the next state is recorded; ``copying.chunk`` and ``cleaning.chunk`` after each committed chunk; the other names
stand where they are reached. The action is ``kill`` (SIGKILL) or ``stop`` (SIGSTOP), with ``:3`` behind it at the third
time only.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections import defaultdict

from shardkit.errors import PreconditionFailed

VARIABLE = "SHARDKIT_FAILPOINT"
_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}

_reached: defaultdict[str, itertools.count[int]] = defaultdict(lambda: itertools.count(1))


def reach(point: str) -> None:
    """Die here, if the environment says so.

    :raises PreconditionFailed: when what it says cannot be read.
    """
    wanted = os.environ.get(VARIABLE, "")
    name, _, action = wanted.partition(":")
    if name != point:
        return
    word, _, times = action.partition(":")
    if word not in _SIGNALS or not (times or "1").isdecimal():
        raise PreconditionFailed(
            f"{VARIABLE} is {wanted!r}",
            hint="write a state and an action: copying:kill, frozen:stop, copying.chunk:kill:3",
        )
    if next(_reached[point]) == int(times or "1"):
        os.kill(os.getpid(), _SIGNALS[word])
