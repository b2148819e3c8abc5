"""The functions that write projections' rows take the columns of their tables."""

from opsentry.bootstrap import projections

ROW_TYPES = """
SELECT t.typname, array_agg(a.attname ORDER BY a.attnum) AS columns
FROM pg_type t JOIN pg_attribute a ON a.attrelid = t.typrelid WHERE t.typname = ANY($1) GROUP BY t.typname
"""
ARGUMENTS = """
SELECT array_agg(ltrim(type::regtype::text, '_')) AS types
FROM pg_proc, unnest(proargtypes) WITH ORDINALITY AS argument (type, number) WHERE proname = $1
"""


async def test_row_types_have_the_columns_of_their_tables(owner):
    tables = {f"{table.name}_row": list(table.columns) for each in projections() for table in each.tables}
    found = {row["typname"]: row["columns"] for row in await owner.fetch(ROW_TYPES, list(tables))}
    of_timelines = {"incident_updates_row", "maintenance_updates_row"}
    summaries = {f"{table.name}_row" for each in projections() for table in each.tables if table.summary}
    assert tables.keys() - of_timelines - summaries <= found.keys()
    assert found == {name: columns for name, columns in tables.items() if name in found}


async def test_each_writer_is_one_function_of_the_tenant_and_rows(owner):
    for projection in projections():
        assert await owner.fetchval("SELECT count(*) FROM pg_proc WHERE proname = $1", projection.writer) == 1
        types = await owner.fetchval(ARGUMENTS, projection.writer)
        assert types[0] == "bigint"
        assert all(each.endswith("[]") for each in types[1:])
