"""training/photos.py: which files of a folder are photos, and what they are known by."""
import os

from types import SimpleNamespace

import pytest
import torch
from tiny import VIT, shared_model

import personalize
from evaluation import __main__ as program
from files import images
from methods import sitting
from program.console import UserError
from training import photos
from training.photos import content, photo_files, read_photos
from vit import ViT


def put(folder, *names):
    """A photo at each of these names in the folder."""
    for i, name in enumerate(names):
        images.save(images.to_pil(torch.full((3, 70, 70), i / 10)), folder / name)
    return folder


def names(folder):
    return [str(path.relative_to(folder)) for path in photo_files(folder)]


def test_what_programs_keep_for_themselves_is_no_photo(tmp_path):
    put(tmp_path, "b.png", "a/c.png", ".hidden.png", ".ipynb_checkpoints/b-checkpoint.png",
        ".thumbnails/x.png", "a/@eaDir/c.png", "__MACOSX/x.png", "#recycle/x.png", "$RECYCLE.BIN/x.png")
    assert names(tmp_path) == ["a/c.png", "b.png"]
    assert names(put(tmp_path / ".mine", "x.png")) == ["x.png"]  # a folder that was asked for


def test_links_to_folders_are_followed_once(tmp_path):
    put(tmp_path / "elsewhere", "x.png", "deep/y.png")
    folder = put(tmp_path / "photos", "z.png")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "again").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (tmp_path / "whole").symlink_to(folder)
    assert names(folder) == ["again/deep/y.png", "again/x.png", "z.png"]
    assert len(names(tmp_path / "whole")) == 3
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    with pytest.warns(UserWarning, match="1 of 4 files are not used; gone.png: .*No such file"):
        assert len([*read_photos(folder, 64)]) == 3


def test_a_folder_that_cannot_be_read_is_told(tmp_path, monkeypatch):
    folder = put(tmp_path / "photos", "x.png", "closed/y.png")
    walk = os.walk

    def closed(path, onerror, **options):
        onerror(PermissionError(13, "Permission denied", str(folder / "closed")))
        for where, folders, files in walk(path, onerror=onerror, **options):
            folders[:] = [name for name in folders if name != "closed"]
            yield where, folders, files
    monkeypatch.setattr(os, "walk", closed)
    with pytest.warns(UserWarning, match="not all of it can be read; .*closed: Permission denied"):
        assert names(folder) == ["x.png"]
    (folder / "x.png").unlink()
    with pytest.raises(images.ImageError, match="holds no photos; .*closed: Permission denied"):
        photo_files(folder)


def test_one_square_of_a_photo_in_training_evaluation_and_personalisation(tmp_path, monkeypatch):
    """The face's, if nothing else is asked for; and a training reads and encodes photo by photo, as its bar
    says."""
    folder, asked, model = put(tmp_path / "faces", "a.png", "b.png"), [], shared_model()

    def read(path, side, crop="center"):
        asked.append((side, crop))
        return torch.zeros(1, 3, side, side)

    def encode_face(vit, view):
        asked.append("encoded")
        return torch.zeros(1, 5, 16)
    monkeypatch.setattr(images, "read", read)
    monkeypatch.setattr(photos, "encode_face", encode_face)
    photos.Photos(folder, model, ViT(VIT), "", tmp_path / "cache")
    assert asked == 2 * [(64, "face"), "encoded", "encoded"]
    monkeypatch.setattr(program, "Paper", lambda given, *rest: given)
    args = SimpleNamespace(faces=folder, people=2, clip="", dino="")
    assert program.paper(args, model).shape == (2, 1, 3, 64, 64) and asked[6:] == 2 * [(64, "face")]
    line = ["personalize.py", str(folder / "a.png"), "[V]", "--model", "elsewhere", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", line)
    sitting.sit(personalize.arguments(), model)
    assert asked[8:] == [(64, "face")]


def test_no_training_or_evaluation_writes_among_its_photos(tmp_path, refusal):
    folder = put(tmp_path / "faces", "a.png")
    with pytest.raises(UserError, match=f"{folder}/x is inside {folder}, so its pictures would count"):
        photos.Photos(folder, shared_model(), ViT(VIT), "", folder / "x")
    options = "--model", "elsewhere", "--faces", folder, "--out", folder / "deep/x"
    assert "would count as photos" in refusal(program, *options)
    photos.check_outside(tmp_path / "faces x", folder)


def test_photos_are_known_by_what_is_in_them(tmp_path):
    """Wherever they are, and not by their size."""
    folder = put(tmp_path / "here", "a.png", "b/c.png")
    known = content(photo_files(folder))
    folder.rename(tmp_path / "there")
    assert content(photo_files(tmp_path / "there")) == known
    data = bytearray((tmp_path / "there/a.png").read_bytes())
    data[-20] ^= 1
    (tmp_path / "there/a.png").write_bytes(data)
    assert content(photo_files(tmp_path / "there")) != known
