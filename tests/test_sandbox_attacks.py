"""The self-check with real Docker: every attack comes to nothing, and the honest program after it is judged right."""

from collections.abc import Iterator

import pytest

from stages.config import SandboxConfig
from stages.sandbox import SandboxPool, open_pool
from stages.sandbox.attacks import ATTACKS, Attack
from stages.sandbox.self_check import HARNESS, LIMITS, attack_pool

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def pool() -> Iterator[SandboxPool]:
    config = SandboxConfig(containers=1, memory_bytes=LIMITS.memory_bytes)
    with open_pool(config, harnesses={"self_check": HARNESS}, labels={"flexsink.run": "test-attacks"}) as opened:
        yield opened


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name.replace(" ", "-"))
def test_the_attack_comes_to_nothing(pool: SandboxPool, attack: Attack) -> None:
    (finding,) = attack_pool(pool, (attack,))
    assert finding.honest_after, "the honest program after the attack was not judged right"
    assert finding.passed, f"expected {[str(outcome) for outcome in attack.expected]}, got {finding.words}"


def test_each_attack_has_its_own_name() -> None:
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 25
