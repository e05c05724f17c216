"""The merge methods, one file each; the names, knobs and meanings are mergekit's."""

from evomerge.merge.methods import dare, fisher, iso_c, linear, regmean, slerp, task_arithmetic, ties, tsv
from evomerge.merge.plan import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        slerp.METHOD,
        task_arithmetic.METHOD,
        ties.METHOD,
        dare.LINEAR,
        dare.TIES,
        tsv.METHOD,
        iso_c.METHOD,
        fisher.METHOD,
        regmean.METHOD,
    )
}
