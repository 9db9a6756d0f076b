"""Makes or checks the bundled model.

python -m stages.tiny --out data/tiny      about 20 minutes on 2 cores; measures it too
python -m stages.tiny --check data/tiny    about a minute; exit 1 when a bar is missed
"""

import argparse
import random
import sys
import time
from pathlib import Path

TEXTS = 4000  # completions that the tokenizer is trained on


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.tiny", description="Makes or checks the bundled model.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FOLDER", help="make the model: about 20 minutes on 2 cores")
    what.add_argument(
        "--check", type=Path, metavar="FOLDER", help="measure a model that was made; exit 1 when it misses a bar"
    )
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(2)
    if arguments.out is not None:
        make(arguments.out)
    folder = arguments.out or arguments.check
    from stages.tiny import check

    rows = check.verdicts(check.measure(folder))
    print(check.table(rows))
    return 0 if all(row.met for row in rows) else 1


def make(folder: Path) -> None:
    """Trains tokenizer and model and writes the checkpoint into folder."""
    from stages.tiny import corpus, layout, tokenizer, warm_start

    started = time.monotonic()
    warm_start.keep_memory()
    vocabulary = tokenizer.build(corpus.tokenizer_texts(random.Random(0), count=TEXTS))
    model = warm_start.train(layout.config(vocabulary), vocabulary, warm_start.Settings())
    layout.write(model, vocabulary, folder)
    print(f"wrote {folder} after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
