"""What Python runs in a child process: `launch.py NAME CHANNEL_FD LIFELINE_FD PARENT_PID`.

It is started by its path, so that the child can take over its parent's module search path before it imports anything.
"""

from __future__ import annotations

import os
import sys

SEARCH_PATH_VARIABLE = "LIGHTNING_CHILD_SEARCH_PATH"

if __name__ == "__main__":
    sys.path[:] = os.environ.pop(SEARCH_PATH_VARIABLE).split(os.pathsep)
    from lightning.execution.child import main

    main(*map(int, sys.argv[2:]))
