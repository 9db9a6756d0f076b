"""The tokens of one completion: each one's text and what the engine, the trainer and the reference thought of it.

Texts come of the checkpoint's tokenizer.json, read as JSON: no tokenizer library, no torch, nothing fetched. Where it
is not on this machine, or does not give the recorded completion, a token's text is its id in brackets.
"""

import codecs
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.compute as pc

from stages.artifacts import history
from stages.artifacts.manifest import NAME
from stages.artifacts.parquet import SAMPLES, part_paths, read_part
from stages.artifacts.run import RunDir
from stages.artifacts.stage import StageId


class Token(NamedTuple):
    """One token; logprobs are natural ones, None where nobody measured them.

    text: "" for a token that ends inside a character, which the token that completes it shows
    Example: Token(338, "analysis", engine=-0.02, trainer=-0.02, reference=-0.7)
    """

    id: int
    text: str
    engine: float | None
    trainer: float | None
    reference: float | None


class Tokens(NamedTuple):
    """The tokens of a completion in order; `worded` says whether their texts are known, else they are ids."""

    tokens: list[Token]
    worded: bool


def of(run: RunDir, completion_id: str) -> Tokens:
    """The tokens of a completion of training; of an evaluation none are kept, and there are none."""
    if completion_id.startswith("e"):
        return Tokens([], worded=False)
    row = history.texts(run, [completion_id]).get(completion_id, {})
    ids: list[int] = row.get("completion_ids") or []
    trained = _sample(run, completion_id)
    columns = [
        _padded(values, len(ids))
        for values in (row.get("engine_logprobs"), trained.get("policy_logprobs"), trained.get("reference_logprobs"))
    ]
    found = locate(run.config().model.source)
    words = texts(vocabulary(found), ids) if found else []
    worded = "".join(words) == row.get("completion", "") and bool(ids)
    shown = words if worded else [f"[{each}]" for each in ids]
    return Tokens([Token(*each) for each in zip(ids, shown, *columns, strict=True)], worded=worded)


def locate(source: str) -> Path | None:
    """The tokenizer.json of a checkpoint, a folder or a hub id that was fetched before; None when it is not here."""
    path = Path(source).expanduser() / "tokenizer.json"
    if path.is_file():
        return path
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(source, "tokenizer.json")
    except (ImportError, ValueError):  # not installed, or no hub id
        return None
    return Path(cached) if isinstance(cached, str) else None


@functools.lru_cache(maxsize=1)
def vocabulary(path: Path) -> dict[int, bytes]:
    """The bytes of every token of a byte-level BPE tokenizer.json."""
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    unmapped = {char: byte for byte, char in _byte_characters().items()}
    # A character outside the map stands for itself: it is of a token that was added by hand.
    found = {
        number: b"".join(bytes([unmapped[char]]) if char in unmapped else char.encode() for char in text)
        for text, number in body["model"]["vocab"].items()
    }
    return found | {each["id"]: each["content"].encode() for each in body.get("added_tokens", [])}


def texts(known: dict[int, bytes], ids: Iterable[int]) -> list[str]:
    """The text of each token; together they are the text of all of them. An unknown id is a replacement character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    found = [decoder.decode(known.get(each, b"\xff")) for each in ids]
    rest = decoder.decode(b"", final=True)
    if rest:
        found[-1] += rest
    return found


def _byte_characters() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable Latin-1 as itself, the others as U+0100 and on, in order."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(kept)]
    return {byte: chr(byte) for byte in kept} | {byte: chr(0x100 + at) for at, byte in enumerate(others)}


def _padded(values: Sequence[float] | None, length: int) -> list[float | None]:
    return [*(values or ())][:length] + [None] * (length - len(values or ()))


def _sample(run: RunDir, completion_id: str) -> dict[str, Any]:
    """The completion's row of the update's samples; empty while there is no update, or where it was left out."""
    folder = run.folder(StageId("update", int(completion_id.split("-")[0])))
    if not (folder / NAME).is_file():
        return {}
    wanted = ["completion_id", "policy_logprobs", "reference_logprobs"]
    for path in part_paths(folder, "samples"):
        table = read_part(path, [name for name in wanted if name in SAMPLES.names])
        rows: list[dict[str, Any]] = table.filter(pc.equal(table["completion_id"], completion_id)).to_pylist()
        if rows:
            return rows[0]
    return {}
