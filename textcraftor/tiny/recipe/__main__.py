"""Build what is missing, named steps only if wanted, for example two of them in two shells.

python -m textcraftor.tiny.recipe [--seed 0] OUT WORK [STEP ...]
"""

import argparse
from pathlib import Path

from textcraftor.tiny.recipe.build import STEPS, build

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the exported models")
    parser.add_argument("work", type=Path, help="folder of checkpoints and caches")
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto")
    options = parser.parse_args()
    made = build(options.out, options.work, options.seed, options.device, options.steps or None)
    print("built:", ", ".join(made) or "nothing")
