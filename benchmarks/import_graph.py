"""The rooms of the code, their size, and who imports whom.

    python -m benchmarks.import_graph                  the checkout it is run in
    python -m benchmarks.import_graph ../other         another one, such as an earlier commit's

A room is a folder of the library, or a module beside those folders; `tasks` and `flows` are one room each. An arrow goes
from one room to another that it imports, at least once, at import time or inside a function.
"""

import sys
from collections import Counter
from pathlib import Path

import grimp

PACKAGES = ("textcraftor", "tasks", "flows")


def room_of(module: str) -> str:
    """The room that a module belongs to: `textcraftor.cache.store` -> `textcraftor.cache`."""
    package, *inner = module.split(".")
    return f"{package}.{inner[0]}" if package == "textcraftor" and inner else package


def lines_per_room(root: Path) -> Counter[str]:
    """Lines of Python of each room below `root`."""
    lines = Counter[str]()
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
            lines[room_of(module)] += len(path.read_text(encoding="utf-8").splitlines())
    return lines


def arrows(graph: grimp.ImportGraph) -> set[tuple[str, str]]:
    """(importing room, imported room), each pair once."""
    pairs = {
        (room_of(module), room_of(imported))
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
    }
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    sys.path.insert(0, str(root))
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    lines, found = lines_per_room(root), arrows(graph)
    incoming, outgoing = Counter(b for _, b in found), Counter(a for a, _ in found)
    print(f"{'room':32} {'lines':>6} {'imports':>8} {'imported by':>12}")
    for room in sorted(lines):
        print(f"{room:32} {lines[room]:6} {outgoing[room]:8} {incoming[room]:12}")
    print(f"{len(lines)} rooms, {sum(lines.values())} lines, {len(found)} arrows")


if __name__ == "__main__":
    main()
