"""Two languages for one world: the plain captions a base model learns from, and the rich prompts that people write."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from textcraftor.tiny.scenes import BACKGROUNDS, OPPOSITE, Scene, Thing, sample_scene

# Each plain word with the words that mean the same. The first of each list is the plain one.
COLOUR_WORDS: Final = {
    "red": ("red", "crimson", "scarlet", "ruby"),
    "green": ("green", "emerald", "jade", "verdant"),
    "blue": ("blue", "azure", "sapphire", "cobalt"),
    "yellow": ("yellow", "golden", "lemon", "amber"),
    "purple": ("purple", "violet", "magenta", "plum"),
    "cyan": ("cyan", "turquoise", "aqua", "teal"),
}
SHAPE_WORDS: Final = {
    "circle": ("circle", "disc", "ball", "dot"),
    "square": ("square", "box", "block", "tile"),
    "triangle": ("triangle", "pyramid", "wedge"),
    "star": ("star", "pentagram", "starlet"),
    "cross": ("cross", "plus", "crucifix"),
}
SIZE_WORDS: Final = {
    "small": ("small", "tiny", "little", "mini", "petite"),
    "large": ("large", "big", "huge", "giant", "enormous"),
}
BACKGROUND_WORDS: Final = {
    "white": ("white", "ivory", "snowy", "pale"),
    "grey": ("grey", "gray", "ashen", "slate"),
    "black": ("black", "dark", "ebony", "inky"),
}
STYLE_WORDS: Final = {
    "flat": ("flat", "matte", "dull", "unshaded"),
    "glossy": ("glossy", "shiny", "polished", "gleaming"),
}
RELATION_WORDS: Final = {
    "left of": ("left of", "to the left of", "on the left side of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right side of", "on the right of"),
    "above": ("above", "over", "on top of", "higher than"),
    "below": ("below", "under", "beneath", "underneath"),
}
GROUND_NOUNS: Final = ("background", "backdrop", "wall", "canvas")
_OPENINGS = ("a picture of", "an image of", "a photo showing", "please draw", "i would like", "a nice view of", "imagine")
_ENDINGS = ("highly detailed", "masterpiece", "best quality", "for my room", "thank you", "trending")


def _meanings(table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: plain for plain, words in table.items() for word in words}


_COLOUR, _SHAPE, _SIZE = _meanings(COLOUR_WORDS), _meanings(SHAPE_WORDS), _meanings(SIZE_WORDS)
_BACKGROUND, _STYLE, _RELATION = _meanings(BACKGROUND_WORDS), _meanings(STYLE_WORDS), _meanings(RELATION_WORDS)


def _any(words: Sequence[str]) -> str:
    # Longest first, so that "on the left side of" is never read as "left of" with something before it.
    return "(?:" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")"


_RELATION_PATTERN = re.compile(rf"\b{_any(list(_RELATION))}\b")
_GROUND_PATTERN = re.compile(
    rf"(?:\b(?:on|against|before|over|in front of|with)\s+)?(?:\b(?:a|an|the)\s+)?"
    rf"\b({_any(list(_BACKGROUND))})\s+{_any(GROUND_NOUNS)}\b"
)
_NEW_THING = re.compile(r"\b(?:a|an|the|one|sits|next|beside)\b|;")
_SAME_OR_NEW = re.compile(r"\b(?:and|with|is)\b")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a prompt says about its picture.  Whatever it leaves open is None.

    Sentences that say the same ("B right of A" and "A left of B") give different claims that hold of the same pictures.
    """

    things: tuple[Thing, ...]
    relation: str | None
    background: str | None
    style: str | None


def claims_of(scene: Scene) -> Claims:
    """All that can be said about a scene."""
    return Claims(scene.things, scene.relation, scene.background, scene.style)


def _plain_thing(thing: Thing) -> str:
    return " ".join(["a", *(word for word in (thing.size, thing.colour, thing.shape) if word)])


def plain_caption(content: Scene | Claims) -> str:
    """The one plain sentence for a scene: "a small red circle left of a large blue square on a white background, glossy".

    For claims, what is left open is left out.
    """
    text = _plain_thing(content.things[0])
    if len(content.things) > 1:
        text += f" {content.relation or 'and'} {_plain_thing(content.things[1])}"
    if content.background:
        text += f" on a {content.background} background"
    return text + (f", {content.style}" if content.style else "")


