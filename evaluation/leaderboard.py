"""The leaderboard of changes: adds a row with the present numbers in results/.

    python -m evaluation.leaderboard "passes that refine, and binding"

The numbers are HyperDreamBooth's (results/tables.md defines them), with today's date and HEAD's commit.
"""
import subprocess
from datetime import date
from pathlib import Path

from program import console

from evaluation.report import OURS, read, summary
from evaluation.scores import Judged
from files.disk import write_text

COLUMNS = "both", "copied", "obeyed", "leaked"
HEAD = f"""# Leaderboard

HyperDreamBooth on nano's test people, from the first shipped hypernetwork on. results/tables.md defines the
numbers; a dash stands for one that was not measured. To beat it, change something and run

    python -m evaluation --rows {OURS} "the model itself" --out runs/mine
    python -m evaluation.leaderboard "what you changed" --out runs/mine

| date | commit | what | {' | '.join(COLUMNS)} | seconds |
|---|---|---|{'---|' * (len(COLUMNS) + 1)}
"""


def row(folder, what):
    """A line of the leaderboard. UserError without measurements of HyperDreamBooth."""
    rows = [row for row in read(folder / "scores.csv") if not row["knob"]]
    ours, base = ([row for row in rows if row["system"] == name] for name in (OURS, "the model itself"))
    if not ours:
        raise console.UserError(f"{folder / 'scores.csv'}: no {OURS} there; run python -m evaluation")
    found = summary(ours, Judged, base)
    seconds = [row["seconds"] for row in read(folder / "costs.csv") if row["system"] == OURS]
    numbers = [f"{found[name][0]:.3f}" if found[name] else "–" for name in COLUMNS]
    numbers.append(f"{seconds[0]:.1f}" if seconds else "–")
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    cells = str(date.today()), head.stdout.strip() or "–", what.replace("|", "/"), *numbers
    return f"| {' | '.join(cells)} |\n"


def main(args):
    file = args.out / "leaderboard.md"
    before = file.read_text(encoding="utf-8") if file.exists() else HEAD
    new = row(args.out, console.printable(args.what))
    write_text(before + new, file)
    print(new.strip())


def arguments():
    parser = console.Parser(__doc__)
    parser.add_argument("what", help="what was changed, in a few words")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    return parser.parse_args()


if __name__ == "__main__":
    console.run(main, arguments)
