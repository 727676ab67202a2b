"""nano's judge, as it is shipped and as it is trained."""
import pytest
import torch
from drawn import people, photos
from safetensors.torch import load_file

from program.console import UserError
from nano import faces, judge, seeds


def test_judge_knows_people_it_has_not_seen():
    network, who = judge.load_judge(), people(seeds.VALIDATION, 12)
    one = torch.cat([photos(who, style, seed=1) for style in (0, 4)])
    two = torch.cat([photos(who, style, seed=2) for style in (0, 4)])
    same, other = network.likeness(one, two), network.likeness(one, two.roll(1, 0))
    assert same.mean() > .85 and other.mean().abs() < .25
    read = network(one)
    assert (read[1].argmax(1) == torch.tensor([0, 4]).repeat_interleave(12)).float().mean() > .9
    truth = faces.attributes(who.repeat(2, 1))
    right = [(logits.argmax(1) == truth[k]).float().mean() for k, logits in read[2].items()]
    assert sum(right) / len(right) > .8


def test_likeness_of_pictures_of_other_sizes():
    network, who = judge.load_judge(), people(seeds.VALIDATION, 2)
    large = torch.nn.functional.interpolate(photos(who), scale_factor=2)
    assert torch.allclose(network.likeness(large, photos(who).half()), torch.ones(2), atol=1e-3)


def test_training_and_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(judge, "FILE", tmp_path / "judge.safetensors")

    def train(*options):
        small = ["--people", 4, "--batch", 3, "--steps", 1, "--device", "cpu", "--runs", tmp_path]
        monkeypatch.setattr("sys.argv", ["judge.py", *map(str, small), *map(str, options)])
        judge.train(judge.arguments())

    train()
    assert load_file(judge.FILE).keys() == judge.Judge().state_dict().keys()
    judge.report("cpu", people=4)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*faces.STYLES, *faces.ATTRIBUTES, "threshold"))
    with pytest.raises(UserError, match="people 4 there, 5 here"):
        train("--people", 5)
