"""The bundled model and the grammar behind it: the checkpoint's layout, what its parts do, what it samples."""

import dataclasses
import json
import os
import random
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import GptOssForCausalLM

from stages.model import mxfp4_layout
from stages.model.checkpoint import Checkpoint
from stages.model.mxfp4 import Mxfp4, dequantize
from stages.tasks.programs import extract
from stages.tiny import check, corpus, families, layout, matmuls, strategies, warm_start
from tests.patience import PATIENCE_S

TINY = Path(__file__).parent.parent / "data" / "tiny"
V, D, Q, KV, E, F = 1024, 128, 256, 64, 8, 128  # vocabulary, hidden, queries, keys, experts, expert hidden


def published_layout() -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor, as the published gpt-oss checkpoints name and store them."""
    tensors: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [V, D]),
        "model.norm.weight": ("BF16", [D]),
        "lm_head.weight": ("BF16", [V, D]),
    }
    for layer in range(4):
        for name, kind, shape in (
            ("self_attn.q_proj.weight", "BF16", [Q, D]),
            ("self_attn.q_proj.bias", "BF16", [Q]),
            ("self_attn.k_proj.weight", "BF16", [KV, D]),
            ("self_attn.k_proj.bias", "BF16", [KV]),
            ("self_attn.v_proj.weight", "BF16", [KV, D]),
            ("self_attn.v_proj.bias", "BF16", [KV]),
            ("self_attn.o_proj.weight", "BF16", [D, Q]),
            ("self_attn.o_proj.bias", "BF16", [D]),
            ("self_attn.sinks", "BF16", [8]),
            ("input_layernorm.weight", "BF16", [D]),
            ("post_attention_layernorm.weight", "BF16", [D]),
            ("mlp.router.weight", "BF16", [E, D]),
            ("mlp.router.bias", "BF16", [E]),
            ("mlp.experts.gate_up_proj_blocks", "U8", [E, 2 * F, D // 32, 16]),
            ("mlp.experts.gate_up_proj_scales", "U8", [E, 2 * F, D // 32]),
            ("mlp.experts.gate_up_proj_bias", "BF16", [E, 2 * F]),
            ("mlp.experts.down_proj_blocks", "U8", [E, D, F // 32, 16]),
            ("mlp.experts.down_proj_scales", "U8", [E, D, F // 32]),
            ("mlp.experts.down_proj_bias", "BF16", [E, D]),
        ):
            tensors[f"model.layers.{layer}.{name}"] = (kind, shape)
    return tensors


@pytest.fixture(scope="module")
def loaded():
    return check.load(TINY)


def test_checkpoint_stores_every_tensor_as_gpt_oss_does():
    raw = (TINY / "model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    header.pop("__metadata__")
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == published_layout()


def test_config_is_gpt_oss_20b_with_small_numbers():
    config = json.loads((TINY / "config.json").read_text())
    assert config["model_type"] == "gpt_oss"
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert (config["sliding_window"], config["max_position_embeddings"]) == (128, 131072)
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (8, 4)
    assert config["tie_word_embeddings"] is False
    assert config["rope_parameters"] == {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "mxfp4"
    assert set(quantization["modules_to_not_convert"]) == {
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    }


def test_checkpoint_takes_at_most_12_mb():
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 12_000_000


def test_plain_transformers_loads_and_continues_it_offline():
    program = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'Hello'}], add_generation_prompt=True,\n"
        "                                    return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=4, do_sample=False)\n"
        "print(type(model).__name__, out.shape[1] - ids['input_ids'].shape[1])\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(TINY)], env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["GptOssForCausalLM", "4"]


def test_generation_stops_on_return_and_call_but_not_on_end(loaded):
    _, tokenizer = loaded
    stops = json.loads((TINY / "generation_config.json").read_text())["eos_token_id"]
    assert {tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|call|>")} <= set(stops)
    assert tokenizer.convert_tokens_to_ids("<|end|>") not in stops
    assert tokenizer.eos_token == "<|return|>"


def test_tokenizer_gives_any_text_back(loaded):
    _, tokenizer = loaded
    rng = random.Random(1)
    texts = [strategies.write(rng) for _ in range(30)] + [matmuls.write(rng) for _ in range(10)]
    texts += [
        "",
        " ",
        "\t\n\r\n  x",
        "Gr\u00fc\u00dfe, \u4e16\u754c \U0001f600",
        "\x00\x7f",
        "a" * 300,
        "if x:\n\n\n        y",
    ]
    for text in texts:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_one_token_each_and_survive_a_round_trip(loaded):
    _, tokenizer = loaded
    text = "<|start|>assistant<|channel|>final<|constrain|>x<|message|>y<|end|><|call|><|return|>"
    text += "<|startoftext|><|endoftext|>"
    ids = tokenizer(text).input_ids
    assert sum(index >= 1024 - 9 for index in ids) == 9
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_chat_template_writes_harmony_and_keeps_the_prompts_short(loaded):
    _, tokenizer = loaded
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Go"},
    ]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|start|>system<|message|>You write programs.\nReasoning: low\n# Valid channels: analysis, final.<|end|>"
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Yes<|end|>"
        "<|start|>user<|message|>Go<|end|><|start|>assistant"
    )
    for prompt in (corpus.GAME_PROMPT, corpus.MATMUL_PROMPT):
        assert len(corpus.render(tokenizer, prompt)) <= 120


@pytest.mark.parametrize("name", strategies.FAMILIES)
def test_a_family_of_the_grammar_parses_is_recognised_and_plays(name):
    programs = [strategies.write(random.Random(f"{name} {index}"), name) for index in range(60)]
    assert [families.family(program) for program in programs] == [name] * 60
    assert len({families.syntax_tree(program) for program in programs}) >= 20
    # A program moves at most as often as its letters allow: more than 50 moves takes more than one letter.
    moves = [check.play(program, seeds=(1,))[0]["moves"] for program in programs[:5]]
    assert max(moves) > 50


def test_the_grammar_follows_its_shares():
    rng = random.Random(3)
    count = Counter(families.family(strategies.write(rng)) for _ in range(2000))
    for name, share in strategies.SHARES.items():
        assert abs(count[name] / 2000 - share) < 0.04


def test_families_are_told_apart_on_programs_written_by_hand():
    # None of these comes from the grammar.
    slide = "def left(line):\n    line[0] = line[0] * 2\n    return line\n"
    table = "T = [1, 2, 4, 8, 16, 32, 64, 128]\n"
    for expected, program in (
        ("random", "import random as random\ndef strategy(b):\n    return random.sample('WASD', 1)[0]"),
        ("fixed", "def strategy(grid):\n    return 'DSAW'[grid[0][0] % 4]"),
        ("greedy", "def strategy(g):\n    return 'A' if sum(x == y for x, y in zip(g[0], g[1])) else 'W'"),
        ("corner", "def strategy(g):\n    return 'WA'[g[0][0] > 4]"),
        ("look_ahead", slide + "def strategy(g):\n    return 'W' if left(g[0]) else 'S'"),
        ("snake", table + slide + "def strategy(g):\n    return 'W' if T[g[0][0]] else 'S'"),
        (None, "def strategy(g):\n    return 'A'"),
        (None, "def strategy():\n    return 'WASD'"),
        (None, "def strategy(g:\n    return 'WASD'"),
    ):
        assert families.family(program) == expected, program


def test_about_two_in_three_matmuls_of_the_grammar_are_right():
    a, b = [[1.0, 2.0, -3.0], [0.5, 0.0, 4.0]], [[2.0, 1.0], [3.0, -1.0], [5.0, 7.0]]
    expected = (torch.tensor(a) @ torch.tensor(b)).tolist()
    rng = random.Random(4)
    right = 0
    for _ in range(400):
        space: dict = {}
        program = matmuls.write(rng)
        assert families.parses(program, "matmul", 2)
        exec(program, space)
        try:
            right += space["matmul"](a, b) == expected
        except (IndexError, ValueError):
            continue
    assert 0.55 < right / 400 < 0.8


def test_a_child_that_never_answers_is_ended_and_its_games_stand(monkeypatch):
    monkeypatch.setattr(check, "CPU_S", 1)
    games = check.play("def strategy(board):\n    while True: pass", seeds=(1, 3))
    assert [(game["moves"], game["state"]) for game in games] == [(0, "illegal")] * 2


def test_rows_that_share_a_prompt_get_the_loss_and_gradients_that_eager_gives_them_alone(loaded):
    model, tokenizer = check.load(TINY)
    prompt = corpus.render(tokenizer, corpus.GAME_PROMPT)
    rng = random.Random(5)
    rows = tokenizer(
        [corpus.completion(strategies.write(rng, name)) for name in ("random", "snake", "greedy")]
    ).input_ids

    def gradients() -> dict[str, torch.Tensor]:
        found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    alone = torch.zeros(())
    for row in rows:
        logits = model(torch.tensor([prompt + row]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        alone = alone + torch.nn.functional.cross_entropy(logits, torch.tensor(row), reduction="sum")
    alone.backward()
    expected = gradients()
    warm_start.register()
    model.set_attn_implementation(warm_start.ATTENTION)
    packed, _ = warm_start.rows_loss(model, prompt, rows)
    packed.backward()
    assert packed.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, gradient in gradients().items():
        difference = (gradient - expected[name]).abs().max()
        assert difference <= 1e-4 * expected[name].abs().max() + 1e-6, name


def test_weights_on_the_grid_stay_and_gradients_pass_through():
    weight = torch.randn(2, 64, 32)
    on_grid = warm_start.OnGrid()
    rounded = on_grid(weight)
    assert not torch.equal(rounded, weight)
    torch.testing.assert_close(on_grid(rounded), rounded, rtol=0, atol=1e-7)
    weight.requires_grad_()
    on_grid(weight).square().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * rounded)


def test_zeroing_sinks_or_shuffling_experts_changes_greedy_output():
    as_it_is = check.greedy_after(TINY, corpus.GAME_PROMPT, "")
    assert extract(as_it_is, entry="strategy") is not None
    assert check.greedy_after(TINY, corpus.GAME_PROMPT, "sinks") != as_it_is
    assert check.greedy_after(TINY, corpus.GAME_PROMPT, "experts") != as_it_is


def test_64_samples_parse_and_show_every_family_and_router(loaded):
    model, tokenizer = loaded
    texts = check.sample(model, tokenizer, corpus.GAME_PROMPT, count=64, seed=1)
    programs = [program for text in texts if (program := extract(text, entry="strategy"))]
    assert sum(families.parses(program, "strategy", 1) for program in programs) >= 54
    assert {families.family(program) for program in programs} >= set(strategies.FAMILIES)
    assert len({families.syntax_tree(program) for program in programs}) >= 40
    assert min(check.experts_used(model, tokenizer, texts[:8], corpus.GAME_PROMPT)) >= 6


@pytest.mark.slow
def test_256_samples_meet_every_bar():
    rows = check.verdicts(check.measure(TINY))
    assert [row for row in rows if not row.met] == []


def test_the_mid_size_has_30_to_60_million_parameters_in_shapes_that_the_kernels_take(loaded):
    _, tokenizer = loaded
    config = layout.config(tokenizer, "mid")
    with torch.device("meta"):
        model = GptOssForCausalLM(config)
    assert 30e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 60e6
    assert config.layer_types == ["sliding_attention", "full_attention"] * 4
    assert (config.num_experts_per_tok, config.sliding_window, config.vocab_size) == (4, 128, V)
    assert config.head_dim == 64
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):  # [E, in, out]
            assert parameter.shape[1] % 256 == 0, name
            assert parameter.shape[2] % 64 == 0, name
        elif name.endswith("_proj.weight"):
            assert all(size % 64 == 0 for size in parameter.shape), name


def test_every_expert_on_every_token_gives_what_the_chosen_ones_give_alone():
    torch.manual_seed(0)
    tokens, experts, hidden, inner, top = 12, 5, 8, 6, 2
    module = SimpleNamespace(alpha=1.702, limit=7.0)
    for name, shape in (
        ("gate_up_proj", (experts, hidden, 2 * inner)),
        ("gate_up_proj_bias", (experts, 2 * inner)),
        ("down_proj", (experts, inner, hidden)),
        ("down_proj_bias", (experts, hidden)),
    ):
        setattr(module, name, (2 * torch.randn(shape, dtype=torch.float64)).requires_grad_())
    rows = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(experts)[:top] for _ in range(tokens)])
    weights = torch.rand(tokens, top, dtype=torch.float64, requires_grad=True)
    expected = []
    for token in range(tokens):
        total = torch.zeros(hidden, dtype=torch.float64)
        for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            both = rows[token] @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
            gate, up = both[0::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
            swiglu = (up + 1) * gate / (1 + torch.exp(-1.702 * gate))
            total = total + weight * (swiglu @ module.down_proj[expert] + module.down_proj_bias[expert])
        expected.append(total)
    inputs = [rows, weights, module.gate_up_proj, module.gate_up_proj_bias, module.down_proj, module.down_proj_bias]
    pull = torch.randn(tokens, hidden, dtype=torch.float64)
    wanted = torch.autograd.grad(torch.stack(expected), inputs, pull)
    found = warm_start.every_expert(module, rows, chosen, weights)
    torch.testing.assert_close(found, torch.stack(expected))
    for ours, theirs in zip(torch.autograd.grad(found, inputs, pull), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_mid_size_checkpoint_is_read_and_its_experts_fit_the_order_of_the_kernels(loaded, tmp_path):
    _, tokenizer = loaded
    settings = dataclasses.replace(
        warm_start.SETTINGS["mid"], device="cpu", writers=0, steps=1, grid_steps=1, warmup_steps=1, game_rows=1,
        matmul_rows=1,
    )  # fmt: skip
    few = layout.config(tokenizer, "mid", num_hidden_layers=1, num_local_experts=4)  # each of the size's own shape
    model = warm_start.train(few, tokenizer, settings, report=lambda _: None)
    layout.write(model, tokenizer, tmp_path)
    read = dict(Checkpoint(tmp_path).tensors())
    assert read["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (4, 512, 16, 16)
    assert read["model.layers.0.mlp.experts.down_proj_blocks"].shape == (4, 512, 8, 16)
    for layer, part in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            stack = f"model.layers.{layer}.mlp.experts.{name}"
            packed = Mxfp4(read[f"{stack}_blocks"], read[f"{stack}_scales"])
            assert mxfp4_layout.fits(packed), stack
            trained = getattr(part.mlp.experts, name)
            torch.testing.assert_close(dequantize(*packed, torch.float32).mT, trained, rtol=0, atol=0)
    assert (read["model.layers.0.self_attn.sinks"] > 3).all()


def test_a_writer_hands_on_what_would_be_written_between_steps(loaded):
    _, tokenizer = loaded
    settings = warm_start.Settings(game_rows=2, matmul_rows=1, writers=1)
    ahead, alone = warm_start.source_of(tokenizer, settings), warm_start.batches(tokenizer, settings)
    assert [next(ahead) for _ in range(3)] == [next(alone) for _ in range(3)]


def test_steps_are_cut_to_the_time_that_is_left():
    # 100 steps are done, 0.1 s each, and 60 s are left: 480 more with a fifth kept back.
    assert warm_start.fitting(1600, done=100, step_s=0.1, left_s=60.0, least=400) == 580
    assert warm_start.fitting(500, done=100, step_s=0.1, left_s=60.0, least=400) == 500
    assert warm_start.fitting(1600, done=100, step_s=0.1, left_s=-5.0, least=400) == 400
