"""`python -m triptych_models`: the families, their parts, sizes, stages and where each was run."""

import sys

from .catalogue import AUTOENCODERS, DENOISERS, FAMILIES, Family, GenerativeFamily


def main() -> None:
    """Print a paragraph for each family."""
    out = sys.stdout
    families: dict[str, Family | GenerativeFamily] = {**FAMILIES, **DENOISERS, **AUTOENCODERS}
    for name, family in families.items():
        out.write(f"{name}\n")
        for key, value in (
            ("parts", ", ".join(family.parts)),
            ("stages", ", ".join(family.stages)),
            ("sizes", family.sizes),
            ("ran", family.ran),
        ):
            out.write(f"  {key:8}{value}\n")


if __name__ == "__main__":
    main()
