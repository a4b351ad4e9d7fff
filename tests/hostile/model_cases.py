"""Model folders that bring code: in configurations, beside tokenizers, and in chat templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.hostile.case import Case, canary
from tests.tiny import SHIPPED

Change = dict[str, Any]


def model_cases() -> Iterator[Case]:
    for name, change in {
        "auto-map": {
            "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}
        },
        "auto-map-of-unknown": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}},
        "auto-map-of-a-hub": {
            "model_type": "evil",
            "auto_map": {"AutoConfig": "evil/repo--evil.Evil"},
        },
        "attention-kernel": {"_attn_implementation_internal": "evil/kernel"},
        "attention-kernel-named": {"_attn_implementation": "evil/kernel:evil"},
        "attention-of-a-hub": {"attn_implementation": "evil/kernel"},
        "experts-kernel": {"_experts_implementation_internal": "evil/kernel"},
        "attention-in-a-section": {"text_config": {"_attn_implementation_internal": "evil/kernel"}},
        "quantization": {"quantization_config": {"quant_method": "evil", "modules": "evil.Evil"}},
        "hidden-size-of-exabytes": {"text_config": {"hidden_size": 1 << 50}},
        "layers-without-end": {"text_config": {"num_hidden_layers": 10**9}},
        "vocabulary-of-exabytes": {"text_config": {"vocab_size": 1 << 50}},
        "heads-of-zero": {"text_config": {"num_attention_heads": 0}},
        "sizes-of-text": {"text_config": {"hidden_size": "os.system('true')"}},
        "negative-layers": {"text_config": {"num_hidden_layers": -1}},
        "patches-of-zero": {"vision_config": {"patch_size": 0}},
        "activation-of-a-path": {"text_config": {"hidden_act": "os.system"}},
    }.items():
        inert = name in ("auto-map",)  # of a type that is known: transformers' own class is taken
        yield Case(f"config-{name}", _changed("config.json", change), ("model",), inert)
    yield Case("config-deep", _replaced("config.json", lambda: "[" * 10_000), ("model",))
    yield Case("config-of-numbers", _replaced("config.json", lambda: "[1, 2]"), ("model",))
    yield Case(
        "config-not-a-number", _replaced("config.json", lambda: '{"model_type": NaN}'), ("model",)
    )
    for name, change in {
        "auto-map": {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}},
        "auto-map-of-unknown": {
            "tokenizer_class": "Evil",
            "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        },
        "class-of-a-path": {"tokenizer_class": "os.system"},
        "template-of-numbers": {"chat_template": [1, 2]},
    }.items():
        yield Case(
            f"tokenizer-{name}", _changed("tokenizer_config.json", change), ("processor",), True
        )
    yield Case(
        "tokenizer-deep",
        _replaced("tokenizer.json", lambda: '{"a": ' + "[" * 10_000),
        ("processor",),
    )
    yield Case(
        "tokenizer-noise", _replaced("tokenizer.json", lambda: "\x00" * 1000), ("processor",)
    )
    yield Case(
        "tokenizer-config-deep",
        _replaced("tokenizer_config.json", lambda: "[" * 10_000),
        ("processor",),
    )
    for name, change in {
        "auto-map": {"auto_map": {"AutoProcessor": "evil.Evil"}, "processor_class": "Evil"},
        "patches-of-exabytes": {"patch_size": 1 << 60},
        "merge-of-zero": {"merge_size": 0},
        "size-of-exabytes": {"size": {"shortest_edge": 1 << 62, "longest_edge": 1 << 62}},
        "size-of-text": {"size": {"shortest_edge": "1", "longest_edge": "os.system"}},
        "mean-of-text": {"image_mean": "os.system"},
        "mean-of-one": {"image_mean": [0.5]},
        "std-of-zero": {"image_std": [0.0, 0.0, 0.0]},
    }.items():
        inert = name in ("auto-map", "size-of-exabytes")
        yield Case(
            f"processor-{name}", _changed("preprocessor_config.json", change), ("processor",), inert
        )
    yield Case(
        "processor-deep",
        _replaced("preprocessor_config.json", lambda: "[" * 10_000),
        ("processor",),
    )
    for name, template in TEMPLATES.items():
        make = _replaced("chat_template.jinja", template)
        yield Case(f"template-{name}", make, ("processor",))


_CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TEMPLATES: dict[str, Callable[[], str]] = {
    "classes": lambda: "{{ ''.__class__.__mro__[1].__subclasses__() }}" + _CHAT,
    "globals": lambda: (
        "{{ cycler.__init__.__globals__.os.system('touch " + canary() + "') }}" + _CHAT
    ),
    "attr": lambda: "{{ ''|attr('__class__')|attr('__mro__') }}{{ 1/0 }}" + _CHAT,
    "format": lambda: "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}{{ 1/0 }}" + _CHAT,
    "format-map": lambda: "{{ '{a.__class__}'.format_map({'a': cycler}) }}{{ 1/0 }}" + _CHAT,
    "include": lambda: "{% include '" + canary() + "' %}" + _CHAT,
    "import": lambda: "{% import '" + canary() + "' as x %}" + _CHAT,
    "namespace": lambda: "{% set n = namespace(__class__=1) %}" + _CHAT,
    "code": lambda: "{{ raise_exception.__code__.co_consts }}{{ 1/0 }}" + _CHAT,
    "generator": lambda: "{{ (messages|map('upper')).gi_frame.f_globals }}{{ 1/0 }}" + _CHAT,
    "endless-loops": lambda: (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + _CHAT
    ),
    "endless-macros": lambda: (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
        + _CHAT
    ),
    "endless-recursion": lambda: "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + _CHAT,
    "product-of-text": lambda: "{% set a = 'a' * 10000000000 %}" + _CHAT,
    "power": lambda: "{% set a = 9 ** (9 ** 9) %}" + _CHAT,
    "doubled-by-plus": lambda: _doubled("{% set n.a = n.a + n.a %}"),
    "doubled-by-tilde": lambda: _doubled("{% set n.a = n.a ~ n.a %}"),
    "doubled-by-blocks": lambda: _doubled(
        "{% set b %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = b %}"
    ),
    "doubled-by-join": lambda: _doubled("{% set n.a = [n.a, n.a]|join %}"),
    "doubled-by-replace": lambda: _doubled("{% set n.a = n.a|replace('a', 'aa') %}"),
    "doubled-list": lambda: _doubled("{% set n.a = n.a|list + n.a|list %}"),
    "wide": lambda: "{{ 'a'.center(10000000000) }}" + _CHAT,
    "wide-filter": lambda: "{{ 'a'|center(10000000000) }}" + _CHAT,
    "wide-format": lambda: "{{ '%10000000000d' % 1 }}" + _CHAT,
    "wide-format-method": lambda: "{{ '{:10000000000d}'.format(1) }}" + _CHAT,
    "wide-format-filter": lambda: "{{ '%10000000000d'|format(1) }}" + _CHAT,
    "indent": lambda: "{{ 'a\na'|indent(10000000000) }}" + _CHAT,
    "deep": lambda: "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}" + _CHAT,
    "deep-blocks": lambda: "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000 + _CHAT,
    "100-MiB": lambda: "{# " + "a" * (100 << 20) + " #}" + _CHAT,
    "no-template": lambda: "{% if",
}


def _doubled(step: str) -> str:
    """A text of one letter, doubled 40 times."""
    return "{% set n = namespace(a='a') %}{% for i in range(40) %}" + step + "{% endfor %}" + _CHAT


def _changed(name: str, change: Change) -> Callable[[Path], Path]:
    """The tiny model's folder with other settings in one file, and code beside it."""

    def make(folder: Path) -> Path:
        path = _model(folder)
        content = json.loads((path / name).read_text())
        for key, value in change.items():
            known = content.get(key)
            content[key] = (
                known | value if isinstance(known, dict) and isinstance(value, dict) else value
            )
        (path / name).write_text(json.dumps(content))
        return path

    return make


def _replaced(name: str, text: Callable[[], str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = _model(folder)
        (path / name).write_text(text())
        return path

    return make


def _model(folder: Path) -> Path:
    path = shutil.copytree(SHIPPED, folder / "model")
    (path / "evil.py").write_text(f"open({canary()!r}, 'w')\nclass Evil: ...\n")
    return path
