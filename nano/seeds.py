"""Whose seeds are whose: nobody who is measured is trained on. No number here is spelt anywhere else.

Training number --seed (0 to SEEDS) draws the people of its step n (below STEPS) with seed(--seed, n, PART).
The PARTs, and the single seeds below, are far enough apart never to meet.
"""
SEEDS = 8
STEPS = 1_000_000

# Trainings
PRETRAINING = 0          # the autoencoder, the text encoder, the UNet; the order of the judge's people
ENCODER = 200_000_000
HYPERNET = 400_000_000
POOL = 500_000_000       # the people that trainings draw from, by row()
JUDGE = 777_000_000      # + --seed: the judge's people
READER = 800_000_000     # the reader's drawings, and its steps
INSTRUMENT = 850_000_000  # what its coarse reading is fitted on

# People whom no training sees, from here on one after the other
EXAMPLE = 10_000_004     # example.png
VALIDATION = 20_000_000  # tests, and whatever a choice is made by
MONITOR = 30_000_000     # watched while something is trained
TEST = 40_000_000        # evaluate.py's alone


ROWS = 10_000_000


def row(training, n):
    """The seed of person n of a training's pool; after ten million they begin again."""
    return POOL + training * ROWS + n % ROWS


def seed(training, step, part=PRETRAINING):
    """The seed of one step of one part's training."""
    return part + training * 1_000_003 + step
