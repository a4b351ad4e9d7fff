"""`python -m triptych_models`: the families, their parts, sizes, stages and where each was run.

With --table as the README has it.
"""

import sys

from .catalogue import AUTOENCODERS, DENOISERS, FAMILIES, Family, GenerativeFamily


def families() -> dict[str, tuple[str, str, str, str]]:
    """Parts, stages, sizes and where it was run, of every family."""
    entries: dict[str, Family | GenerativeFamily] = {**FAMILIES, **DENOISERS, **AUTOENCODERS}
    return {
        name: (", ".join(each.parts), ", ".join(each.stages), each.sizes, each.ran)
        for name, each in entries.items()
    }


def table() -> str:
    """The families in Markdown."""
    rows = ["| family | parts | stages | sizes | run |", "|---|---|---|---|---|"]
    rows += [f"| `{name}` | {' | '.join(cells)} |" for name, cells in families().items()]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Print a paragraph for each family, or the table."""
    if sys.argv[1:] == ["--table"]:
        sys.stdout.write(table())
    elif sys.argv[1:]:
        sys.exit(f"error: must be nothing or --table, got {' '.join(sys.argv[1:])}")
    else:
        for name, cells in families().items():
            sys.stdout.write(f"{name}\n")
            for key, value in zip(("parts", "stages", "sizes", "ran"), cells, strict=True):
                sys.stdout.write(f"  {key:8}{value}\n")


if __name__ == "__main__":
    main()
