"""The merge methods, one file each; where mergekit has a method, its name, knobs and meaning are mergekit's."""

from evomerge.merge.methods import (
    arcee_fusion,
    breadcrumbs,
    checkpoint_average,
    dare,
    della,
    fisher,
    iso_c,
    karcher,
    linear,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    passthrough,
    ram,
    regmean,
    sce,
    slerp,
    task_arithmetic,
    ties,
    tsv,
    uniform_soup,
)
from evomerge.merge.methods.plan import Method

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        linear.METHOD,
        slerp.METHOD,
        uniform_soup.METHOD,
        checkpoint_average.METHOD,
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
        tsv.METHOD,
        iso_c.METHOD,
        fisher.METHOD,
        regmean.METHOD,
    )
}
