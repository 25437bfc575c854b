"""`python -m textcraftor.tiny.recipe OUT WORK [STEP ...]`: build what is missing, for example two steps in two shells."""

import sys
from pathlib import Path

from textcraftor.tiny.recipe.build import build

if __name__ == "__main__":
    out, work, *steps = sys.argv[1:]
    print("built:", ", ".join(build(Path(out), Path(work), steps=steps or None)) or "nothing")
