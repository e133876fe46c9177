"""How long the intervals of metrics of classes take: 10,000 resamples of 100,000 rows.

python tests/benchmarks/intervals.py
"""

import time

import numpy as np

from manualloop.evaluation.resampling import bootstrap
from manualloop.evaluation.weighted import BY_KEY, Entries, group_rows

NUM_ROWS, NUM_RESAMPLES = 100_000, 10_000
KEYS = ("accuracy", "f1_macro", "matthews_correlation")


def seconds(num_classes: int) -> tuple[int, float]:
    """Return the number of distinct rows, and the seconds of CPU time."""
    generator = np.random.default_rng(0)
    references = generator.integers(0, num_classes, NUM_ROWS)
    others = generator.integers(0, num_classes, NUM_ROWS)
    predictions = np.where(generator.random(NUM_ROWS) < 0.8, references, others)
    start = time.process_time()
    places, counts = group_rows(predictions, references)
    rows = np.arange(len(places))
    entries = Entries(predictions[places], references[places], rows, len(rows))
    scores = {key: BY_KEY[key](entries) for key in KEYS}
    bootstrap(
        lambda weights: {key: score(weights) for key, score in scores.items()},
        counts,
        num_resamples=NUM_RESAMPLES,
    )
    return len(counts), time.process_time() - start


if __name__ == "__main__":
    seconds(2)  # loads SciPy
    for num_classes in (2, 3, 20, 77):
        num_groups, taken = seconds(num_classes)
        print(f"{num_classes} classes, {num_groups} distinct rows: {taken:.2f} s")
