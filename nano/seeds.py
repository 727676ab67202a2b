"""All seeds: no training sees the people that we measure. These numbers stand in this file alone.

Training number --seed (0 to SEEDS) draws the people of its step n (below STEPS) with seed(--seed, n, PART).
The PARTs, and the single seeds below, are far enough apart never to meet.
"""
SEEDS = 8
STEPS = 1_000_000

# Trainings
PRETRAINING = 0          # autoencoder, text encoder, UNet; the order of the judge's people
ENCODER = 200_000_000
HYPERNET = 400_000_000
POOL = 500_000_000       # people that trainings draw from, by row()
JUDGE = 777_000_000      # + --seed: the judge's people
READER = 800_000_000     # the reader's drawings, and its steps
INSTRUMENT = 850_000_000  # drawings that fit the instrument's coarse reading

# People whom no training sees, from each number upwards
EXAMPLE = 10_000_004     # example.png
VALIDATION = 20_000_000  # for tests and choices
MONITOR = 30_000_000     # measured during trainings
TEST = 40_000_000        # for evaluation/ alone


ROWS = 10_000_000


def row(training, n):
    """The seed of person n of a training's pool; after ten million it starts again."""
    return POOL + training * ROWS + n % ROWS


def seed(training, step, part=PRETRAINING):
    """The seed of one step of a part's training."""
    return part + training * 1_000_003 + step
