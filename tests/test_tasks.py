"""Extraction of programs from harmony completions, and the registry of tasks."""

import subprocess
import sys
import time

import pytest

from stages.config import UserError
from stages.tasks import programs, registry
from stages.tasks.game2048.task import PROMPT as PROMPT_2048
from stages.tasks.matmul.task import PROMPT as PROMPT_MATMUL
from tests.patience import PATIENCE_S

PROGRAM = "def strategy(board):\n    return 'W'\n"
OTHER = "def strategy(board):\n    return 'S'\n"
FINAL = "<|channel|>final<|message|>"
ANALYSIS = "<|channel|>analysis<|message|>"


def fenced(program, info="python"):
    return f"```{info}\n{program}```"


def extract(completion):
    return programs.extract(completion, entry="strategy")


@pytest.mark.parametrize(
    "completion",
    [
        FINAL + fenced(PROGRAM) + "<|return|>",
        FINAL + fenced(PROGRAM),
        FINAL + fenced(PROGRAM, "") + "<|return|>",
        FINAL + fenced(PROGRAM, "py") + "\nIt goes up.<|return|>",
        FINAL + "Here it is:\n\n" + fenced(PROGRAM) + "\n<|end|>",
        FINAL + "~~~python\n" + PROGRAM + "~~~<|return|>",
        FINAL + "````python\n" + PROGRAM + "````<|return|>",
        FINAL + PROGRAM + "<|return|>",
        FINAL + "\n" + PROGRAM,
        ANALYSIS + "Up is good." + "<|end|><|start|>assistant" + FINAL + fenced(PROGRAM) + "<|return|>",
        ANALYSIS + fenced(OTHER) + "<|end|><|start|>assistant" + FINAL + fenced(PROGRAM) + "<|return|>",
        "<|channel|>final <|constrain|>python<|message|>" + fenced(PROGRAM) + "<|return|>",
        FINAL + fenced("import os\n") + "\n" + fenced(PROGRAM) + "<|return|>",
        FINAL + fenced(PROGRAM) + "\nUse:\n" + fenced("print(strategy([[0]]))\n") + "<|return|>",
        FINAL + fenced(OTHER) + "\nBetter:\n" + fenced(PROGRAM) + "<|return|>",
        FINAL + fenced(PROGRAM).replace("\n", "\r\n"),
        FINAL + "1. So:\n\n   ```python\n   def strategy(board):\n       return 'W'\n   ```\n<|return|>",
        PROGRAM,
        fenced(PROGRAM),
        fenced(PROGRAM) + "<|return|>",
    ],
)
def test_the_program_is_found_in_the_final_channel(completion):
    assert extract(completion) == PROGRAM


@pytest.mark.parametrize(
    "completion",
    [
        "",
        FINAL,
        FINAL + "<|return|>",
        FINAL + "I cannot do that.<|return|>",
        ANALYSIS + fenced(PROGRAM),
        ANALYSIS + fenced(PROGRAM) + "<|end|>",
        ANALYSIS + fenced(PROGRAM) + "<|end|><|start|>assistant<|channel|>commentary<|message|>" + PROGRAM + "<|call|>",
        ANALYSIS + PROGRAM + "<|end|><|start|>assistant" + FINAL + "Done.<|return|>",
        FINAL + "```python\n" + PROGRAM,
        FINAL + "```python\n" + PROGRAM + "<|return|>",
        FINAL + "```python\n" + PROGRAM + "``",
        FINAL + fenced("def other(board):\n    return 'W'\n") + "<|return|>",
        FINAL + fenced("class A:\n    def strategy(board):\n        return 'W'\n") + "<|return|>",
        FINAL + "def strategies(board):\n    return 'W'\n",
        "Up is good." + "<|end|><|start|>assistant" + ANALYSIS + PROGRAM,
    ],
)
def test_a_completion_without_an_answer_has_no_program(completion):
    assert extract(completion) is None


@pytest.mark.parametrize(
    "program",
    ["strategy = lambda board: 'W'\n", "async def strategy(board):\n    return 'W'\n", "strategy: object = max\n"],
)
def test_other_ways_of_defining_the_function_are_left_to_the_sandbox(program):
    assert extract(FINAL + fenced(program) + "<|return|>") == program


def test_a_program_that_does_not_parse_is_still_a_program():
    assert extract(FINAL + fenced("def strategy(board:\n    return\n")) == "def strategy(board:\n    return\n"


def test_extraction_runs_nothing(tmp_path):
    canary = tmp_path / "canary"
    program = f"open({str(canary)!r}, 'w').write('ran')\n{PROGRAM}"
    assert extract(FINAL + fenced(program) + "<|return|>") == program
    programs.syntax_tree(program)
    assert not canary.exists()


@pytest.mark.timed
def test_extraction_of_megabytes_takes_less_than_a_second():
    start = time.process_time()
    for text in (
        "```\n" * 500_000,
        "`" * 2_000_000,
        FINAL * 80_000,
        "<|" * 1_000_000,
        "strategy " * 300_000,
        " " * 2_000_000,
    ):
        extract(FINAL + text)
    assert time.process_time() - start < 6


def test_programs_that_differ_in_layout_share_a_syntax_tree_and_others_do_not():
    tree = programs.syntax_tree(PROGRAM)
    assert programs.syntax_tree('def strategy( board ):  # up\n\n  return "W"') == tree
    assert programs.syntax_tree(OTHER) != tree
    assert len(tree) == 64


@pytest.mark.parametrize(
    "program", ["def strategy(", "x = '\0'", "(" * 5000 + ")" * 5000, "a" + ".a" * 200_000, "-" * 100_000 + "1"]
)
def test_a_program_that_cannot_be_parsed_has_no_syntax_tree(program):
    assert programs.syntax_tree(program) is None


def test_both_prompts_are_short_and_say_the_contract():
    for prompt, entry in (
        (PROMPT_2048, "strategy(board: list[list[int]])"),
        (PROMPT_MATMUL, "matmul(A: list[list[float]]"),
    ):
        assert len(prompt.split()) < 90
        assert entry in prompt
        assert "math, random, itertools, collections, functools, heapq, copy or typing" in prompt


def test_prompts_of_an_iteration_are_one_a_group_with_the_words_of_the_task():
    prompts = registry.get("game2048").prompts(3, 7, 0)
    assert [prompt.prompt_id for prompt in prompts] == ["00007-000", "00007-001", "00007-002"]
    assert {prompt.messages[0]["content"] for prompt in prompts} == {PROMPT_2048}
    larger = registry.get("game2048", (("size", 5), ("target", 4096)))
    assert "5x5 board and reaches 4096" in larger.prompts(1, 0, 0)[0].messages[0]["content"]


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match="game2084") as caught:
        registry.get("game2084")
    assert "game2048" in caught.value.hint


def test_options_are_checked_by_the_task_they_belong_to():
    registry.check("game2048", {"size": 5})
    registry.check("matmul", {"trials": 3})
    with pytest.raises(UserError, match=r"task\.size of matmul"):
        registry.check("matmul", {"size": 5})


def test_tasks_load_without_torch():
    code = "import sys, stages.tasks.registry; assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_S)
