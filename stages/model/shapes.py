"""The sizes of the published gpt-oss models, for what is computed or made without a checkpoint. No torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any

# openai/gpt-oss config.json
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Example: SHAPES["gpt-oss-20b"].with_layers(4)"""

    name: str
    num_layers: int
    num_experts: int
    hidden: int = 2880
    expert_hidden: int = 2880
    num_heads: int = 64
    num_kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 201_088
    experts_per_token: int = 4
    window: int = 128  # of layers 0, 2, 4, ...; the others see everything
    max_positions: int = 131_072

    @property
    def num_full_layers(self) -> int:
        return self.num_layers // 2

    @property
    def num_sliding_layers(self) -> int:
        return self.num_layers - self.num_full_layers

    def with_layers(self, count: int) -> "Shape":
        """The same with so many layers, named accordingly."""
        return dataclasses.replace(self, name=f"{self.name}, {count} layers", num_layers=count)

    def config(self) -> Any:
        """The GptOssConfig of these sizes."""
        from transformers import GptOssConfig

        return GptOssConfig(
            num_hidden_layers=self.num_layers,
            hidden_size=self.hidden,
            intermediate_size=self.expert_hidden,
            num_local_experts=self.num_experts,
            num_experts_per_tok=self.experts_per_token,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocabulary,
            sliding_window=self.window,
            max_position_embeddings=self.max_positions,
            rope_parameters=dict(YARN),
            attention_bias=True,
            attention_dropout=0.0,
            tie_word_embeddings=False,
            pad_token_id=min(199_999, self.vocabulary - 3),
            eos_token_id=self.stop_token_ids[0],
        )

    @property
    def stop_token_ids(self) -> tuple[int, int]:
        """<|return|> and <|call|>; the last two tokens of a smaller vocabulary."""
        return (200_002, 200_012) if self.vocabulary > 200_012 else (self.vocabulary - 2, self.vocabulary - 1)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="gpt-oss-20b", num_layers=24, num_experts=32),
        Shape(name="gpt-oss-120b", num_layers=36, num_experts=128),
        Shape(  # the bundled model's, with a smaller vocabulary
            name="tiny",
            num_layers=4,
            num_experts=8,
            hidden=128,
            expert_hidden=128,
            num_heads=8,
            num_kv_heads=2,
            head_dim=32,
            vocabulary=512,
        ),
    )
}
