"""`rescale` of the random methods: what makes up for the dropped elements.

    expected:  g = sum |d| / sum p_j |d_j|, the expectation of the mask; 1/density where all chances are equal
    l1:        g = sum |d| / sum m_j |d_j|, mergekit's way: the L1 norm of the masked task vector is that of the whole

`expected` is the papers' (Yu et al. 2024: 1 - drop rate; Deep et al. 2024: chance by chance, of which this is the mean
over a tensor) and a constant of the tensor; `l1` reads every tensor once more for each candidate.
"""

from evomerge.merge.methods.knobs import Knob
from evomerge.merge.methods.measured import Measured
from evomerge.merge.methods.plan import Chance

NONE, EXPECTED, L1 = 0.0, 1.0, 2.0
RESCALE = Knob(EXPECTED, 0.0, 2.0, choices={"none": NONE, "expected": EXPECTED, "l1": L1})
TINY = 1e-7  # norms that mergekit does not divide by


def gain(how: float, measured: Measured, source: int, chance: Chance) -> float:
    """The factor of a source whose elements are kept with these chances; 1 where all or none are."""
    if how == NONE or chance.low in (0, 2**32):
        return 1.0
    if how == EXPECTED and not chance.step:
        return 2**32 / chance.low
    whole = measured.l1(source)
    kept = measured.l1(source, chance) if how == L1 else expected_l1(measured, source, chance)
    return 1.0 if min(whole, kept) < TINY else whole / kept


def expected_l1(measured: Measured, source: int, chance: Chance) -> float:
    """sum (low + step level_j) / 2^32 * |d_j|."""
    by_level = 256 * measured.rank_weighted_l1(source) - measured.l1(source) / 2
    return (chance.low * measured.l1(source) + chance.step * by_level) / 2**32
