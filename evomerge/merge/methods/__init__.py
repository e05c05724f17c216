"""The merge methods, one file each; the names, knobs and meanings are mergekit's."""

from evomerge.merge.methods import dare, linear, slerp, task_arithmetic, ties
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
    )
}
