"""The tour, in its fast mode: every step runs, its assertions hold, and the page shows what it says."""
import runpy
import sys

from files.layouts import HERE


def test_every_step_runs_and_is_on_the_page(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tour.py", "fast"])
    runpy.run_path(str(HERE / "tour.py"))
    page = (tmp_path / "out/tour.md").read_text(encoding="utf-8")
    for number in range(1, 10):
        assert f"## {number}. " in page and f"(tour/{number}.png)" in page
        assert (tmp_path / f"out/tour/{number}.png").stat().st_size > 1000
    assert "385,344" in page and "28,800" in page
