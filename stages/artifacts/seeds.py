"""The only source of seeds: a number from the parts that name what it is for."""

import hashlib

from stages.config import canonical_json


def derive(*parts: int | str) -> int:
    """A seed below 2**63, the same on every machine, unrelated for any two different lists of parts.

    Example: derive(config.train.seed, "rollout", iteration, group, sample)
    """
    digest = hashlib.sha256(canonical_json(list(parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
