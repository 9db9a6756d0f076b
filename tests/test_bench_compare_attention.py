"""`flexsink compare-attention` on the bundled model: it finds the paths right, and finds a wrong one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.cli import dispatch
from stages.bench import compare_attention
from stages.kernels.attention import sink_attention

TINY = str(Path(__file__).parents[1] / "data" / "tiny")


def test_every_path_of_the_bundled_model_is_as_near_to_float64_as_eager(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "compare.json"
    assert dispatch(["compare-attention", TINY, "--tokens", "140", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = {(row["layer"], row["dtype"], row["path"]): row for row in result["rows"]}
    paths = {"eager", "plain", "decode"} | ({"flex"} if torch.cuda.is_available() else set())
    assert set(rows) == {(i, dtype, path) for i in range(4) for dtype in ("bf16", "fp32") for path in paths}
    assert [rows[i, "fp32", "eager"]["kind"] for i in range(4)] == ["sliding", "full"] * 2
    for (_, dtype, path), row in rows.items():
        scale = 2e-2 if dtype == "bf16" else 2e-6
        assert (row["relative_from_eager"] == 0) == (path == "eager")
        assert 0 < row["relative_error"] < scale
    assert result["command"] == f"flexsink compare-attention {TINY} --tokens 140 --dtypes bf16,fp32"
    shown = capsys.readouterr().out
    assert "every path errs at most 2 times as much" in shown
    assert torch.cuda.is_available() or "flex: absent, no GPU" in shown


def test_a_window_of_one_key_too_many_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wider(*arguments: Any, window: int | None, **more: Any) -> Any:
        return sink_attention(*arguments, window=None if window is None else window + 1, **more)

    monkeypatch.setattr(compare_attention, "sink_attention", wider)
    monkeypatch.setattr(compare_attention, "interpreted", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    assert dispatch(["compare-attention", TINY, "--tokens", "131", "--dtypes", "fp32"]) == 1
    shown = capsys.readouterr().out
    assert "transformers eager: plain in layer 0, plain in layer 2\n" in shown
    assert torch.cuda.is_available() or "decode: absent, no GPU" in shown


def test_a_shape_has_its_true_attention() -> None:
    model = compare_attention.shape_model("gpt-oss-20b", 1, torch.device("cpu"))
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.shape == (4096, 2880)
    assert attention.k_proj.weight.shape == (512, 2880)
    assert attention.sliding_window == 128
    assert float(attention.sinks.detach().std()) > 0.5
