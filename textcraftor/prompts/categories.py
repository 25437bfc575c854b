"""A coarse category for each prompt, to stratify the evaluation and to see which kind of prompt a candidate fails at.

In the tiny world the category is the prompt's language and its number of objects. Elsewhere it is that of the first word
found in the lists below, because people usually name the subject before its surroundings; `other` if no word is found.
"""

from typing import Final, Literal

import polars as pl

from textcraftor.prompts.text import normalise
from textcraftor.tiny.language import parse, plain_caption

World = Literal["any", "tiny"]

# Singular forms; plurals in -s or -es are recognised too.
WORDS: Final[dict[str, str]] = {
    "people": """
        man men woman women person people boy girl child children kid baby lady gentleman guy face couple
        family crowd friend king queen prince princess knight warrior soldier samurai ninja pirate wizard
        witch sorcerer priest monk angel doctor nurse teacher chef astronaut dancer player actor actress
        singer musician artist scientist politician president hero superhero villain goddess god elf dwarf
        vampire zombie human""",
    "animals": """
        animal dog puppy cat kitten bird horse cow bull sheep goat pig chicken duck owl eagle parrot penguin
        fish shark whale dolphin octopus turtle frog snake lizard crocodile dinosaur dragon lion tiger leopard
        cheetah bear panda koala wolf wolves fox rabbit bunny mouse mice rat squirrel hamster monkey gorilla
        elephant giraffe zebra rhino hippo kangaroo camel deer moose raccoon corgi poodle insect bee butterfly
        butterflies ant spider crab lobster unicorn pony cattle swan crow raven bat hedgehog""",
    "food": """
        food meal breakfast lunch dinner pizza burger sandwich sushi bread cake cookie pie donut doughnut
        chocolate cheese egg soup salad pasta noodle rice steak meat fruit vegetable apple banana orange lemon
        strawberry cherry grape pear tomato potato carrot broccoli avocado pumpkin coffee tea wine beer juice
        milk cocktail dessert taco pancake waffle""",
    "vehicles": """
        car truck bus train tram bicycle bike motorcycle motorbike scooter airplane aeroplane plane jet
        helicopter rocket spaceship spacecraft starship boat ship sailboat yacht submarine tractor van taxi
        tank vehicle locomotive subway skateboard""",
    "places": """
        landscape city cityscape town village street road bridge castle palace temple church cathedral tower
        building house home cabin room kitchen bathroom bedroom library museum restaurant cafe shop store
        station airport farm field forest jungle desert beach ocean sea lake river waterfall mountain hill
        valley canyon island sky skyline cloud garden park planet moon galaxy space universe ruin cave
        interior architecture sunset sunrise scenery""",
    "plants": """
        plant flower rose tulip sunflower lily daisy orchid tree leaf leaves grass cactus mushroom bouquet moss vine""",
    "text": """
        text word letter sign logo poster sentence alphabet typography font caption writing written newspaper
        billboard""",
    "objects": """
        book table chair sofa couch desk bed bench lamp clock watch phone computer laptop keyboard television
        tv camera robot machine cup mug bowl plate bottle glass vase fork knife spoon box bag backpack
        suitcase umbrella hat shirt dress shoe tie jacket ball toy doll guitar piano violin sword gun weapon
        armor helmet mask crown ring jewelry statue sculpture window door mirror sink toilet oven refrigerator
        microwave toaster scissors toothbrush candle balloon cube sphere pyramid""",
    "abstract": """
        abstract idea dream emotion love hate fear anger joy sadness happiness peace war death life
        time infinity freedom chaos pattern fractal geometry geometric energy soul mind thought nothing hope
        memory""",
}
ANY_CATEGORIES: Final = (*WORDS, "other")
TINY_CATEGORIES: Final = ("plain_one", "plain_two", "rich_one", "rich_two")


def categories(world: World) -> tuple[str, ...]:
    """Every category that `classify` can return for this world."""
    return TINY_CATEGORIES if world == "tiny" else ANY_CATEGORIES


def classify(prompts: pl.Series, world: World) -> pl.Series:
    """The category of each prompt. Raises ValueError for a prompt that is not of the tiny world, where that is the world."""
    if world == "tiny":
        return pl.Series("category", [_tiny_category(prompt) for prompt in prompts], dtype=pl.String)
    known = {word: name for name, words in WORDS.items() for word in words.split()}
    first = prompts.str.to_lowercase().str.extract(rf"\b({'|'.join(known)})(?:s|es)?\b")
    return first.replace_strict(known, default="other", return_dtype=pl.String).alias("category")


def _tiny_category(prompt: str) -> str:
    claims = parse(prompt)
    if claims is None:
        raise ValueError(f"not a prompt of the tiny world: {prompt!r}")
    language = "plain" if normalise(prompt) == normalise(plain_caption(claims)) else "rich"
    return f"{language}_{'one' if len(claims.objects) == 1 else 'two'}"
