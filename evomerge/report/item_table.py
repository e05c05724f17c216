"""The output of `evomerge items`: all item scores of a run as one table."""

from pathlib import Path

import pyarrow as pa
from pyarrow import compute, csv, parquet

from evomerge.errors import EvomergeError
from evomerge.files.write import written_aside
from evomerge.search.run import Run
from evomerge.search.storage.item_scores import rows

COLUMNS = pa.schema(
    [
        ("trial", pa.int32()),
        ("recipe", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("metric", pa.string()),
        ("item", pa.string()),
        ("score", pa.float32()),
    ]
)


def write_items(run: Run, out: Path) -> int:
    """Write all item scores of a run and return how many there are.

    Scores of a trial have its number in the column `trial`; scores of other models (baselines, finalists) have the
    digest of their recipe in the column `recipe`.

    out: the file to write.  EvomergeError if it exists or its suffix is not .parquet or .csv.
    """
    write = {".parquet": parquet.write_table, ".csv": csv.write_csv}.get(out.suffix)
    if write is None:
        raise EvomergeError(f"{out}: give a name that ends in .parquet or .csv")
    if out.exists():
        raise EvomergeError(f"{out}: exists already; choose another name")
    table = pa.Table.from_pylist(list(rows(run.study())), COLUMNS)
    if out.suffix == ".csv":
        table = without_formulas(table)
    with written_aside(out) as aside:
        write(table, aside)
    return int(table.num_rows)


def without_formulas(table: pa.Table) -> pa.Table:
    """The table with a `'` before every text that a spreadsheet would take for a formula; names come from anywhere."""
    for index, field in enumerate(table.schema):
        if field.type == pa.string():
            texts = compute.replace_substring_regex(table.column(index), r"^([=+\-@\t\r])", r"'\1")
            table = table.set_column(index, field, texts)
    return table
