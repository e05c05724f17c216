"""calendar: say to which season, quarter, week, part of the day or century a date or a time belongs.

Every rule is a small table over one field of the date, so a small model can learn it; which field counts
and where the borders lie is what it has to find out. The question does not list the four or five choices.
"""

from random import Random

from item import Item

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
SEASONS = ("spring", "summer", "autumn", "winter")
ORDINALS = ("first", "second", "third", "fourth", "fifth")
PARTS_OF_DAY = ("night", "morning", "afternoon", "evening")  # six hours each from midnight
LAST_DAY = 28  # of every month, which keeps all dates valid
FIRST_YEAR, LAST_YEAR = 1101, 2099
ENDINGS = {21: "st", 22: "nd", 23: "rd"}  # of the ordinals from 8th to 25th


def exercise(random: Random) -> Item:
    question, answer, choices = random.choice((season, quarter, week, part_of_day, century))(random)
    return Item(f"Question: {question}\nAnswer:", f" {answer}", answer, choices)


def written_date(random: Random) -> tuple[str, int, int, int]:
    """A date in one of four ways of writing it; its year, month (1-12) and day."""
    year, month = random.randint(FIRST_YEAR, LAST_YEAR), random.randint(1, len(MONTHS))
    day, name = random.randint(1, LAST_DAY), MONTHS[month - 1]
    forms = (
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{day} {name[:3]} {year}",
        f"{year}-{month:02}-{day:02}",
    )
    return random.choice(forms), year, month, day


def season(random: Random) -> tuple[str, str, tuple[str, ...]]:
    """Whole months: March begins spring north of the equator and autumn south of it."""
    date, _, month, _ = written_date(random)
    place, shift = random.choice((("Norway", 0), ("Canada", 0), ("Chile", 2), ("New Zealand", 2)))
    asks = ("Which season was it in {p} on {d}?", "{d} in {p} - what season?")
    answer = SEASONS[((month - 3) % 12 // 3 + shift) % 4]
    return random.choice(asks).format(p=place, d=date), answer, SEASONS


def quarter(random: Random) -> tuple[str, str, tuple[str, ...]]:
    date, _, month, _ = written_date(random)
    asks = ("In which quarter of the year is {d}?", "{d} belongs to which quarter?")
    return random.choice(asks).format(d=date), ORDINALS[(month - 1) // 3], ORDINALS[:4]


def week(random: Random) -> tuple[str, str, tuple[str, ...]]:
    """Seven days each, counted from the first of the month."""
    date, _, _, day = written_date(random)
    asks = ("Which week of its month, counted from day 1, has {d}?", "{d} - which week of the month?")
    return random.choice(asks).format(d=date), ORDINALS[(day - 1) // 7], ORDINALS[:4]


def part_of_day(random: Random) -> tuple[str, str, tuple[str, ...]]:
    hour, minute = random.randrange(24), random.randrange(60)
    forms = (f"{hour}:{minute:02}", f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}")
    asks = ("What part of the day is {t}?", "The clock shows {t}. What do we call this time?")
    return random.choice(asks).format(t=random.choice(forms)), PARTS_OF_DAY[hour // 6], PARTS_OF_DAY


def century(random: Random) -> tuple[str, str, tuple[str, ...]]:
    """The years 1701 to 1800 are the 18th century; its neighbours are the other choices."""
    date, year, _, _ = written_date(random)
    number = (year - 1) // 100 + 1
    lowest = number - random.randrange(5)
    asks = ("In which century was {d}?", "Name the century of {d}.")
    choices = tuple(f"{n}{ENDINGS.get(n, 'th')}" for n in range(lowest, lowest + 5))
    return random.choice(asks).format(d=date), choices[number - lowest], choices
