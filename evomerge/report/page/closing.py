"""The last sections: what the search used and cost; how to load, export, reproduce and cite its result."""

from evomerge import __version__
from evomerge.report.page.material import Material
from evomerge.report.page.parts import capital, copied, folded, section, table, text
from evomerge.report.page.winner import about_method
from evomerge.report.usage_text import usage_text

LOAD = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("merged")
tokenizer = AutoTokenizer.from_pretrained("merged")
inputs = tokenizer("Your prompt", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0], skip_special_tokens=True))"""


def cost_section(material: Material) -> str:
    """What the search has used; empty for old runs that did not count it."""
    status = material.status
    if not status.used.seconds:
        return ""
    total = sum(status.timing.values())
    rows = [[part, f"{seconds:.3f}", f"{seconds / total:.0%}"] for part, seconds in status.timing.items() if total]
    parts = folded("Where a trial's time goes", table(["part", "seconds", "share"], rows, "numbers")) if rows else ""
    return section("cost", "What it used", text(f"{capital(usage_text(status.used, status.price))}."), parts)


def use_section(material: Material) -> str:
    """The commands after a search; empty without a verdict."""
    if material.verdict is None:
        return ""
    run = material.run.folder
    return section(
        "use",
        "Load, export, reproduce, cite",
        copied(f"evomerge export {run} --out merged/", "Write the model that is recommended, with its recipe"),
        copied(f"evomerge export {run} --mergekit merge.yml", "Write it as a mergekit configuration"),
        copied(LOAD, "Load it"),
        copied(
            "evomerge reproduce merged/recipe.yaml --out again --check merged", "Merge it again and compare the bytes"
        ),
        copied(citation(material), "Cite it"),
        text(about_method(material.recipe.method) if material.recipe else "", "dim"),
    )


def citation(material: Material) -> str:
    """A BibTeX entry of the software."""
    return (
        "@software{evomerge,\n"
        "  title = {evomerge: evolutionary search for the merge coefficients of language models},\n"
        f"  version = {{{__version__}}},\n  note = {{Search {material.status.config.name}, seed "
        f"{material.status.config.seed}}}\n}}"
    )
