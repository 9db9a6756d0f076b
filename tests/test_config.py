"""Configurations: presets, overrides, reading back, and the errors a wrong word gets."""

import dataclasses
import json

import pytest

from flows.config import differences, overridden, resolved, resumed
from flows.presets import PRESETS, preset
from stages.config import LIMITS, SECTIONS, RunConfig, UserError, canonical_json


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_resolves_and_survives_json(name: str) -> None:
    config = resolved(preset(name))
    assert config.preset == name
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.from_json(json.dumps(json.loads(config.to_json()), indent=2)) == config


def test_tiny_test_is_the_size_that_tests_of_kill_and_resume_count_on() -> None:
    config = preset("tiny_test")
    assert (config.train.iterations, config.rollout.prompts, config.rollout.group_size) == (2, 2, 8)


def test_overrides_take_the_type_of_their_key_and_the_last_one_wins() -> None:
    words = [
        "train.seed=1",
        "train.seed=2",
        "update.learning_rate=1e-4",
        "rollout.temperature=1",
        "model.source=data/x",
    ]
    config = overridden(
        preset("tiny"), [*words, "model.offload_embedding=true", "task.size=5", "rollout.max_slots=1e2"]
    )
    assert config.train.seed == 2
    assert config.update.learning_rate == 1e-4
    assert config.rollout.temperature == 1.0
    assert isinstance(config.rollout.temperature, float)
    assert config.model.source == "data/x"
    assert config.model.offload_embedding is True
    assert config.task.option_values()["size"] == 5
    assert config.rollout.max_slots == 100


def test_a_model_source_that_looks_like_a_number_stays_a_text() -> None:
    assert overridden(preset("tiny"), ["model.source=120"]).model.source == "120"


@pytest.mark.parametrize(
    ("word", "message", "hint"),
    [
        ("train.iteration=3", "unknown key train.iteration", "did you mean train.iterations?"),
        ("trian.iterations=3", "unknown section 'trian'", "did you mean train?"),
        ("iterations=3", "'iterations=3' is not section.key=value", "did you mean train.iterations=3?"),
        ("train.iterations", "is not section.key=value", "for example"),
        ("train.iterations=few", "train.iterations must be a whole number, not 'few'", "train.iterations=24"),
        ("train.iterations=1.5", "train.iterations must be a whole number, not 1.5", "train.iterations=24"),
        ("train.iterations=true", "train.iterations must be a whole number, not True", ""),
        ("train.iterations=0", "train.iterations must be 1 to 1e+06, not 0", "train.iterations=24"),
        ("update.learning_rate=nan", "update.learning_rate must be finite", ""),
        ("update.learning_rate=fast", "update.learning_rate must be a number, not 'fast'", ""),
        ("model.offload_embedding=maybe", "must be true or false", ""),
        (
            "update.loss=ppo",
            "update.loss must be one of grpo, bnpo, dr_grpo, dapo, gspo, cispo, sapo, not 'ppo'",
            "grpo",
        ),
        ("update.clip=-0.1", "update.clip must be 0 to 1e+06, not -0.1", "update.clip=0.0"),
        ("update.correction_cap=0.5", "update.correction_cap must be 1 to 1e+06, not 0.5", "update.correction_cap=2.0"),
        ("update.correction=icepop", "must be one of none, truncated, masked, not 'icepop'", "update.correction=none"),
        ("model.experts=int8", "model.experts must be one of mxfp4, dequantized, not 'int8'", "model.experts=mxfp4"),
    ],
)
def test_a_wrong_override_says_what_is_wrong_and_what_would_be_right(word: str, message: str, hint: str) -> None:
    with pytest.raises(UserError) as caught:
        overridden(preset("tiny"), [word])
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("task.name=game2047", "unknown task 'game2047'"),
        ("task.sise=4", "unknown key task.sise of game2048"),
        ("task.size=large", "task.size is 'large'"),
        ("task.size=2", "task.size is 2"),
        ("update.overlong_tokens=257", "update.overlong_tokens=257 is more than rollout.max_new_tokens=256"),
    ],
)
def test_what_a_run_cannot_be_made_of_is_refused_before_it_starts(word: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        resolved(overridden(preset("tiny"), [word]))
    assert caught.value.hint


def test_an_unknown_preset_gets_the_nearest_name() -> None:
    with pytest.raises(UserError) as caught:
        preset("tinny")
    assert (caught.value.message, caught.value.hint) == ("unknown preset 'tinny'", "did you mean tiny?")


def test_resolving_writes_every_task_option_out() -> None:
    options = resolved(preset("tiny")).task.option_values()
    assert {name: options[name] for name in ("size", "target")} == {"size": 4, "target": 2048}
    assert resolved(overridden(preset("tiny"), ["task.size=4"])) == resolved(preset("tiny"))


def test_resume_may_change_what_is_in_no_key() -> None:
    words = ["train.iterations=48", "evaluate.every=4", "sandbox.containers=3", "logging.level=DEBUG"]
    config = resumed(resolved(preset("tiny")), words)
    changed = [name for name, _, _ in differences(resolved(preset("tiny")), config)]
    assert changed == ["evaluate.every", "logging.level", "sandbox.containers", "train.iterations"]


@pytest.mark.parametrize("word", ["train.seed=1", "rollout.temperature=0.9", "task.size=5", "model.dtype=float16"])
def test_resume_refuses_what_would_change_what_is_made(word: str) -> None:
    with pytest.raises(UserError, match=f"resume cannot change {word.split('=')[0]}") as caught:
        resumed(resolved(preset("tiny")), [word])
    assert "flexsink train" in caught.value.hint


def test_reading_back_is_strict() -> None:
    body = preset("tiny").to_dict()
    for changed, message in (
        ({**body, "extra": {}}, "unknown section 'extra'"),
        ({**body, "train": {**body["train"], "epochs": 3}}, "unknown key train.epochs"),
        ({**body, "train": 3}, "must be an object"),
        ({**body, "train": {"iterations": "3"}}, "must be a whole number"),
        ({**body, "task": {"name": "game2048", "size": [4]}}, "task.size must be"),
    ):
        with pytest.raises(UserError, match=message):
            RunConfig.from_json(json.dumps(changed))
    for text in ("{", "[]", ""):
        with pytest.raises(UserError, match="not"):
            RunConfig.from_json(text)


def test_canonical_json_is_one_text_per_value_and_refuses_nan() -> None:
    assert canonical_json({"b": 1.5, "a": ["\u00e4"]}) == '{"a":["\\u00e4"],"b":1.5}'
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))


def test_every_limit_is_of_a_key_that_exists_and_holds_its_default() -> None:
    flat = RunConfig().flat()
    for name, (low, high) in LIMITS.items():
        assert low <= flat[name] <= high  # type: ignore[operator]
    numbers = [
        f"{section}.{field.name}"
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
        if field.type in (int, float)
    ]
    assert sorted(numbers) == sorted(LIMITS)


def test_a_user_error_survives_a_process_boundary() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError("what", "do this")))
    assert (error.message, error.hint) == ("what", "do this")
