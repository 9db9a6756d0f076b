"""The bundled model's tokenizer: byte-level BPE of 1 024 tokens with harmony's special tokens, and a chat template.

Contract: `build(texts)` returns a tokenizer that encodes any text and decodes it back to the same bytes. Tokens may
span words up to a comma or an opening bracket, so a program of 800 characters is about 140 tokens. The template renders
harmony's layout: a system message that says how much to reason and names the channels, then each message between
<|start|> and <|end|>. Does not cover tools.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SIZE = 1024
SPECIAL = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
)
# A newline with its indentation, or what comes up to and with the next comma or opening bracket.
PIECES = r"\n *|[^\n,(\[]+[,(\[]*|[,(\[]+"
CONTEXT = 131072

CHAT_TEMPLATE = """\
{%- set effort = reasoning_effort if reasoning_effort is defined and reasoning_effort else "low" -%}
{%- if messages and messages[0]["role"] == "system" -%}
{%- set identity, rest = messages[0]["content"], messages[1:] -%}
{%- else -%}
{%- set identity, rest = "You write programs.", messages -%}
{%- endif -%}
{%- set channels = "# Valid channels: analysis, final." -%}
{{- "<|start|>system<|message|>" + identity + "\\nReasoning: " + effort + "\\n" + channels + "<|end|>" -}}
{%- for message in rest -%}
{%- if message["role"] == "assistant" -%}
{%- set channel = message["channel"] or "final" -%}
{{- "<|start|>assistant<|channel|>" + channel + "<|message|>" + message["content"] + "<|end|>" -}}
{%- elif message["role"] in ("user", "developer", "system") -%}
{{- "<|start|>" + message["role"] + "<|message|>" + message["content"] + "<|end|>" -}}
{%- else -%}
{{- raise_exception("unknown role " + message["role"]) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|start|>assistant" -}}
{%- endif -%}
"""


def build(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains the merges on texts; special tokens in them stay whole. The same texts give the same tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(SPECIAL),
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    plain = (part for text in texts for part in without_specials(text))
    tokenizer.train_from_iterator(plain, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|startoftext|>",
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def without_specials(text: str) -> list[str]:
    """Returns the parts of text between special tokens."""
    for token in SPECIAL:
        text = text.replace(token, "\0")
    return [part for part in text.split("\0") if part]
