"""math: word problems of one to three steps, solved one operation at a time from left to right.

A story has the numbers {a}, {b}, ... and the chain of operations that solves it. The target writes every step
before the result, which lets a small model compute with its own text.
"""

from random import Random

from item import Item

NAMES = (
    *("Aisha", "Boris", "Chloe", "Darius", "Elena", "Farid", "Greta", "Hugo", "Ines"),
    *("Jonas", "Kira", "Liam", "Mara", "Nils", "Olga", "Pavel", "Rosa", "Samir"),
)
THINGS = (
    *("apples", "shells", "coins", "buttons", "pencils", "stones", "marbles"),
    *("badges", "tickets", "ribbons", "cookies", "feathers", "postcards"),
)

STORIES: tuple[tuple[str, str], ...] = (
    ("{name} picks {a} {things} in the morning and {b} in the evening. How many {things} is that?", "+"),
    ("A basket holds {a} {things}; {name} puts in {b} more. How many {things} does it hold now?", "+"),
    ("{name} owns {a} {things} and loses {b}. How many {things} does {name} still own?", "-"),
    ("{name} needs {a} {things} and has {b}. How many {things} are missing?", "-"),
    ("Each of {a} children brings {b} {things}. How many {things} do they bring?", "*"),
    ("{name} fills {a} bags with {b} {things} each. How many {things} are in the bags?", "*"),
    ("{a} {things} are dealt out to {b} players. How many {things} does one player get?", "/"),
    ("{name} lays {a} {things} in {b} equal rows. How many {things} are in a row?", "/"),
    ("{name} has {a} {things}, finds {b} and loses {c}. How many {things} does {name} have?", "+-"),
    ("A shop had {a} {things}, sold {b} and was sent {c}. How many {things} are in the shop?", "-+"),
    ("{name} had {a} {things}, used {b} at work and {c} at home. How many {things} are unused?", "--"),
    ("{name} buys {a} bags of {b} {things} and eats or loses {c}. How many {things} remain?", "*-"),
    ("There are {a} crates of {b} {things} and {c} loose ones. How many {things} are there?", "*+"),
    ("{name} buys {b} tickets at {a} euros and pays a fee of {c} euros. How many euros is that?", "*+"),
    ("{name} works {a} hours a day for {b} days but rests {c} hours. How many hours are worked?", "*-"),
    (
        "{name} has {a} {things}, {friend} has {b}. They split all of them among {c} people. How many each?",
        "+/",
    ),
    (
        "Of {a} {things}, {b} are broken; the rest go into {c} equal boxes. How many {things} are in a box?",
        "-/",
    ),
    ("{b} friends share {a} {things}; {name}, one of them, is given {c} more. How many has {name}?", "/+"),
    (
        "{a} {things} come in {b} equal packs. {name} takes {c} packs. How many {things} does {name} take?",
        "/*",
    ),
    ("{name} saves {a} euros a week for {b} weeks, spends {c} and earns {d}. How many euros remain?", "*-+"),
    (
        "{a} shelves carry {b} {things} each. {c} are taken off and {d} fall down. How many {things} stay?",
        "*--",
    ),
    (
        "{name} has {a} {things}, gets {b} from {friend}, loses {c} and finds {d}. How many {things} now?",
        "+-+",
    ),
    ("{a} {things} and {b} more, less {c} lost ones, fill {d} jars. How many {things} per jar?", "+-/"),
    (
        "{a} teams of {b} players and {c} coaches ride in {d} equal buses. How many people are in a bus?",
        "*+/",
    ),
)
LARGEST = 400  # of every intermediate result; longer numbers test multiplication tables more than reading


def exercise(random: Random) -> Item:
    story, operations = random.choice(STORIES)
    numbers, steps = solvable(operations, random)
    name, friend = random.sample(NAMES, 2)
    slots = dict(zip("abcd", map(str, numbers), strict=False))
    question = story.format(name=name, friend=friend, things=random.choice(THINGS), **slots)
    answer = steps[-1].split()[-1]
    return Item(f"Problem: {question}\nSolution:", f" {', '.join(steps)}. Result: {answer}", answer)


def solvable(operations: str, random: Random) -> tuple[list[int], list[str]]:
    """Numbers for a chain of operations that `solve` accepts, and the steps of the chain."""
    while True:
        numbers = [random.randint(2, 12 if operations[0] == "*" else 90)]
        numbers += [random.randint(2, 12 if operation in "*/" else 60) for operation in operations]
        steps = solve(numbers, operations)
        if steps is not None:
            return numbers, steps


def solve(numbers: list[int], operations: str) -> list[str] | None:
    """The steps "a + b = c" of a chain, left to right; None if a result is not whole, in 1..LARGEST."""
    value, steps = numbers[0], []
    for operation, operand in zip(operations, numbers[1:], strict=True):
        result = apply(operation, value, operand)
        if result is None or not 0 < result <= LARGEST:
            return None
        steps.append(f"{value} {operation} {operand} = {result}")
        value = result
    return steps


def apply(operation: str, left: int, right: int) -> int | None:
    """`left operation right`; None for a division with a remainder."""
    if operation == "/":
        return left // right if left % right == 0 else None
    return {"+": left + right, "-": left - right, "*": left * right}[operation]
