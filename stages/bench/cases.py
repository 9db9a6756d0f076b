"""What `flexsink bench engine` is asked to measure, and the bars that it is held against. No torch."""

from typing import NamedTuple

from stages.config import UserError


class Case(NamedTuple):
    """`rows` sequences with `context` tokens each in the cache, decoded together."""

    rows: int
    context: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.context}"


class Bar(NamedTuple):
    """Tokens a second of gpt-oss-20b on one H200 with synthetic weights; with LoRA 80 % of each is asked for."""

    must: int
    good: int
    stretch: int


BARS = {
    Case(1, 1024): Bar(520, 600, 750),
    Case(16, 1024): Bar(3_200, 3_600, 4_300),
    Case(64, 4096): Bar(8_800, 10_000, 11_000),
    Case(256, 1024): Bar(22_000, 27_000, 34_000),
}
WITH_LORA = 0.8  # of a bar's figures
SHARE_120B = 0.45  # of its floor, for one row
REPLAY = Bar(7_000, 14_000, 14_000)
PREFILL_SHARE = 0.25  # of PREFILL_FLOOR
PREFILL_FLOOR = 108_000  # tokens a second, gpt-oss-20b on an H200: computed from 790 TFLOP/s
MEMORY_BARS = {Case(64, 4096): 22e9, Case(1, 131_072): 18e9}  # bytes of model and cache, gpt-oss-20b


def parse_cases(text: str) -> list[Case]:
    """The cases of a list such as 1x1024,64x4096; UserError naming what is none."""
    return [parse_case(word.strip()) for word in text.split(",")]


def parse_case(word: str) -> Case:
    rows, separator, context = word.partition("x")
    if not separator or not rows.isdecimal() or not context.isdecimal():
        raise UserError(f"{word!r} is no case", "ROWSxCONTEXT, such as 64x4096")
    case = Case(int(rows), int(context))
    if case.rows < 1 or case.context < 1:
        raise UserError(f"{word!r} is no case", "rows and context are 1 or more")
    return case


def parse_ranks(text: str) -> list[int]:
    """The LoRA ranks of a list such as none,16; none is 0."""
    ranks = []
    for word in (word.strip() for word in text.split(",")):
        if word != "none" and not word.isdecimal():
            raise UserError(f"{word!r} is no LoRA rank", "none or a number, such as none,16")
        ranks.append(0 if word == "none" else int(word))
    return ranks


def verdict(tokens_per_s: float, bar: Bar, *, lora: bool) -> str:
    """How a figure stands to its bar: stretch, good, must or missed."""
    share = WITH_LORA if lora else 1.0
    names = {"stretch": bar.stretch, "good": bar.good, "must": bar.must}
    return next((name for name, figure in names.items() if tokens_per_s >= share * figure), "missed")
