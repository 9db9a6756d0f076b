"""Finds the program in a completion; reads text only, nothing is run.

A completion of gpt-oss keeps its harmony markers:
`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...`.
Only the final channel answers. In it the program is the fenced block that defines the entry function (the last of
several), or, where there is no fence at all, the whole text. A fence that was never closed is an answer cut short: no
program, and no cheating either.
"""

import ast
import hashlib
import re
import textwrap
import warnings

_FINAL = re.compile(r"<\|channel\|>\s*final\b(?:\s*<\|constrain\|>[^<]*)?\s*<\|message\|>")
_MARKER = re.compile(r"<\|(?:start|end|message|channel|constrain|return|call)\|>")
_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})([^`]*)")


def final_message(completion: str) -> str | None:
    """Returns the text of the last final channel, or a text without any marker; None where there is only analysis."""
    starts = list(_FINAL.finditer(completion))
    if starts:
        completion = completion[starts[-1].end() :]
        end = _MARKER.search(completion)
        return completion[: end.start()] if end else completion
    end = _MARKER.search(completion)
    if end is None:
        return completion
    closed = completion[end.start() :]
    return completion[: end.start()] if closed in ("<|return|>", "<|end|>") else None


def fenced_blocks(message: str) -> tuple[list[str], bool]:
    """Returns the closed fenced blocks in order, and whether the message ends inside one that is open."""
    blocks: list[str] = []
    fence = ""
    lines: list[str] = []
    for line in message.split("\n"):
        match = _FENCE.fullmatch(line)
        if not fence:
            if match:
                fence, lines = match[1], []
        elif match and match[1].startswith(fence) and not match[2].strip():
            blocks.append(textwrap.dedent("\n".join(lines)) + "\n")
            fence = ""
        else:
            lines.append(line)
    return blocks, bool(fence)


def defines(program: str, *, entry: str) -> bool:
    """Says whether a line of the program defines or assigns the entry function at the top level."""
    return re.search(rf"^(?:async\s+)?def\s+{entry}\b|^{entry}\s*[:=]", program, re.MULTILINE) is not None


def extract(completion: str, *, entry: str) -> str | None:
    """Returns the program that answers, or None where the completion holds none."""
    message = final_message(completion)
    if message is None:
        return None
    blocks, cut_short = fenced_blocks(message.replace("\r\n", "\n"))
    if not blocks and not cut_short:
        blocks = [message.strip("\n") + "\n"]
    answers = [block for block in blocks if defines(block, entry=entry)]
    return answers[-1] if answers else None


def syntax_tree(program: str) -> str | None:
    """Returns the sha256 of the syntax tree, the same whatever the layout and comments; None if it does not parse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.dump(ast.parse(program))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    return hashlib.sha256(tree.encode("utf-8", "surrogatepass")).hexdigest()
