"""Allow one run at a time in a folder: two would overwrite each other's state, scores or person."""
import fcntl
import os
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from program.console import UserError

HELD: set[Path] = set()  # folders that this process has locked


def alone(main, folder):
    """main(args) as a function that locks folder(args) while it runs."""
    def run(args):
        with locked(folder(args)):
            main(args)
    return run


@contextmanager
def locked(folder):
    """Lock `folder`, which is created and, if it stays empty, removed; UserError if another run locked it. A
    lock ends with its process. Of torchrun's processes, the first locks for all."""
    folder, followers = Path(folder), dist.is_torchelastic_launched() and os.environ["RANK"] != "0"
    key = os.path.realpath(folder)
    if followers or key in HELD:
        yield
        return

    # The lock is on the folder itself
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another run is at work there; wait until it ends, or give another "
                            "folder") from None
        except OSError:  # a file system without locks
            pass
        HELD.add(key)
        yield
    finally:
        HELD.discard(key)
        os.close(handle)
        for path in made:
            with suppress(OSError):  # not empty
                path.rmdir()
