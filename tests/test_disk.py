"""files/disk.py: what is no file is not read, what is written is written whole, one run works in a folder."""
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from files import disk, images
from files.checkpoints import Tensors, write
from files.disk import LoadError, read_json, read_text, whole_files


def test_only_files_are_read_and_no_more_of_them_than_belongs_to_a_model(tmp_path):
    """A pipe, or a link to a device, would be read for ever."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    (tmp_path / "long").touch()
    os.truncate(tmp_path / "long", 10_000_001)
    (tmp_path / "right").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to(tmp_path / "right")
    for name, why in (("pipe", "not a file"), ("zeros", "not a file"), ("folder", "Is a directory"),
                      ("long", "larger than 10 MB"), ("none", "No such file")):
        with pytest.raises(LoadError, match=f"{name}: .*{why}"):
            read_json(tmp_path / name)
        with pytest.raises(OSError, match=why):
            read_text(tmp_path / name)
    for name in "pipe", "zeros":
        with pytest.raises(images.ImageError, match="not a file"):
            images.read(tmp_path / name, 64)
    assert read_json(tmp_path / "link") == {"a": 1} and read_text(tmp_path / "right") == '{"a": 1}'


def test_the_longest_names_are_written(tmp_path):
    name = "x" * (255 - len(".safetensors")) + ".safetensors"
    write({"a": torch.ones(2)}, tmp_path / name)
    disk.write_text("a", tmp_path / ("ä" * 127))
    assert {path.name for path in tmp_path.iterdir()} == {name, "ä" * 127}


@pytest.mark.parametrize("last", range(4))
def test_killed_anywhere_a_set_is_never_of_two_people(tmp_path, monkeypatch, last):
    """Killed after each of what it does to the names that others see."""
    files, done = [tmp_path / "person", tmp_path / "tuned"], []
    for path in files:
        path.write_text("old")

    class Killed(BaseException):
        pass

    def counted(method):
        def call(path, *more, **named):
            if len(done) > last:
                raise Killed
            done.append(method)
            return method(path, *more, **named)
        return call
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", counted(Path.replace))
        patch.setattr(Path, "unlink", counted(Path.unlink))
        try:
            with whole_files(*files) as new:
                for path in new:
                    path.write_text("new")
        except Killed:
            assert last < 2
    assert len({path.read_text() for path in files if path.exists()}) == 1


def test_a_folder_is_put_in_place_whole(tmp_path):
    """Where none is, or an empty one; and of one that fails nothing is left."""
    (tmp_path / "empty").mkdir()
    for name in "new", "empty":
        with whole_files(tmp_path / name) as (folder,):
            write({"a": torch.ones(2)}, folder / "deep/a.safetensors")
        assert (tmp_path / name / "deep/a.safetensors").exists()
    with pytest.raises(OSError), whole_files(tmp_path / "other") as (folder,):
        write({"a": torch.ones(2)}, folder / "a.safetensors")
        raise OSError
    assert {path.name for path in tmp_path.iterdir()} == {"new", "empty"}


def test_all_is_on_the_disk_before_a_name_is_taken(tmp_path, monkeypatch):
    """After a power cut no name stands for half a file: the contents are flushed first, then each rename."""
    done, rename = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.fstat(handle).st_ino))
    monkeypatch.setattr(Path, "replace", lambda new, path: done.append(path.name) or rename(new, path))
    with whole_files(tmp_path / "a", tmp_path / "b") as temporary:
        for new in temporary:
            new.write_text("new")
    a, b, folder = ((tmp_path / name).stat().st_ino for name in ("a", "b", "."))
    assert done == [a, b, "a", folder, "b", folder]


def test_the_same_tensors_are_the_same_bytes(tmp_path):
    """And safetensors reads them, of every dtype and shape."""
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(5).half(), "none": torch.zeros(0, 3),
               "one": torch.ones(()), "c": torch.randn(4).bfloat16(), "d": torch.arange(3),
               "t": torch.randn(2, 3).T, "e": torch.tensor([True]), "u": torch.arange(3, dtype=torch.uint8)}
    note = {"z": "1", "ä": "naïve — \U0001f600", "m": "\udcff"}
    write(tensors, tmp_path / "x", note)
    write(dict(reversed(tensors.items())), tmp_path / "y", dict(reversed(note.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    found = load_file(tmp_path / "x")
    assert found.keys() == tensors.keys()
    assert all(found[key].dtype == t.dtype and torch.equal(found[key], t) for key, t in tensors.items())
    assert Tensors(tmp_path / "x").note == note | {"m": "?"}


def test_another_file_in_a_files_place_changes_nothing(tmp_path):
    """What was checked is what is read; where the file itself changes, a line says so."""
    save_file({"a": torch.ones(1000)}, tmp_path / "x")
    file = Tensors(tmp_path / "x")
    save_file({"b": torch.zeros(3)}, tmp_path / "y")
    os.replace(tmp_path / "y", tmp_path / "x")
    assert torch.equal(file["a"], torch.ones(1000)) and torch.equal(file.row("a", 3), torch.ones(1))
    file = Tensors(tmp_path / "x")
    os.truncate(tmp_path / "x", 20)
    for read in (lambda: file["b"]), (lambda: file.row("b", 0)), (lambda: file["c"]):
        with pytest.raises(LoadError, match="x: damaged"):
            read()
