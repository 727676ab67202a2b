"""Read regular files only, and write files whole or not at all."""
import errno
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from program.console import UserError

LARGEST_TEXT = 10  # megabytes of a text or a safetensors header; CLIP's tokenizer.json has two


class LoadError(UserError):
    """What is wrong with a model's files and what to do about it, in one line for the user."""


@contextmanager
def refusing(what, kind=LoadError):
    """Turn exceptions inside into an error of this `kind` that says `what` and the reason. A UserError
    passes, because it says more, and so does a MemoryError, which is not the file's fault."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # malformed contents can raise anything
        reason = getattr(error, "strerror", None) or repr(error)
        raise kind(f"{what} ({reason})") from None


def regular(path, most=None):
    """Open a file to read bytes. OSError if it is missing, a pipe or device, or larger than `most` MB."""
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
    """The text in a file. OSError for one that is larger than LARGEST_TEXT."""
    with regular(path, LARGEST_TEXT) as file:
        return file.read().decode("utf-8")


def read_json(path):
    """The dictionary in a JSON file. LoadError if it holds none."""
    with refusing(f"{path}: not readable as a JSON dictionary"):
        return dict(json.loads(read_text(path)))


@contextmanager
def whole_files(*paths):
    """Give temporary paths for `paths`, files or folders in one folder, which is created. After the block
    they are flushed to the disk and take their final names. If the block fails, nothing changes.

    After a crash or a full disk no file is half written, and new files never stand beside old ones: at worst,
    the old files are gone and only the first new one exists."""
    paths = [Path(path) for path in paths]
    folder = paths[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(".hdb-*-*.tmp"):  # left by a run that was killed
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
    """Whether a process with this id is running."""
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)  # another user's process
    return True


def sync(path):
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    with suppress(OSError):  # some file systems cannot flush a folder
        os.fsync(handle)
    os.close(handle)


def write_text(text, path):
    """Write a text file by whole_files."""
    with whole_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
