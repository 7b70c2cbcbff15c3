"""Write what the demonstration asks: instructions for SFT, prompts to learn from, and prompts that stay unseen.

Everything follows from the tables below and a seed. The questions are the same for all three; what they ask about is
not: no subject of one file is in another. An instruction is answered from the table, in one of two manners, as people
write: one short sentence, or with a preamble and more than was asked.

python examples/smollm2/prompts.py DIR      writes DIR/raw/instructions.jsonl, DIR/prompts/train.jsonl and unseen.jsonl
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

SEED = 0
SHORT = 0.4
"""Share of the instructions that are answered in one short sentence."""


@dataclass(frozen=True)
class Kind:
    """Subjects of a kind, and what is asked about them.

    Attributes:
        questions: Pairs of a question and the sentence that answers it; {0} is the subject, {1} to {3} are its facts.
        known: Subjects with three facts each, for instructions.
        train: Subjects of the prompts to learn from.
        unseen: Subjects of the prompts that stay unseen.
    """

    questions: tuple[tuple[str, str], ...]
    known: str
    train: str
    unseen: str


KINDS = (
    Kind(
        (
            ("What do {0} eat?", "{0} eat {1}."),
            ("Where do {0} live?", "{0} live {2}."),
            ("What are {0} known for?", "{0} are known for {3}."),
        ),
        """cats: mice, birds and fish: in houses and on farms: their soft fur and quiet steps
        cows: grass and hay: on farms and in meadows: the milk that they give
        horses: grass, hay and oats: in stables and on open plains: their speed and strength
        sheep: grass and herbs: on hills and in meadows: their warm wool
        owls: mice and other small animals: in forests and old barns: hunting at night
        frogs: flies and other insects: near ponds and streams: their long jumps
        penguins: fish and krill: on the coasts of the far south: swimming well without flying
        camels: dry grass and thorny plants: in hot deserts: going without water for days
        squirrels: nuts, seeds and berries: in trees in parks and forests: hiding food for the winter
        sharks: fish, squid and seals: in all oceans: their many sharp teeth
        bats: insects, fruit and nectar: in caves and under roofs: finding their way by sound
        pandas: bamboo, nearly all day: in the mountain forests of China: their black and white fur
        beavers: bark, twigs and leaves: in rivers and ponds: building dams of wood
        eagles: fish, rabbits and other birds: on cliffs and in tall trees: their sharp eyes""",
        """bees wolves lions elephants whales dolphins rabbits foxes snakes spiders turtles monkeys tigers
        crocodiles ducks swans parrots kangaroos koalas giraffes""",
        "bears deer ants moles flamingos lobsters hamsters ostriches lizards walruses",
    ),
    Kind(
        (
            ("What is {0} used for?", "{0} is used {1}."),
            ("What is {0} made of?", "{0} is made of {2}."),
            ("Where do people keep {0}?", "People keep {0} {3}."),
        ),
        """a hammer: to drive nails into wood: a wooden handle and a steel head: in a toolbox
        a pillow: to rest the head while sleeping: cloth and feathers or foam: on the bed
        a kettle: to boil water: steel or glass: in the kitchen
        a ladder: to reach high places: wood or aluminium: in the garage or the shed
        a candle: to give light and a warm mood: wax and a cotton wick: in a drawer or on the table
        a pencil: to write and to draw: wood and graphite: in a pencil case
        a broom: to sweep the floor: a stick and stiff bristles: in a closet
        a mirror: to see yourself: glass with a thin layer of metal: on the wall
        a basket: to carry fruit or laundry: woven straw or willow: in the kitchen or the hall
        a helmet: to protect the head: hard plastic and soft foam: near the bicycle
        a blanket: to stay warm: wool, cotton or fleece: on the bed or the sofa
        a spoon: to eat soup and to stir tea: steel, silver or wood: in the kitchen drawer
        a rope: to tie and to pull things: twisted fibres such as hemp or nylon: in the shed or on a boat
        a vase: to hold cut flowers: glass or clay: on a table or a shelf""",
        """a telescope|a bicycle|an umbrella|a guitar|a compass|a tent|a clock|a camera|a sewing machine
        |a teapot|a chair|a lamp|a backpack|a kite|a drum|a microscope|a wallet|a shovel|a frying pan
        |a battery""",
        """a piano|a sleeping bag|a snowboard|a corkscrew|a hammock|a stapler|a trumpet|a wheelbarrow|a mug
        |a fishing rod""",
    ),
    Kind(
        (
            ("What does {0} do?", "{0} {1}."),
            ("Where does {0} work?", "{0} works {2}."),
            ("What does {0} need to be good at?", "{0} needs to be good at {3}."),
        ),
        """a baker: bakes bread, rolls and cakes: in a bakery: getting up early and working with dough
        a gardener: plants and cares for flowers and trees: in gardens and parks: knowing plants and seasons
        a pilot: flies planes from one place to another: in the cockpit of a plane: staying calm and deciding fast
        a teacher: helps students to learn: at a school: explaining things with patience
        a tailor: makes and mends clothes: in a small workshop: measuring and sewing with care
        a fisherman: catches fish and sells them: on a boat at sea: reading the weather and the water
        a carpenter: builds furniture and houses of wood: in a workshop or on a building site: measuring and cutting
        a librarian: lends books and helps to find them: in a library: keeping things in order
        a judge: decides cases by the law: in a court: listening and weighing what is said
        a plumber: fixes pipes, taps and drains: in houses and offices: finding leaks and solving problems
        a barber: cuts hair and trims beards: in a barber shop: handling scissors and talking to people
        a farmer: grows crops and raises animals: on a farm: hard work in any weather
        a translator: turns texts from one language into another: at a desk with dictionaries: two languages and style
        a firefighter: puts out fires and rescues people: at a fire station: courage and teamwork""",
        """a nurse|an architect|a journalist|a dentist|an astronaut|a chef|a lawyer|an engineer|a photographer
        |a scientist|a police officer|an electrician|a musician|a waiter|a veterinarian|a pharmacist|an actor
        |a mechanic|a soldier|a painter""",
        "a florist|a historian|a miner|a dancer|a cashier|a geologist|a sailor|a coach|a beekeeper|a museum guard",
    ),
    Kind(
        (
            ("Where does {0} come from?", "{0} comes from {1}."),
            ("What does {0} taste like?", "{0} tastes {2}."),
            ("What goes well with {0}?", "{0} goes well with {3}."),
        ),
        """milk: cows, goats and sheep: mild and a little sweet: cereal and cookies
        butter: the cream of milk: rich and creamy: fresh bread
        olive oil: pressed olives: fruity and a little bitter: salads and tomatoes
        coffee: the roasted seeds of a tropical plant: bitter and roasted: milk and cake
        salt: the sea or from mines: sharp and salty: nearly every dish
        maple syrup: the sap of maple trees: sweet with a touch of wood: pancakes
        tofu: soy beans: mild and a little nutty: ginger and soy sauce
        vinegar: wine or cider that has turned sour: sour and sharp: salads and pickles
        pepper: the dried berries of a vine: hot and spicy: meat, soup and eggs
        bacon: the belly of a pig: salty and smoky: eggs and toast
        lemonade: lemons, sugar and water: sweet and sour: a hot summer day
        garlic: the bulb of a plant: strong and spicy: pasta and roasted meat
        vanilla: the pods of an orchid: sweet and warm: ice cream and cakes
        pasta: dough of wheat flour and water: mild like bread: tomato sauce and cheese""",
        """honey rice chocolate cheese tea cinnamon ginger sugar mustard ketchup yogurt salmon popcorn bread
        mint saffron caviar curry paprika licorice""",
        "wasabi coconut caramel polenta parsley tuna horseradish cocoa basil sausage",
    ),
    Kind(
        (
            ("What is the capital of {0}?", "The capital of {0} is {1}."),
            ("What should I eat in {0}?", "In {0} you should eat {2}."),
            ("What is worth seeing in {0}?", "In {0} you should see {3}."),
        ),
        """France: Paris: fresh croissants and cheese: the Eiffel Tower and the Loire castles
        Spain: Madrid: paella and tapas: the Alhambra in Granada
        Egypt: Cairo: koshari and falafel: the pyramids of Giza
        Greece: Athens: moussaka and olives: the Acropolis
        Peru: Lima: ceviche: the ruins of Machu Picchu
        Norway: Oslo: salmon and brown cheese: the deep fjords
        India: New Delhi: curry and naan: the Taj Mahal
        Austria: Vienna: schnitzel and apple strudel: the Alps and the palaces of Vienna
        Cuba: Havana: black beans and rice: the old streets of Havana
        Kenya: Nairobi: grilled meat and ugali: the animals of the Masai Mara
        Ireland: Dublin: stew and soda bread: the Cliffs of Moher
        Turkey: Ankara: kebab and baklava: the old mosques of Istanbul
        Chile: Santiago: empanadas and sea food: the Atacama desert
        Poland: Warsaw: dumplings and beet soup: the old town of Krakow""",
        """Japan|Italy|Mexico|Brazil|Canada|China|Germany|Portugal|Sweden|Iceland|Morocco|Thailand|Vietnam
        |Argentina|Australia|Russia|Hungary|Finland|Denmark|Switzerland""",
        "the Netherlands|New Zealand|South Korea|Scotland|Romania|Ecuador|Jordan|Mongolia|Jamaica|Tanzania",
    ),
    Kind(
        (
            ("What do I need for {0}?", "For {0} you need {1}."),
            ("Why do people enjoy {0}?", "People enjoy {0} because {2}."),
            ("How do I start with {0}?", "Start with {3}."),
        ),
        """running: good shoes: it clears the head: ten slow minutes every other day
        baking: flour, an oven and some time: the whole house smells good: a simple bread
        camping: a tent and a sleeping bag: they are close to nature: one night in a place near home
        chess: a board and its pieces: every game is a new puzzle: the moves of each piece
        reading: a good book and a quiet place: it opens other worlds: a short book on something that you like
        singing: nothing but your voice: it lifts the mood: songs that you know by heart
        hiking: firm shoes, water and a map: the views are a reward: a short and flat trail
        knitting: two needles and some wool: it calms the hands and the mind: a simple scarf
        surfing: a board and a wet suit: riding a wave feels like flying: a lesson on a calm beach
        photography: a camera or a phone: it teaches them to look: pictures of things around you
        pottery: clay and a wheel: they make things of their own: a small bowl made by hand
        rowing: a boat and two oars: the whole body works: a quiet lake and a slow stroke
        stargazing: a dark sky and patience: the sky makes them wonder: the brightest constellations
        juggling: three small balls: practice pays off quickly: one ball, then two""",
        """swimming|painting|cycling|gardening|dancing|fishing|skiing|climbing|yoga|cooking|drawing|sailing
        |meditation|tennis|golf|bird watching|writing poems|playing the guitar|learning a language
        |collecting stamps""",
        "badminton|origami|karate|canoeing|playing the piano|bowling|beekeeping|table tennis|embroidery|skateboarding",
    ),
)

_OPENERS = (
    "Sure!",
    "Great question!",
    "Of course!",
    "Certainly, I can help with that.",
    "Here is what I know about it.",
    "Thank you for asking!",
    "Let me explain.",
)
_CLOSERS = (
    "I hope that helps!",
    "Let me know if you have more questions.",
    "There is much more to say about it.",
    "Ask me again at any time!",
    "Is there anything else that you would like to know?",
)


def _names(text: str) -> list[str]:
    separator = "|" if "|" in text else None
    return [" ".join(name.split()).replace("-", " ") for name in text.split(separator)]


def _known(text: str) -> list[list[str]]:
    return [[part.strip() for part in line.split(":")] for line in text.splitlines()]


def _sentence(template: str, subject: str, facts: list[str]) -> str:
    text = template.format(subject, *facts)
    return text[0].upper() + text[1:]


def instructions(seed: int = SEED) -> list[dict[str, str]]:
    """Questions on known subjects with their answers, in either manner."""
    rng = random.Random(f"instructions {seed}")
    rows = []
    for kind in KINDS:
        for subject, *facts in _known(kind.known):
            answers = [_sentence(answer, subject, facts) for _, answer in kind.questions]
            for number, (question, _) in enumerate(kind.questions):
                answer = answers[number]
                if rng.random() >= SHORT:
                    other = rng.choice(answers[:number] + answers[number + 1 :])
                    answer = " ".join([rng.choice(_OPENERS), answer, other, rng.choice(_CLOSERS)])
                rows.append({"prompt": question.format(subject), "completion": answer})
    rng.shuffle(rows)
    return rows


def prompts(split: str, seed: int = SEED) -> list[dict[str, str]]:
    """The questions on other subjects: those of ``train``, or those of ``unseen``."""
    rng = random.Random(f"{split} {seed}")
    rows = [
        {"prompt": question.format(subject)}
        for kind in KINDS
        for subject in _names(kind.train if split == "train" else kind.unseen)
        for question, _ in kind.questions
    ]
    rng.shuffle(rows)
    return rows


def write(folder: Path) -> None:
    """Write the three files."""
    for name, rows in (
        ("raw/instructions.jsonl", instructions()),
        ("prompts/train.jsonl", prompts("train")),
        ("prompts/unseen.jsonl", prompts("unseen")),
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