def _choose(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _with_article(text: str) -> str:
    return f"{_article(text)} {text}"


def _rich_thing(thing: Thing, rng: np.random.Generator, style: str | None) -> str:
    # Rich prompts lean towards the rare words: the plain one comes up only as often as each of its synonyms.
    colour = _choose(rng, COLOUR_WORDS[thing.colour or "red"])
    shape = _choose(rng, SHAPE_WORDS[thing.shape or "circle"])
    size = _choose(rng, SIZE_WORDS[thing.size or "small"])
    front = f"{style} " if style else ""
    match int(rng.integers(6)):
        case 0:
            return _with_article(f"{front}{colour} {shape} of {size} size")
        case 1:
            return _with_article(f"{front}{shape}, {colour} and {size},")
        case 2:
            return _with_article(f"{front}{colour} and {size} {shape}")
        case 3:
            return _with_article(f"{front}{shape} that looks {size} and {colour}")
        case _:
            return _with_article(f"{front}{size} {colour} {shape}")


def rich_caption(scene: Scene, rng: np.random.Generator, omit: float = 0.1) -> str:
    """A sentence as people write it: synonyms, other word orders, filler.

    omit: chance to leave the background unsaid, and as much for the style.  `parse` reads every such sentence back.
    """
    style = None if rng.random() < omit else _choose(rng, STYLE_WORDS[scene.style])
    ground = None if rng.random() < omit else _choose(rng, BACKGROUND_WORDS[scene.background])
    style_in_front = style is not None and len(scene.things) == 1 and rng.random() < 0.4
    things = [_rich_thing(thing, rng, style if style_in_front else None) for thing in scene.things]
    text = things[0]
    inverted = False
    if scene.relation:
        match int(rng.integers(3)):
            case 0:
                inverted = True
                text = f"{_choose(rng, RELATION_WORDS[scene.relation])} {things[1]} sits {things[0]}"
            case 1:
                text = f"{things[1]} {_choose(rng, RELATION_WORDS[OPPOSITE[scene.relation]])} {things[0]}"
            case _:
                text = f"{things[0]} {_choose(rng, RELATION_WORDS[scene.relation])} {things[1]}"
    if not inverted and rng.random() < 0.4:
        text = f"{_choose(rng, _OPENINGS)} {text}"
    if ground:
        backdrop = f"{_with_article(ground)} {_choose(rng, GROUND_NOUNS)}"
        text = f"on {backdrop}, {text}" if rng.random() < 0.35 else f"{text} {_choose(rng, ('on', 'against'))} {backdrop}"
    if style and not style_in_front:
        match int(rng.integers(3)):
            case 0:
                text = f"{style} look: {text}"
            case 1:
                text = f"{text}, in {style} finish"
            case _:
                text = f"{text}, {style}"
    if rng.random() < 0.3:
        text = f"{text}, {_choose(rng, _ENDINGS)}"
    return text.replace(",,", ",").replace(" ,", ",")


def _read_thing(text: str) -> Thing | None:
    words = _WORD.findall(text)
    shape = next((_SHAPE[word] for word in words if word in _SHAPE), None)
    if shape is None:
        return None
    colour = next((_COLOUR[word] for word in words if word in _COLOUR), None)
    size = next((_SIZE[word] for word in words if word in _SIZE), None)
    return Thing(colour, shape, size)


def _read_things(text: str) -> list[Thing]:
    """Things in the order of the text.  After "and", attributes without a shape belong to the thing they stand beside."""
    things: list[str] = []
    for part in _NEW_THING.split(text):
        pieces: list[str] = []
        for piece in _SAME_OR_NEW.split(part):
            if pieces and (_read_thing(pieces[-1]) is None or _read_thing(piece) is None):
                pieces[-1] += " " + piece
            else:
                pieces.append(piece)
        things += pieces
    return [thing for thing in map(_read_thing, things) if thing is not None]


def parse(prompt: str) -> Claims | None:
    """Read a prompt in either language.  Returns None when it names no thing of this world; never raises."""
    text = " ".join(prompt.lower().split())
    ground = _GROUND_PATTERN.search(text)
    text = _GROUND_PATTERN.sub(" ; ", text)
    style = next((_STYLE[word] for word in _WORD.findall(text) if word in _STYLE), None)
    link = _RELATION_PATTERN.search(text)
    before, after = (text[: link.start()], text[link.end() :]) if link else (text, "")
    things, others = _read_things(before), _read_things(after)
    relation = _RELATION[link.group()] if link else None
    if not things and len(others) > 1:  # "left of B sits A"
        things, others = others[1:], others[:1]
    pair = (things[:1] + others[:1]) if things and others else (things or others)[:2]
    if not pair:
        return None
    return Claims(
        tuple(pair),
        relation if things and others else None,
        _BACKGROUND[ground.group(1)] if ground else None,
        style,
    )


def reword(prompt: str) -> str:
    """The plain caption of what a prompt says: prompt engineering for this world.  Prompts from elsewhere stay as they are."""
    claims = parse(prompt)
    return plain_caption(claims) if claims else prompt


def sample_prompts(count: int, seed: int, rich_fraction: float = 0.6, pair_fraction: float = 0.4) -> list[str]:
    """`count` distinct prompts, the first part of each longer list with the same seed; each is rich with `rich_fraction`."""
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = sample_scene(rng, pair_fraction)
        rich = rng.random() < rich_fraction
        prompts.setdefault(rich_caption(scene, rng) if rich else plain_caption(scene))
    return list(prompts)


def vocabulary() -> list[str]:
    """Every word that either language can say: what the tokenizer must hold whole."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, BACKGROUND_WORDS, STYLE_WORDS, RELATION_WORDS)
    spoken = [word for table in tables for words in table.values() for word in words]
    frame = "a an and on against background of size that looks sits look in finish"
    return sorted(set(" ".join([*spoken, *BACKGROUNDS, *GROUND_NOUNS, *_OPENINGS, *_ENDINGS, frame]).split()))
