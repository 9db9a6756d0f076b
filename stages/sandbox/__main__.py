"""python -m stages.sandbox image | self-check: makes the sandbox image; attacks the sandbox."""

import argparse
import sys

from stages.config import SandboxConfig, UserError
#from stages.sandbox.attacks import ATTACKS
from stages.sandbox.image import BASE, build, connect, has_image, image_name, obtain_base
from stages.sandbox.pool import open_pool
from stages.sandbox.self_check import HARNESS, LIMITS, attack_pool


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


def check(options: argparse.Namespace) -> int:
    """Prints a line for each attack; exit status 1 when one of them got through or an honest program was disturbed."""
    config = SandboxConfig(containers=1, memory_bytes=LIMITS.memory_bytes, runtime=options.runtime)
    failed = 0
    with open_pool(config, harnesses={"self_check": HARNESS}, labels={"flexsink.stage": "self-check"}) as pool:
        for finding in attack_pool(pool):
            failed += not finding.passed
            after = "" if finding.honest_after else "; the honest program after it was NOT judged right"
            print(
                f"{'ok  ' if finding.passed else 'FAIL'} {finding.attack.name:<52} {finding.words}{after}", flush=True
            )
    print(f"{len(ATTACKS) - failed} of {len(ATTACKS)} attacks came to nothing")
    return int(failed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.sandbox", description=__doc__)
    commands = parser.add_subparsers(required=True)
    image = commands.add_parser("image", help="build the sandbox image unless it is there")
    image.add_argument("--check", action="store_true", help="only say whether it is there (exit status 1 when not)")
    image.add_argument("--base", help=f"base image (default: {BASE})")
    image.set_defaults(run=make_image)
    attack = commands.add_parser("self-check", help="attack the sandbox with the known attacks")
    attack.add_argument("--runtime", default="", help="Docker runtime to check, such as runsc")
    attack.set_defaults(run=check)
    options = parser.parse_args()
    try:
        status: int = options.run(options)
    except UserError as error:
        print(f"error: {error.message}\nhint: {error.hint}", file=sys.stderr)
        return 2
    return status


if __name__ == "__main__":
    sys.exit(main())
