"""Plain captions and rich prompts for scenes, and a parser that reads both.

The base model learns from plain captions; rich prompts stand for what people write (see the package's docstring).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from textcraftor.tiny.scenes import BACKGROUNDS, OPPOSITE_RELATION, Scene, SceneObject, sample_scene

# Plain word -> its synonyms, itself first.
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
BACKGROUND_NOUNS: Final = ("background", "backdrop", "wall", "canvas")
_OPENINGS = ("a picture of", "an image of", "a photo showing", "please draw", "i would like", "a nice view of", "imagine")
_ENDINGS = ("highly detailed", "masterpiece", "best quality", "for my room", "thank you", "trending")


def _synonym_index(table: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: plain for plain, words in table.items() for word in words}


_COLOUR, _SHAPE, _SIZE = _synonym_index(COLOUR_WORDS), _synonym_index(SHAPE_WORDS), _synonym_index(SIZE_WORDS)
_BACKGROUND, _STYLE, _RELATION = _synonym_index(BACKGROUND_WORDS), _synonym_index(STYLE_WORDS), _synonym_index(RELATION_WORDS)


def _alternatives(words: Sequence[str]) -> str:
    # Longest first, so that "on the left side of" is never read as "left of" with something before it.
    return "(?:" + "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) + ")"


_RELATION_PATTERN = re.compile(rf"\b{_alternatives(list(_RELATION))}\b")
_BACKGROUND_PATTERN = re.compile(
    rf"(?:\b(?:on|against|before|over|in front of|with)\s+)?(?:\b(?:a|an|the)\s+)?"
    rf"\b({_alternatives(list(_BACKGROUND))})\s+{_alternatives(BACKGROUND_NOUNS)}\b"
)
_OBJECT_BOUNDARY = re.compile(r"\b(?:a|an|the|one|sits|next|beside)\b|;")
_CONJUNCTION = re.compile(r"\b(?:and|with|is)\b")
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True, slots=True)
class Claims:
    """What a prompt says about its picture; None marks what it does not say.

    Not canonical: "B right of A" and "A left of B" give different claims that hold for the same pictures.
    """

    objects: tuple[SceneObject, ...]
    relation: str | None
    background: str | None
    style: str | None


def scene_claims(scene: Scene) -> Claims:
    """The complete claims about a scene."""
    return Claims(scene.objects, scene.relation, scene.background, scene.style)


def _plain_object(obj: SceneObject) -> str:
    return " ".join(["a", *(word for word in (obj.size, obj.colour, obj.shape) if word)])


def plain_caption(content: Scene | Claims) -> str:
    """The plain caption: "a small red circle left of a large blue square on a white background, glossy".

    Fields of claims that are None are left out.
    """
    text = _plain_object(content.objects[0])
    if len(content.objects) > 1:
        text += f" {content.relation or 'and'} {_plain_object(content.objects[1])}"
    if content.background:
        text += f" on a {content.background} background"
    return text + (f", {content.style}" if content.style else "")


def _choose(rng: np.random.Generator, words: Sequence[str]) -> str:
    return words[int(rng.integers(len(words)))]


def _with_article(text: str) -> str:
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _rich_object(obj: SceneObject, rng: np.random.Generator, style: str | None) -> str:
    # Uniform over synonyms, so that the plain word is no more frequent than any other.
    colour = _choose(rng, COLOUR_WORDS[obj.colour or "red"])
    shape = _choose(rng, SHAPE_WORDS[obj.shape or "circle"])
    size = _choose(rng, SIZE_WORDS[obj.size or "small"])
    prefix = f"{style} " if style else ""
    match int(rng.integers(6)):
        case 0:
            return _with_article(f"{prefix}{colour} {shape} of {size} size")
        case 1:
            return _with_article(f"{prefix}{shape}, {colour} and {size},")
        case 2:
            return _with_article(f"{prefix}{colour} and {size} {shape}")
        case 3:
            return _with_article(f"{prefix}{shape} that looks {size} and {colour}")
        case _:
            return _with_article(f"{prefix}{size} {colour} {shape}")


def rich_caption(scene: Scene, rng: np.random.Generator, omit: float = 0.1) -> str:
    """A random rich prompt for a scene: synonyms, other word orders, filler.

    omit: probability of leaving out the background, and likewise the style.  `parse` reads every such prompt.
    """
    style = None if rng.random() < omit else _choose(rng, STYLE_WORDS[scene.style])
    background = None if rng.random() < omit else _choose(rng, BACKGROUND_WORDS[scene.background])
    style_in_front = style is not None and len(scene.objects) == 1 and rng.random() < 0.4
    objects = [_rich_object(obj, rng, style if style_in_front else None) for obj in scene.objects]
    text = objects[0]
    inverted = False
    if scene.relation:
        match int(rng.integers(3)):
            case 0:
                inverted = True
                text = f"{_choose(rng, RELATION_WORDS[scene.relation])} {objects[1]} sits {objects[0]}"
            case 1:
                text = f"{objects[1]} {_choose(rng, RELATION_WORDS[OPPOSITE_RELATION[scene.relation]])} {objects[0]}"
            case _:
                text = f"{objects[0]} {_choose(rng, RELATION_WORDS[scene.relation])} {objects[1]}"
    if not inverted and rng.random() < 0.4:
        text = f"{_choose(rng, _OPENINGS)} {text}"
    if background:
        phrase = f"{_with_article(background)} {_choose(rng, BACKGROUND_NOUNS)}"
        text = f"on {phrase}, {text}" if rng.random() < 0.35 else f"{text} {_choose(rng, ('on', 'against'))} {phrase}"
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


def _parse_object(text: str) -> SceneObject | None:
    words = _WORD.findall(text)
    shape = next((_SHAPE[word] for word in words if word in _SHAPE), None)
    if shape is None:
        return None
    colour = next((_COLOUR[word] for word in words if word in _COLOUR), None)
    size = next((_SIZE[word] for word in words if word in _SIZE), None)
    return SceneObject(colour, shape, size)


def _parse_objects(text: str) -> list[SceneObject]:
    """Objects in the order of the text.  A part next to "and", "with" or "is" that names no shape belongs to its neighbour."""
    objects: list[str] = []
    for part in _OBJECT_BOUNDARY.split(text):
        pieces: list[str] = []
        for piece in _CONJUNCTION.split(part):
            if pieces and (_parse_object(pieces[-1]) is None or _parse_object(piece) is None):
                pieces[-1] += " " + piece
            else:
                pieces.append(piece)
        objects += pieces
    return [obj for obj in map(_parse_object, objects) if obj is not None]


def parse(prompt: str) -> Claims | None:
    """The claims of a plain or rich prompt, or None when it names no object of the tiny world.  Never raises."""
    text = " ".join(prompt.lower().split())
    background = _BACKGROUND_PATTERN.search(text)
    text = _BACKGROUND_PATTERN.sub(" ; ", text)
    style = next((_STYLE[word] for word in _WORD.findall(text) if word in _STYLE), None)
    link = _RELATION_PATTERN.search(text)
    before, after = (text[: link.start()], text[link.end() :]) if link else (text, "")
    objects, references = _parse_objects(before), _parse_objects(after)
    relation = _RELATION[link.group()] if link else None
    if not objects and len(references) > 1:  # "left of B sits A"
        objects, references = references[1:], references[:1]
    pair = (objects[:1] + references[:1]) if objects and references else (objects or references)[:2]
    if not pair:
        return None
    return Claims(
        tuple(pair),
        relation if objects and references else None,
        _BACKGROUND[background.group(1)] if background else None,
        style,
    )


def claim_words(claims: Claims) -> dict[str, str]:
    """Each claim in a word or two, by the names of the oracle's verdicts: "count" -> "2 objects", "shape.2" -> "star"."""
    words = {"count": "1 object" if len(claims.objects) == 1 else f"{len(claims.objects)} objects"}
    for number, obj in enumerate(claims.objects, start=1):
        named = {"size": obj.size, "colour": obj.colour, "shape": obj.shape}
        words |= {f"{kind}.{number}": word for kind, word in named.items() if word}
    rest = {"relation": claims.relation, "background": claims.background, "style": claims.style}
    return words | {kind: word for kind, word in rest.items() if word}


