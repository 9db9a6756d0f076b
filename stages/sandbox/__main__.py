"""python -m stages.sandbox image: makes the sandbox image. The attacks are `flexsink self-check sandbox`."""

import argparse
import sys

from stages.config import UserError
from stages.sandbox.image import BASE, build, connect, has_image, image_name, obtain_base


def make_image(options: argparse.Namespace) -> int:
    """Builds the image unless it is there."""
    client = connect(timeout=60)
    name = image_name()
    if has_image(client, name):
        print(f"sandbox image {name} is there")
    elif options.check:
        return 1
    else:
        base = options.base or obtain_base(client)
        print(f"sandbox image {build(client, base)} built on {base}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.sandbox", description=__doc__)
    commands = parser.add_subparsers(required=True)
    image = commands.add_parser("image", help="build the sandbox image unless it is there")
    image.add_argument("--check", action="store_true", help="only say whether it is there (exit status 1 when not)")
    image.add_argument("--base", help=f"base image (default: {BASE})")
    image.set_defaults(run=make_image)
    options = parser.parse_args()
    try:
        status: int = options.run(options)
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
