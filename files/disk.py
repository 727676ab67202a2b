"""Files as such: read if they are some, written whole or not at all."""
import errno
import itertools
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

from program.console import UserError

LARGEST_TEXT = 10  # megabytes, of headers too; CLIP's tokenizer.json has two
NUMBERS = itertools.count()  # of temporary files


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
    """The file at `path`, open to read bytes. OSError where there is none, or something that might never end
    (a pipe, a device), or more than `most` megabytes."""
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
    """Temporary paths beside `paths`, whose folders are made, that take their places when the block ends,
    each a file or a folder: whole, all or none, and on the disk before their names are. Nobody sees half of
    one, or new ones beside old ones, where a disk is full, a program killed or power cut: at the worst the
    old ones are gone and the first new one is there."""
    paths = [Path(path) for path in paths]
    temporary = [path.with_name(f".hdb-{os.getpid()}-{next(NUMBERS)}.tmp") for path in paths]
    try:
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            for old in path.parent.glob(".hdb-*-*.tmp"):  # what a run that was killed has left
                pid = old.name.split("-")[1]
                if pid.isdecimal() and not alive(int(pid)):
                    remove(old)
        yield temporary
        for new in temporary:
            sync(new)
        for path in paths[1:]:
            path.unlink(missing_ok=True)
        for new, path in zip(temporary, paths):
            new.replace(path)
            sync(path.parent)
    finally:
        for new in temporary:
            remove(new)


def remove(path):
    """Whatever is at `path` goes, as far as that is possible."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


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
