"""Tell how far a read model's rows can be trusted: head, trusted and projected position."""

# A command is answered once its events are projected, or this long after they were recorded. An unprojected event that
# is younger than this therefore belongs to a command without an answer: no read has to show it yet.
UNANSWERED_SECONDS = 0.25


def freshness(*projections: str) -> str:
    """Return a FROM item `fresh` that tells how fresh the rows of these projections are for the tenant `$1`.

    Its columns are:

    - `head_position`: the last position of the tenant's ledger.
    - `trusted_position`: the position up to which a read may rely on the rows. It equals `head_position` if all missing
      events are younger than `UNANSWERED_SECONDS`. A halted or paused projection counts as up to date, because waiting
      does not help.
    - `projected_position`: the last event that the rows do show.
    - `tag`: a text that changes with the rows: after each event and after each rebuild.

    All but `head_position` are NULL where one of the projections has never run for the tenant.

    The query sorts the missing events by position to find the first. Only the index on position serves that order. An
    EXISTS or an equality, planned while the ledger is small, can scan all of it for as long as the connection lives.
    """
    names = ", ".join(f"'{name}'" for name in projections)
    return f"""(
        SELECT h.position AS head_position, progress.* FROM ledger_heads h LEFT JOIN LATERAL (
            SELECT min(CASE WHEN c.position < h.position AND c.halted_at IS NULL
                    AND NOT EXISTS (SELECT FROM projections p WHERE p.name = c.projection AND p.paused) AND (
                    SELECT e.recorded_at FROM events e WHERE e.tenant_id = c.tenant_id AND e.position > c.position
                    ORDER BY e.position LIMIT 1) < clock_timestamp() - {UNANSWERED_SECONDS} * interval '1 second'
                    THEN c.position ELSE h.position END) AS trusted_position,
                min(c.position) AS projected_position, string_agg(
                    concat_ws('.', c.position, floor(extract(epoch FROM c.rebuilt_at) * 1000)), '-'
                    ORDER BY c.projection) AS tag
            FROM checkpoints c WHERE c.tenant_id = h.tenant_id AND c.projection IN ({names})
            HAVING count(*) = {len(projections)}
        ) AS progress ON true WHERE h.tenant_id = $1) AS fresh"""
