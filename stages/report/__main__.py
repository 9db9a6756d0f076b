"""`python -m stages.report RUN`: the report without the command line."""

import argparse

from stages.report import add_arguments, report

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.report", description="Write the HTML report of a run.")
    add_arguments(parser)
    raise SystemExit(report(parser.parse_args()))
