"""What `flexsink bench update` is asked to measure, and the bars that it is held against. No torch."""

from typing import NamedTuple

from stages.bench.cases import Bar
from stages.config import UserError

PROMPT_TOKENS, COMPLETION_TOKENS, GROUP_SIZE = 256, 512, 8  # of a packed group
PACKED_TOKENS = PROMPT_TOKENS + GROUP_SIZE * (COMPLETION_TOKENS - 1)


class Layout(NamedTuple):
    """The tokens of one optimizer step: `groups` prompts, the completions of each behind its one prompt.

    A completion's last token leads to nothing, so it is trained on and not computed.
    """

    mode: str
    groups: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """That are computed: a prompt counts once for its group."""
        return self.groups * (self.prompt_tokens + self.group_size * (self.completion_tokens - 1))

    @property
    def unshared_tokens(self) -> int:
        """That a trainer without shared prompts would compute."""
        return self.groups * self.group_size * (self.prompt_tokens + self.completion_tokens - 1)

    @property
    def trained_tokens(self) -> int:
        return self.groups * self.group_size * self.completion_tokens


def sequence(tokens: int) -> Layout:
    """One completion behind a prompt of one token; all that are computed are trained on."""
    return Layout("sequence", 1, 1, 1, tokens)


def packed(tokens: int) -> Layout:
    """As many groups of 8 completions of 512 tokens after a prompt of 256 as come nearest to `tokens`; one group of
    smaller ones in the same proportion where that is fewer than 4096.
    """
    if tokens >= 4096:
        groups = max(1, round(tokens / PACKED_TOKENS))
        return Layout("packed", groups, GROUP_SIZE, PROMPT_TOKENS, COMPLETION_TOKENS)
    part = max(1, tokens // (1 + 2 * GROUP_SIZE))
    return Layout("packed", 1, GROUP_SIZE, part, 2 * part)


class IterationCase(NamedTuple):
    """A whole RL iteration: rollout, reward, one optimizer step."""

    prompts: int
    group_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int  # after a warm-up; 0 measures the first and only one

    def __str__(self) -> str:
        return f"{self.prompts} x {self.group_size} x ({self.prompt_tokens} + {self.new_tokens})"

    @property
    def name(self) -> str:
        """As --iteration names it, for example 1x8x1024."""
        return f"{self.prompts}x{self.group_size}x{self.new_tokens}"


ITERATIONS = (
    IterationCase(1, 8, 128, 128, repeats=3),
    IterationCase(1, 8, 128, 1024, repeats=1),
    IterationCase(1, 8, 128, 4096, repeats=1),
    IterationCase(64, 8, 128, 1024, repeats=0),
)
SMALL_ITERATIONS = (IterationCase(1, 4, 16, 8, repeats=1), IterationCase(2, 2, 16, 8, repeats=0))  # of shape tiny

# gpt-oss-20b on one H200, LoRA r=16 on attention and experts, 4096 tokens; with the peak of that row
SPEED = {4096: Bar(12_000, 16_700, 20_000)}
SPEED_BYTES = 20e9
CAPPED_SPEED = 8_000  # tokens a second that a capped run still reaches
LENGTH_BYTES = {"gpt-oss-20b": {131_072: 24e9, 524_288: 80e9}, "gpt-oss-120b": {32_768: 90e9}}
ATTENTION_BYTES = {"gpt-oss-120b": {32_768: 80e9}}  # with LoRA on attention alone
PEER_TIMES = 9  # that transformers + peft is slower, on the same targets
ITERATION_S = {128: 2.0}  # new tokens: seconds of an iteration of one group of 8
ITERATION_BYTES = {1024: 15e9, 4096: 16e9}
NF4_BYTES = 13.5e9  # of 8 x 1024
K3, K3_REPLAY, RATIO, SETS, SETS_TIMES = 2e-3, 1e-3, 0.005, 0.05, 1.3


def parse_tokens(text: str) -> list[int]:
    """The lengths of a list such as 4096,32768, ascending; none is no length. UserError naming what is no length."""
    if text == "none":
        return []
    lengths = set()
    for word in (word.strip() for word in text.split(",")):
        if not word.isdecimal() or int(word) < 2:
            raise UserError(f"{word!r} is no number of tokens", "2 or more, for example 4096,32768, or none")
        lengths.add(int(word))
    return sorted(lengths)


def parse_targets(text: str) -> tuple[str, ...]:
    """What LoRA is on: attention, attention+experts, or both one after the other with a comma between."""
    found = tuple(word.strip() for word in text.split(","))
    for word in found:
        if word not in ("attention", "attention+experts"):
            raise UserError(f"{word!r} is no target of LoRA", "attention+experts, attention, or both with a comma")
    return found


def parse_iterations(text: str, *, tiny: bool) -> tuple[IterationCase, ...]:
    """The iterations of `--iteration`: none, all of the shape's, or those named; UserError for another name."""
    cases = {case.name: case for case in (SMALL_ITERATIONS if tiny else ITERATIONS)}
    if text in ("none", "all"):
        return tuple(cases.values()) if text == "all" else ()
    for name in text.split(","):
        if name not in cases:
            raise UserError(f"--iteration: there is no {name!r}", f"all, or some of {','.join(cases)}")
    return tuple(cases[name] for name in text.split(","))
