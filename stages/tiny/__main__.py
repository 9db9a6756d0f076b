"""Makes or checks the bundled model, or makes a larger one.

python -m stages.tiny --out data/tiny      about 20 minutes on 2 cores; measures it too
python -m stages.tiny --check data/tiny    about a minute; exit 1 when a bar is missed
python -m stages.tiny --size mid --out F   57 million parameters, two minutes on a GPU; the bundled model's tokenizer
"""

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path

TEXTS = 4000  # completions that the tokenizer is trained on
BUNDLED = Path(__file__).parents[2] / "data" / "tiny"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.tiny", description="Makes or checks the bundled model.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, metavar="FOLDER", help="make the model: about 20 minutes on 2 cores")
    what.add_argument(
        "--check", type=Path, metavar="FOLDER", help="measure a model that was made; exit 1 when it misses a bar"
    )
    parser.add_argument("--size", choices=("tiny", "mid"), default="tiny", help="which model to make (tiny)")
    parser.add_argument("--device", metavar="NAME", help="where to make it (cpu for tiny, cuda for mid)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps instead of the size's own")
    parser.add_argument("--rows", type=int, metavar="N", help="completions of 2048 in a step instead of the size's own")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="S", help="as few steps as fit into S seconds")
    arguments = parser.parse_args()
    import torch

    torch.set_num_threads(2)
    if arguments.out is not None:
        make(
            arguments.out,
            arguments.size,
            device=arguments.device,
            steps=arguments.steps,
            game_rows=arguments.rows,
            seconds=arguments.seconds,
        )
        if arguments.size != "tiny":
            return 0  # the bars are the bundled model's
    folder = arguments.out or arguments.check
    from stages.tiny import check

    rows = check.verdicts(check.measure(folder))
    print(check.table(rows))
    return 0 if all(row.met for row in rows) else 1


def make(folder: Path, size: str, **changes: str | float | None) -> None:
    """Trains the model, and the tokenizer of the bundled one, and writes the checkpoint into folder.

    changes: of the size's Settings; None leaves what is there.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    from stages.tiny import corpus, layout, tokenizer, warm_start

    started = time.monotonic()
    warm_start.keep_memory()
    vocabulary: PreTrainedTokenizerBase
    if size == "tiny":
        vocabulary = tokenizer.build(corpus.tokenizer_texts(random.Random(0), count=TEXTS))
    else:
        vocabulary = AutoTokenizer.from_pretrained(BUNDLED)
    given = {name: value for name, value in changes.items() if value is not None}
    settings = dataclasses.replace(warm_start.SETTINGS[size], **given)  # type: ignore[arg-type]
    if settings.steps < settings.grid_steps:
        settings = dataclasses.replace(settings, grid_steps=settings.steps // 2)
    model = warm_start.train(layout.config(vocabulary, size), vocabulary, settings)
    layout.write(model, vocabulary, folder)
    print(f"wrote {folder} after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
