"""How many of the prompts' claims hold, by kind of claim and by language, as the tiny world's oracle sees them."""

from collections import defaultdict
from collections.abc import Sequence

from torch import Tensor

from textcraftor.evaluate.generation import from_bytes
from textcraftor.pictures import Tick
from textcraftor.tiny.language import claim_words, parse, reword
from textcraftor.tiny.oracle import Oracle

Counts = dict[str, dict[str, int]]


def count_claims(images: Tensor, prompts: Sequence[str], batch_size: int) -> dict[str, Counts]:
    """{"kind" | "language": {NAME: {"held": claims that hold, "of": claims made}}}, over all images.

    images: (N, 3, H, W) uint8, one for each prompt.  A prompt is "plain" when it equals its own plain caption, else "rich":
    a candidate that gets worse at plain prompts shows here.
    """
    oracle = Oracle()
    counts: dict[str, Counts] = {axis: defaultdict(lambda: {"held": 0, "of": 0}) for axis in ("kind", "language")}
    for start in range(0, len(images), batch_size):
        rows = slice(start, start + batch_size)
        verdicts = oracle.check_claims(from_bytes(images[rows]), prompts[rows])
        for prompt, claims in zip(prompts[rows], verdicts, strict=True):
            language = "plain" if reword(prompt) == prompt else "rich"
            for claim, held in claims.items():
                kind = claim.split(".")[0]  # "colour.2" is the colour of the second object
                for count in (counts["kind"][kind], counts["language"][language]):
                    count["held"] += bool(held)
                    count["of"] += 1
    return {axis: dict(sorted(names.items())) for axis, names in counts.items()}


def tick_claims(images: Tensor, prompts: Sequence[str]) -> list[list[Tick]]:
    """Each claim of each image's prompt in a word, and whether it holds; nothing for a prompt without claims.

    images: (N, 3, H, W) uint8, one for each prompt.
    """
    verdicts = Oracle().check_claims(from_bytes(images), prompts)
    parsed = [(parse(prompt), verdict) for prompt, verdict in zip(prompts, verdicts, strict=True)]
    return [
        [(word, verdict[claim]) for claim, word in claim_words(claims).items()] if claims else [] for claims, verdict in parsed
    ]
