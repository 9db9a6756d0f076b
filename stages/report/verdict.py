"""The outcome of a run in words. Says better or worse only where the 95 % intervals are apart."""

from dataclasses import dataclass
from typing import Literal

from stages.artifacts.history import Iteration
from stages.report.contents import Contents, Player
from stages.report.figures import capital, fixed, number

Standing = Literal["above", "level with", "below"]
AVERAGED = 3  # iterations averaged at either end: one iteration's mean reward is a noisy start and a noisy end


@dataclass(frozen=True)
class Verdict:
    """headline: one sentence; key: its words that matter; sentences: the evidence; tone: its colour."""

    headline: str
    key: str
    sentences: list[str]
    tone: str


def verdict(contents: Contents) -> Verdict:
    """What the run achieved, judged on held-out games when they were played, else on its rewards."""
    before, after = contents.before, contents.after
    done = len(contents.iterations)
    sentences = []
    if ends := reward_ends(contents.iterations):
        first, last, averaged = ends
        span = f"of the first {averaged} iterations" if averaged > 1 else "of the first iteration"
        sentences.append(f"The mean reward {span} was {fixed(first)}, of the last {fixed(last)}.")
    if before and after:
        words = contents.words
        headline, key, tone = _compare(before, after, words.cases)
        sentences.insert(
            0,
            (
                f"{capital(words.score)} {number(before.score)} before, "
                f"{number(after.score)} after {after.updates} updates "
                f"(95 % intervals {interval(before)} and {interval(after)}), "
                f"on {after.programs} programs with {round(after.cases / max(after.programs, 1))} held-out "
                f"{words.cases} each."
            ),
        )
        if contents.baselines:
            sentences.append(_against(after, contents.baselines))
    elif done:
        headline, key, tone = f"{done} of {contents.planned_iterations} iterations are done.", "", "running"
    else:
        headline, key, tone = "Nothing has been scored yet.", "", "running"
    if after and done < contents.planned_iterations:
        sentences.append(f"{done} of {contents.planned_iterations} iterations are done.")
    return Verdict(headline, key, sentences, tone)


def reward_ends(iterations: list[Iteration]) -> tuple[float, float, int] | None:
    """(mean reward of the first few, of the last few, how many each averages), or None before the second iteration."""
    rewards = [iteration.reward for iteration in iterations]
    if len(rewards) < 2:
        return None
    averaged = min(AVERAGED, len(rewards) // 2)
    return sum(rewards[:averaged]) / averaged, sum(rewards[-averaged:]) / averaged, averaged


def standing(player: Player, other: Player) -> Standing:
    """Where `player` stands against `other`: apart only when their intervals are."""
    if player.score_low > other.score_high:
        return "above"
    return "below" if player.score_high < other.score_low else "level with"


def interval(player: Player) -> str:
    """The 95 % interval of the score, as text."""
    return f"{number(player.score_low)}\u2013{number(player.score_high)}"


def _compare(before: Player, after: Player, cases: str) -> tuple[str, str, str]:
    place = standing(after, before)
    if place == "level with":
        return f"No clear change on {cases} it never saw: the intervals overlap.", "No clear change", "unclear"
    if place == "below":
        return f"It got worse on {cases} it never saw.", "worse", "bad"
    if before.score > 0 and after.score >= 1.05 * before.score:
        times = f"{after.score / before.score:.1f} times"
        return f"It scores {times} as much on {cases} it never saw.", times, "good"
    return f"It scores more on {cases} it never saw.", "more", "good"


def _against(after: Player, baselines: list[Player]) -> str:
    told = []
    for place in ("above", "level with", "below"):
        names = [other.label for other in baselines if standing(after, other) == place]
        if names:
            told.append(f"{place} {' and '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}")
    return f"Against the baselines it is {'; '.join(told)}."
