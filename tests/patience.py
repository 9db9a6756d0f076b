"""How long a test waits for what it started before it calls that hung."""

PATIENCE_S = 900.0  # the slowest takes half a minute; a machine that others use is for a while six times slower
