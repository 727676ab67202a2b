"""The tour, in its fast mode: every step runs, its assertions hold, and the page shows what it says."""
import tour


def test_every_step_runs_and_is_on_the_page(tmp_path):
    tour.main(tmp_path, fast=True)
    page = (tmp_path / "tour.md").read_text(encoding="utf-8")
    for number in range(1, 10):
        assert f"## {number}. " in page and f"(tour/{number}.png)" in page
        assert (tmp_path / f"tour/{number}.png").stat().st_size > 1000
    assert "385,344" in page and "28,800" in page