def reword(prompt: str) -> str:
    """The plain caption of a prompt's claims: prompt engineering in the tiny world.  Other prompts are returned unchanged."""
    claims = parse(prompt)
    return plain_caption(claims) if claims else prompt


def sample_prompts(
    count: int, seed: int, rich_fraction: float = 0.6, pair_fraction: float = 0.4, omit: float = 0.1
) -> list[str]:
    """Draw `count` distinct prompts; each is rich with probability `rich_fraction`, else plain.

    pair_fraction: share with two objects.  omit: as in `rich_caption`.  A longer list with the same seed starts with the
    shorter one.
    """
    rng = np.random.default_rng(seed)
    prompts: dict[str, None] = {}
    while len(prompts) < count:
        scene = sample_scene(rng, pair_fraction)
        rich = rng.random() < rich_fraction
        prompts.setdefault(rich_caption(scene, rng, omit) if rich else plain_caption(scene))
    return list(prompts)


def vocabulary() -> list[str]:
    """Every word of plain captions and rich prompts, sorted; the tokenizer has one token for each."""
    tables = (COLOUR_WORDS, SHAPE_WORDS, SIZE_WORDS, BACKGROUND_WORDS, STYLE_WORDS, RELATION_WORDS)
    synonyms = [word for table in tables for words in table.values() for word in words]
    function_words = "a an and on against background of size that looks sits look in finish"
    phrases = [*synonyms, *BACKGROUNDS, *BACKGROUND_NOUNS, *_OPENINGS, *_ENDINGS, function_words]
    return sorted(set(" ".join(phrases).split()))
