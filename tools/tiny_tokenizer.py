"""The tokenizer and the chat template of tiny models, which make_tiny_model.py writes."""

from make_digits import WORDINGS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

VOCAB_SIZE = 512  # rows of the embedding; the tokenizer may fill fewer, as Qwen's does
SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
# Qwen's own rule for cutting text before the BPE: words with their leading space, single digits.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BEFORE_PARTS = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
"""
_BEHIND_PARTS = """\
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- else -%}
                {{- raise_exception('chat template: unknown content type ' ~ part.type) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ render(message.content) ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def chat_template(marks: dict[str, str]) -> str:
    """Qwen's turns, in which a part of each kind but text stands as these marks."""
    parts = ""
    for kind, mark in marks.items():
        word = "elif" if parts else "if"
        parts += f"            {{%- {word} part.type == '{kind}' -%}}\n"
        parts += f"                {{{{- '{mark}' -}}}}\n"
    return _BEFORE_PARTS + parts + _BEHIND_PARTS


CHAT_TEMPLATE = chat_template(
    {
        "image": "<|vision_start|><|image_pad|><|vision_end|>",
        "video": "<|vision_start|><|video_pad|><|vision_end|>",
    }
)


def train_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """Train a byte-level BPE on the demo's own words; the special tokens come last, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE - len(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in special_tokens])
    return tokenizer


def corpus() -> list[str]:
    """The demo's questions and answers, and the words of a chat."""
    questions = [w.format(a="\n", b="\n") for group in WORDINGS.values() for w in group]
    answers = ["yes", "no", "It is", "The digit is", "The answer is"]
    return [*questions, *answers, "system\nYou are a helpful assistant.", "user\n", "assistant\n"]
