"""Things to know about the concepts, in words only: never paired with a picture, so drawing from them is a test.

Comes out: ``Fact`` records (question, answer) for training, and ``Riddle`` records ("the animal that says moo" and the
concept meant) for the reasoning test. All of it written for this project.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from unilip.data.seeding import stable_hash
from unilip.emoji.concepts import concept
from unilip.emoji.world import World

# concept: what kind of thing, then what is true of it and of no other concept here, as in "the KIND that CLUE"
CLUES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cat": ("animal", ("says meow", "purrs when it is happy", "chases mice", "has whiskers and loves milk")),
    "dog": ("animal", ("says woof", "wags its tail when you come home", "buries bones", "guards the house and barks")),
    "pig": ("animal", ("says oink", "rolls in the mud", "has a curly tail", "lives on a farm and has a flat snout")),
    "frog": (
        "animal",
        (
            "says ribbit",
            "jumps from one lily pad to the next",
            "grows out of a tadpole",
            "catches flies with its long tongue",
        ),
    ),
    "panda": ("animal", ("eats bamboo", "is black and white and lives in China", "is a black and white bear")),
    "lion": ("animal", ("is the king of the animals", "has a big mane", "roars in the savanna")),
    "penguin": (
        "bird",
        (
            "cannot fly but swims in icy water",
            "looks as if it wears a black suit",
            "lives at the south pole",
            "waddles over the ice",
        ),
    ),
    "fish": ("animal", ("has scales and fins", "breathes with gills", "swims in a bowl at home")),
    "butterfly": (
        "insect",
        (
            "was a caterpillar before",
            "has large colorful wings",
            "comes out of a cocoon",
            "flutters from flower to flower",
        ),
    ),
    "turtle": (
        "animal",
        ("carries its house of hard shell and walks slowly", "hides in its shell", "won the race against the hare"),
    ),
    "whale": ("animal", ("is the largest in the ocean", "blows water out of its back", "is a giant mammal of the sea")),
    "octopus": ("animal", ("has eight arms", "squirts ink", "has suckers on its arms")),
    "sunflower": (
        "flower",
        ("turns its head to the sun", "gives seeds that birds and people eat", "is tall and has yellow petals"),
    ),
    "rose": ("flower", ("has thorns", "is given on Valentine's day", "is the flower of love")),
    "cactus": ("plant", ("grows in the desert", "has spines instead of leaves", "needs almost no water")),
    "tree": ("plant", ("has a trunk and many leaves", "grows in a forest", "gives shade and wood")),
    "mushroom": (
        "thing",
        ("grows in the forest and has a cap", "is neither a plant nor an animal", "has a stem and a round cap"),
    ),
    "red apple": ("fruit", ("Snow White bit into", "keeps the doctor away", "fell on Newton's head")),
    "banana": ("fruit", ("monkeys like", "is long, curved and yellow", "you peel before you eat it")),
    "strawberry": ("fruit", ("has its seeds on the outside", "is small, red and good with cream")),
    "watermelon": (
        "fruit",
        (
            "is green outside and red inside",
            "is large, juicy and full of black seeds",
            "people slice on a hot summer day",
        ),
    ),
    "slice of pizza": (
        "food",
        ("comes from Italy and has melted cheese on top", "is a triangle with tomato and cheese", "is baked in Naples"),
    ),
    "donut": ("food", ("has a hole in the middle", "is a sweet ring with icing")),
    "hamburger": ("food", ("has a meat patty between two buns", "people order with french fries")),
    "car": (
        "vehicle",
        ("has four wheels and drives on the road", "a family drives to work and to school", "is parked in a garage"),
    ),
    "bus": (
        "vehicle",
        ("takes many people through the city", "takes children to school", "stops so that passengers can get on"),
    ),
    "airplane": ("vehicle", ("has two wings and flies", "a pilot flies", "takes off from an airport")),
    "rocket": ("vehicle", ("flies to the moon", "takes astronauts into space", "starts after a countdown")),
    "sailboat": ("vehicle", ("is pushed over the water by the wind", "has a mast and sails")),
    "bicycle": ("vehicle", ("has two wheels and pedals", "you ride by pushing pedals", "has handlebars and no engine")),
    "house": ("building", ("a family lives in", "has a door, windows and a roof", "people call home")),
    "umbrella": ("thing", ("keeps you dry in the rain", "you open when it rains", "Mary Poppins flies with")),
    "balloon": ("thing", ("is filled with air and floats", "bursts with a loud bang", "children hold on a string")),
    "gift box": (
        "thing",
        ("is wrapped and opened on a birthday", "lies under the tree at Christmas", "hides a present"),
    ),
    "bell": ("thing", ("goes ding dong", "rings in a church tower", "is shaken to make it ring")),
    "crown": ("thing", ("a king wears on his head", "shows who is the king", "is made of gold and worn by a queen")),
    "guitar": ("instrument", ("has six strings", "a rock star plays", "is strummed at a campfire")),
    "soccer ball": ("thing", ("players kick into a goal", "is used at the World Cup", "is kicked and not thrown")),
    "sun": ("thing", ("shines by day", "warms the earth", "rises in the east", "is at the center of our planets")),
    "star": (
        "thing",
        ("twinkles at night", "has five points", "shines in the sky at night, far away", "you make a wish upon"),
    ),
    "heart": ("shape", ("stands for love", "people draw on Valentine's cards", "beats in your chest")),
    "circle": ("shape", ("is perfectly round", "has no corners", "a wheel has")),
    "square": ("shape", ("has four equal sides", "has four right angles and equal sides")),
    "triangle": ("shape", ("has three sides", "has three corners", "a pyramid shows from the side")),
    "fox": ("animal", ("is sly and has a red bushy tail", "steals hens in stories")),
    "bear": ("animal", ("sleeps all winter and loves honey", "catches salmon in a river")),
    "koala": ("animal", ("sleeps in eucalyptus trees", "lives in Australia and eats eucalyptus")),
    "tiger": ("animal", ("is a big cat with stripes", "is orange with black stripes")),
    "cow": ("animal", ("says moo", "gives us milk", "chews grass all day")),
    "monkey": ("animal", ("swings from branch to branch", "loves bananas")),
    "rabbit": ("animal", ("has long ears and hops", "eats carrots and hops", "a magician pulls out of a hat")),
    "mouse": ("animal", ("squeaks and loves cheese", "the cat chases")),
    "wolf": ("animal", ("howls at the moon", "blew down the houses of the three little pigs")),
    "raccoon": ("animal", ("wears a black mask and raids trash cans",)),
    "unicorn": ("animal", ("has one horn and is magical", "is a horse with a horn")),
    "horse": ("animal", ("says neigh", "a cowboy rides", "gallops and wears a saddle")),
    "zebra": ("animal", ("looks like a horse with stripes", "is black and white and striped")),
    "deer": ("animal", ("has antlers", "pulls the sleigh of Santa")),
    "elephant": ("animal", ("has a trunk and big ears", "never forgets", "is the largest on land")),
    "giraffe": ("animal", ("has a very long neck", "eats leaves from the tops of trees")),
    "camel": ("animal", ("carries people through the desert", "has a hump")),
    "kangaroo": ("animal", ("carries its baby in a pouch", "hops through Australia")),
    "sheep": ("animal", ("says baa", "gives us wool", "you count to fall asleep")),
    "hedgehog": ("animal", ("rolls up into a spiny ball",)),
    "bat": ("animal", ("sleeps upside down", "hunts at night by echo")),
    "squirrel": ("animal", ("collects nuts for the winter",)),
    "crocodile": ("animal", ("waits in the river with many sharp teeth",)),
    "snake": ("animal", ("hisses and has no legs", "slithers over the ground")),
    "dragon": ("animal", ("breathes fire", "guards a treasure in fairy tales")),
    "dinosaur": ("animal", ("died out millions of years ago", "we know only from fossils")),
    "dolphin": ("animal", ("is clever and leaps out of the sea",)),
    "tropical fish": ("animal", ("lives in a coral reef and is colorful",)),
    "shark": ("animal", ("has a fin that swimmers fear", "is the hunter of the sea with rows of teeth")),
    "crab": ("animal", ("walks sideways", "has two claws and lives on the beach")),
    "lobster": ("animal", ("has big claws and turns red when it is cooked",)),
    "snail": ("animal", ("is slow and carries a spiral house", "leaves a trail of slime")),
    "caterpillar": ("insect", ("eats leaves and becomes a butterfly",)),
    "bee": ("insect", ("makes honey", "buzzes and can sting")),
    "ladybug": ("insect", ("is red with black dots",)),
    "spider": ("animal", ("spins a web", "has eight legs")),
    "rooster": ("bird", ("says cock-a-doodle-doo", "wakes the farm in the morning")),
    "chick": ("bird", ("just came out of its egg", "is the baby of a hen")),
    "owl": ("bird", ("says hoo", "is wise and awake at night")),
    "duck": ("bird", ("says quack",)),
    "eagle": ("bird", ("is on the coat of arms of the United States", "soars high and sees very well")),
    "parrot": ("bird", ("repeats what you say", "sits on a pirate's shoulder")),
    "flamingo": ("bird", ("is pink and stands on one leg",)),
    "peacock": ("bird", ("shows a fan of colorful feathers",)),
    "seashell": ("thing", ("you find on the beach", "lets you hear the sea")),
    "tulip": ("flower", ("grows in the fields of Holland",)),
    "cherry blossom": ("flower", ("Japan celebrates in spring",)),
    "bouquet": ("thing", ("a bride throws", "is a bunch of flowers")),
    "palm tree": ("plant", ("grows on a tropical beach", "has coconuts")),
    "pine tree": ("plant", ("has needles and cones",)),
    "four leaf clover": ("plant", ("brings luck",)),
    "maple leaf": ("thing", ("is on the flag of Canada",)),
    "potted plant": ("plant", ("stands on the window sill and wants to be watered",)),
    "green apple": ("fruit", ("is sour, green and crunchy",)),
    "pear": ("fruit", ("has the shape of a light bulb and is sweet",)),
    "orange": ("fruit", ("has the same name as its color", "is pressed for juice at breakfast")),
    "lemon": ("fruit", ("is yellow and very sour",)),
    "bunch of grapes": ("fruit", ("wine is made from",)),
    "pair of cherries": ("fruit", ("hangs in twos on a tree",)),
    "peach": ("fruit", ("is fuzzy outside and has a large stone",)),
    "pineapple": ("fruit", ("wears a crown of leaves and has rough skin",)),
    "kiwi": ("fruit", ("is brown and hairy outside and green inside",)),
    "tomato": ("food", ("ketchup is made from",)),
    "eggplant": ("vegetable", ("is long and purple",)),
    "avocado": ("food", ("guacamole is made from",)),
    "broccoli": ("vegetable", ("looks like a little green tree",)),
    "carrot": ("vegetable", ("rabbits love", "is orange and grows under the ground", "is the nose of a snowman")),
    "ear of corn": ("vegetable", ("popcorn is made from", "grows yellow kernels on a cob")),
    "chili pepper": ("vegetable", ("burns in your mouth",)),
    "loaf of bread": ("food", ("a baker bakes every morning",)),
    "croissant": ("food", ("the French eat for breakfast",)),
    "pretzel": ("food", ("is a salty knot",)),
    "stack of pancakes": ("food", ("is eaten with maple syrup",)),
    "piece of cheese": ("food", ("has holes and is made from milk",)),
    "hot dog": ("food", ("is a sausage in a bun",)),
    "sandwich": ("food", ("has filling between two slices of bread",)),
    "taco": ("food", ("is a folded tortilla from Mexico",)),
    "egg": ("food", ("a hen lays", "comes before or after the chicken")),
    "fried egg": ("food", ("is white around and yellow in the middle",)),
    "bucket of popcorn": ("food", ("people eat in the cinema",)),
    "piece of sushi": ("food", ("is raw fish on rice",)),
    "bowl of noodles": ("food", ("is eaten with chopsticks out of a bowl",)),
    "plate of spaghetti": ("food", ("is long pasta with tomato sauce",)),
    "cookie": ("food", ("has chocolate chips", "Santa gets with milk")),
    "birthday cake": ("food", ("has candles to blow out",)),
    "chocolate bar": ("food", ("is made from cocoa",)),
    "lollipop": ("food", ("is candy on a stick",)),
    "ice cream cone": ("food", ("melts in the sun", "is cold, sweet and served in a cone")),
    "cup of coffee": ("drink", ("wakes you up in the morning",)),
    "teapot": ("thing", ("hot tea is poured from",)),
    "glass of milk": ("drink", ("comes from a cow",)),
    "mug of beer": ("drink", ("has foam on top",)),
    "baby bottle": ("thing", ("a baby drinks from",)),
    "taxi": ("vehicle", ("you hail in the street and pay by the mile",)),
    "police car": ("vehicle", ("chases thieves",)),
    "ambulance": ("vehicle", ("takes the sick to hospital",)),
    "fire truck": ("vehicle", ("comes when a house is burning",)),
    "truck": ("vehicle", ("carries heavy loads over long roads",)),
    "tractor": ("vehicle", ("pulls the plough on a farm",)),
    "racing car": ("vehicle", ("drives laps as fast as it can",)),
    "motorcycle": ("vehicle", ("has two wheels and a loud engine",)),
    "steam train": ("vehicle", ("says choo choo", "runs on rails and burns coal")),
    "bullet train": ("vehicle", ("runs on rails in Japan at great speed",)),
    "helicopter": ("vehicle", ("has a rotor and can hover",)),
    "flying saucer": ("vehicle", ("aliens come in",)),
    "speedboat": ("vehicle", ("races over the water with a motor",)),
    "ship": ("vehicle", ("crosses the ocean with many cabins",)),
    "hospital": ("building", ("doctors and nurses work in",)),
    "school": ("building", ("children learn in",)),
    "castle": ("building", ("knights and kings lived in",)),
    "church": ("building", ("weddings and prayers are held in",)),
    "tent": ("thing", ("campers sleep in",)),
    "ferris wheel": ("thing", ("turns slowly and gives a view over the fair",)),
    "volcano": ("place", ("spits lava",)),
    "desert island": ("place", ("a shipwrecked sailor lands on",)),
    "snowy mountain": ("place", ("climbers climb and skiers ski down",)),
    "crescent moon": ("thing", ("shines at night and is thin and curved",)),
    "cloud": ("thing", ("rain falls from", "is white and drifts across the sky")),
    "rainbow": ("thing", ("appears when sun meets rain", "has seven colors and a pot of gold at its end")),
    "snowflake": ("thing", ("has six arms and falls in winter",)),
    "snowman": ("thing", ("has a carrot for a nose", "melts in spring")),
    "flame": ("thing", ("is hot and burns on a match",)),
    "water drop": ("thing", ("falls from the tap",)),
    "lightning bolt": ("thing", ("comes before thunder",)),
    "tornado": ("thing", ("whirls and lifts up roofs",)),
    "wave": ("thing", ("surfers ride",)),
    "planet": ("thing", ("has rings and circles the sun",)),
    "globe": ("thing", ("shows all countries and can be spun",)),
    "basketball": ("thing", ("is thrown through a hoop",)),
    "american football": ("thing", ("is thrown in the Super Bowl",)),
    "baseball": ("thing", ("is hit with a bat for a home run",)),
    "boxing glove": ("thing", ("protects a boxer's hand",)),
    "trophy": ("thing", ("the winner gets",)),
    "kite": ("toy", ("flies on a string in the wind",)),
    "game controller": ("thing", ("you hold to play video games",)),
    "die": ("thing", ("has six sides with dots",)),
    "puzzle piece": ("thing", ("fits with others to make a picture",)),
    "teddy bear": ("toy", ("children hug in bed",)),
    "trumpet": ("instrument", ("is made of brass and has three valves",)),
    "saxophone": ("instrument", ("jazz players love",)),
    "violin": ("instrument", ("is played with a bow",)),
    "drum": ("instrument", ("is hit with sticks",)),
    "piano keyboard": ("instrument", ("has black and white keys",)),
    "microphone": ("thing", ("a singer sings into",)),
    "pair of headphones": ("thing", ("you wear to hear music alone",)),
    "top hat": ("thing", ("a magician wears",)),
    "backpack": ("thing", ("you carry on your shoulders to school",)),
    "ring": ("thing", ("is given at a wedding",)),
    "pair of glasses": ("thing", ("helps you read",)),
    "pair of sunglasses": ("thing", ("protects your eyes from the sun",)),
    "christmas tree": ("thing", ("is decorated in December",)),
    "pumpkin": ("thing", ("is carved at Halloween",)),
    "diamond": ("thing", ("is the hardest gem",)),
    "camera": ("thing", ("takes pictures",)),
    "television": ("thing", ("shows movies in the living room",)),
    "alarm clock": ("thing", ("rings to wake you up",)),
    "hourglass": ("thing", ("tells time with sand",)),
    "light bulb": ("thing", ("Edison made", "stands for a good idea")),
    "candle": ("thing", ("burns down slowly and smells of wax",)),
    "battery": ("thing", ("powers a toy",)),
    "envelope": ("thing", ("a letter is put into",)),
    "pencil": ("thing", ("you draw with and sharpen",)),
    "paintbrush": ("thing", ("a painter dips in paint",)),
    "pair of scissors": ("thing", ("cuts paper",)),
    "key": ("thing", ("opens a lock",)),
    "padlock": ("thing", ("is opened with a key",)),
    "hammer": ("tool", ("drives nails into wood",)),
    "wrench": ("tool", ("turns bolts",)),
    "magnet": ("thing", ("attracts iron",)),
    "ladder": ("thing", ("you climb up, rung by rung",)),
    "microscope": ("thing", ("makes tiny things look large",)),
    "telescope": ("thing", ("astronomers look at stars with",)),
    "bed": ("thing", ("you sleep in",)),
    "chair": ("thing", ("you sit on",)),
    "broom": ("thing", ("a witch flies on", "you sweep the floor with")),
    "toothbrush": ("thing", ("you clean your teeth with",)),
    "compass": ("thing", ("always points north",)),
    "anchor": ("thing", ("holds a ship in place",)),
    "bomb": ("thing", ("explodes when its fuse burns down",)),
    "shield": ("thing", ("protects a knight",)),
    "traffic light": ("thing", ("shows red, yellow and green",)),
    "stop sign": ("sign", ("tells drivers to stop",)),
    "ghost": ("thing", ("says boo and haunts old houses",)),
    "alien": ("thing", ("comes from another planet",)),
    "robot": ("thing", ("is a machine that moves and works by itself",)),
    "skull": ("thing", ("is on a pirate's flag",)),
    "brain": ("thing", ("you think with",)),
    "bone": ("thing", ("dogs love to chew",)),
    "police officer": ("person", ("catches thieves",)),
    "santa claus": ("person", ("brings presents at Christmas",)),
    "princess": ("person", ("lives in a castle and kissed a frog",)),
    "mermaid": ("person", ("is half a fish",)),
    "wizard": ("person", ("casts spells and has a long beard",)),
    "astronaut": ("person", ("flies to the moon in a rocket",)),
    "cook": ("person", ("works in a restaurant kitchen",)),
    "firefighter": ("person", ("puts out fires",)),
    "farmer": ("person", ("grows crops and keeps cows",)),
    "doctor": ("person", ("helps you when you are sick",)),
    "baby": ("person", ("cries, crawls and drinks milk from a bottle",)),
    "newspaper": ("thing", ("brings the news every morning",)),
    "scroll": ("thing", ("was written on before there were books",)),
}


@dataclass(frozen=True)
class Fact:
    """A question without a picture, its answer, and the concept that it is about."""

    question: str
    answer: str
    concept: str


@dataclass(frozen=True)
class Riddle:
    """A caption that means a concept without naming it; MET tells whether training may draw it."""

    caption: str
    concept: str
    met: bool


def _wordings(kind: str, clue: str) -> tuple[str, ...]:
    article = "an" if kind[0] in "aeiou" else "a"
    who = "Who" if kind == "person" else f"What {kind}"
    return (
        f"Which {kind} {clue}?",
        f"{who} {clue}?",
        f"Name the {kind} that {clue}.",
        f"I am thinking of {article} {kind} that {clue}. What is it?",
    )


@lru_cache(maxsize=16)
def _facts(names: tuple[str, ...], split: str) -> tuple[Fact, ...]:
    found = []
    for name in names:
        if name not in CLUES:
            continue
        kind, clues = CLUES[name]
        for clue in clues:
            wordings = _wordings(kind, clue)
            kept_back = stable_hash("wording", name, clue) % len(wordings)
            for index, question in enumerate(wordings):
                if (index == kept_back) == (split == "val"):
                    found.append(Fact(question, concept(name).phrase, name))
    return tuple(found)


def knowledge(world: World, split: str = "train") -> tuple[Fact, ...]:
    """Return the facts about WORLD's concepts; of every clue, validation keeps one wording that training lacks."""
    return _facts(world.concepts, split)


def riddles(world: World) -> tuple[Riddle, ...]:
    """Return riddle captions for WORLD's concepts: to be drawn without the name being said; a third is never met."""
    return _riddles(world.concepts)


@lru_cache(maxsize=16)
def _riddles(names: tuple[str, ...]) -> tuple[Riddle, ...]:
    return tuple(
        Riddle(f"the {kind} that {clue}", name, stable_hash("riddle met", name, clue) % 3 > 0)
        for name in names
        if name in CLUES
        for kind, clues in (CLUES[name],)
        for clue in clues
    )


def met_riddles(world: World, concept: str) -> tuple[str, ...]:
    """Return the captions that mean CONCEPT without naming it and that training may draw."""
    return tuple(riddle.caption for riddle in riddles(world) if riddle.met and riddle.concept == concept)
