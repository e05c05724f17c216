"""denum: a German number word from null to 9999, to be written in digits.

German says the ones before the tens ("vierundsiebzig" is 74) and glues the word together, so a model that
reads English has to learn both a vocabulary and a change of order.
"""

from random import Random

from item import Item

BELOW_TWENTY = (
    *("null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"),
    *(
        "zehn",
        "elf",
        "zwölf",
        "dreizehn",
        "vierzehn",
        "fünfzehn",
        "sechzehn",
        "siebzehn",
        "achtzehn",
        "neunzehn",
    ),
)
TENS = ("zwanzig", "dreißig", "vierzig", "fünfzig", "sechzig", "siebzig", "achtzig", "neunzig")

# Uniform draws would be nine tenths four-digit numbers; short ones are easier and worth a share of their own.
SHARES = ((0, 99, 0.05), (100, 999, 0.25), (1000, 9999, 0.70))


def number_word(number: int) -> str:
    """The word of 0 <= number <= 9999, with the "ein" of "einhundert" and "eintausend" written out."""
    assert 0 <= number <= 9999, f"{number} is outside 0..9999"
    for size, name in ((1000, "tausend"), (100, "hundert")):
        if number >= size:
            many, rest = divmod(number, size)
            return stem(many) + name + (number_word(rest) if rest else "")
    if number < 20:
        return BELOW_TWENTY[number]
    tens, ones = divmod(number, 10)
    return (stem(ones) + "und" if ones else "") + TENS[tens - 2]


def stem(digit: int) -> str:
    """A digit's word in front of another part: "eins" loses its s."""
    return "ein" if digit == 1 else BELOW_TWENTY[digit]


def exercise(random: Random) -> Item:
    low, high, _ = random.choices(SHARES, [share for *_, share in SHARES])[0]
    number = random.randint(low, high)
    return Item(f"Zahlwort: {number_word(number)}\nZiffern:", f" {number}", str(number))
