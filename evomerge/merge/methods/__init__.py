"""The merge methods, one file each; the names, knobs and meanings are mergekit's."""

from evomerge.merge.methods import (
    arcee_fusion,
    breadcrumbs,
    dare,
    della,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    sce,
    slerp,
    task_arithmetic,
    ties,
)
from evomerge.merge.plan import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        slerp.METHOD,
        nuslerp.METHOD,
        multislerp.METHOD,
        karcher.METHOD,
        model_stock.METHOD,
        passthrough.METHOD,
        nearswap.METHOD,
        task_arithmetic.METHOD,
        ties.METHOD,
        dare.LINEAR,
        dare.TIES,
        della.LINEAR,
        della.DELLA,
        breadcrumbs.LINEAR,
        breadcrumbs.TIES,
        sce.METHOD,
        arcee_fusion.METHOD,
        ram.RAM,
        ram.PLUS,
    )
}
