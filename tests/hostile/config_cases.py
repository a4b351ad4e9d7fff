"""Configurations: YAML that makes objects, grows without end or nests without end."""

from __future__ import annotations

from collections.abc import Iterator

from tests.hostile.case import Case, canary, writer


def config_cases() -> Iterator[Case]:
    for name, text in {
        "apply": lambda: f"run: !!python/object/apply:os.system ['touch {canary()}']",
        "new": lambda: f"run: !!python/object/new:os.system ['touch {canary()}']",
        "name": lambda: "run: !!python/name:os.system",
        "module": lambda: "run: !!python/module:evil",
        "object": lambda: "run: !!python/object:subprocess.Popen {args: [touch, x]}",
        "local-tag": lambda: "run: !include /etc/passwd",
        "laughs": _laughs,
        "laughs-in-a-key": lambda: _laughs().replace("run: *z", "optim: {lr: *z}"),
        "laughs-merged": lambda: _laughs().replace("run: *z", "run: {<<: [*z]}"),
        "laughs-unused": lambda: _laughs().replace("run: *z", ""),
        "anchors": lambda: "a: &a 1\nb: [" + "*a, " * 12_000 + "]",
        "itself-in-a-key": lambda: "run: &a {steps: *a}",
        "tag-of-another": lambda: '%TAG ! tag:yaml.org,2002:python/\n---\nrun: !name:os.system ""',
        "binary": lambda: "run: {dir: !!binary aGVsbG8=}",
        "set": lambda: "run: !!set {steps, dir}",
        "pairs": lambda: "run: !!pairs [steps: 1, steps: 2]",
        "hexadecimal-digits": lambda: "run: {steps: 0x" + "f" * 50_000 + "}",
        "binary-digits": lambda: "run: {steps: 0b" + "1" * 9_000 + "}",
        "base-60-digits": lambda: "run: {steps: 1" + ":59" * 3_000 + "}",
        "large-seed": lambda: "run: {seed: " + "9" * 4_000 + "}",
        "long-key": lambda: "? " + "a" * 50_000 + "\n: 1",
        "key-twice-below": lambda: "run: {steps: 1, steps: 2}",
        "key-twice-quoted": lambda: "run: {steps: 1}\n'run': {steps: 2}",
        "two-documents": lambda: "run: {steps: 1}\n---\nrun: {steps: 2}",
        "deep-flow-maps": lambda: "run: " + "{a: " * 60 + "1" + "}" * 60,
        "utf-16": lambda: "run: {steps: 1}".encode("utf-16").decode("latin-1"),
        "deep": lambda: "run: " + "[" * 10_000,
        "deep-blocks": lambda: "".join(" " * n + "a:\n" for n in range(300)),
        "itself": lambda: "run: &a [*a]",
        "100-MiB": lambda: "# " + "a" * (100 << 20),
        "million-digits": lambda: "run: {steps: " + "9" * 1_000_000 + "}",
        "list": lambda: "[1, 2]",
        "null-bytes": lambda: "run: \0",
        "key-twice": lambda: "run: {steps: 1}\nrun: {steps: 2}",
        "key-of-a-list": lambda: "? [a, b]\n: 1",
        "number-of-infinity": lambda: "optim: {lr: .inf}",
        "not-a-number": lambda: "optim: {lr: .nan}",
    }.items():
        yield Case(f"yaml-{name}", writer("a.yaml", lambda text=text: text().encode()), ("config",))


def _laughs() -> str:
    """Lists of ten lists of ten lists …: 10^25 entries when they are all printed."""
    lines = ["a: &a [lol]"]
    for number in range(25):
        name, before = chr(ord("b") + number), chr(ord("a") + number)
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join([*lines, "run: *z"])
