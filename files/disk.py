"""Files as such: read if they are some, written whole or not at all."""
import errno
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from program.console import UserError

LARGEST_TEXT = 10  # megabytes, of headers too; CLIP's tokenizer.json has two


class LoadError(UserError):
    """What is wrong with a model's files and what to do about it, in one line for the user."""


@contextmanager
def refusing(what, kind=LoadError):
    """Where a file is made sense of: whatever goes wrong inside is an error of this `kind` that says `what`
    is wrong. A UserError, which says more, passes, and a full memory, which is no fault of the file."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # nobody can list what odd contents lead to
        reason = getattr(error, "strerror", None) or repr(error)
        raise kind(f"{what} ({reason})") from None


def regular(path, most=None):
    """The file at `path`, open to read bytes. OSError for none, what may never end, or over `most` MB."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    status, wrong = os.fstat(file.fileno()), None
    if not stat.S_ISREG(status.st_mode):
        wrong = errno.EINVAL, "not a file"
    elif most and status.st_size > most * 10 ** 6:
        wrong = errno.EFBIG, f"larger than {most} MB, which no such file is"
    if wrong:
        file.close()
        raise OSError(*wrong, str(path))
    return file


def read_text(path):
    """The text in a file. OSError for one that is larger than any that belongs to a model."""
    with regular(path, LARGEST_TEXT) as file:
        return file.read().decode("utf-8")


def read_json(path):
    """The dictionary in a JSON file. LoadError if there is none."""
    with refusing(f"{path}: not readable as a JSON dictionary"):
        return dict(json.loads(read_text(path)))


@contextmanager
def whole_files(*paths):
    """Temporary paths for `paths`, all of one folder, which is made, that take their places when the block
    ends, each a file or a folder: whole, all or none, and on the disk before their names are. Nobody sees
    half of one, or new ones beside old ones, where a disk is full, a program killed or power cut: at the
    worst the old ones are gone and the first new one is there."""
    paths = [Path(path) for path in paths]
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".hdb-*-*.tmp"):  # what a run that was killed has left
        pid = old.name.split("-")[1]
        if pid.isdecimal() and not alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    with TemporaryDirectory(".tmp", f".hdb-{os.getpid()}-", folder, ignore_cleanup_errors=True) as aside:
        temporary = [Path(aside, path.name) for path in paths]
        yield temporary
        for new in temporary:
            sync(new)
        for path in paths[1:]:
            path.unlink(missing_ok=True)
        for new, path in zip(temporary, paths):
            new.replace(path)
            sync(folder)


def alive(pid):
    """Whether a process of this number runs."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's
    return True


def sync(path):
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot, of folders
        os.fsync(handle)
    os.close(handle)


def write_text(text, path):
    """Write a text file, as whole_files does."""
    with whole_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
