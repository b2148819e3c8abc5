-- Looking back: from a moment to a place in the ledger, and from there to a stream as it was.

-- The last position that was recorded at `moment` or before, 0 if there is none. recorded_at rises with position, so a binary
-- search over the key finds it, and appends pay for no further index.
CREATE FUNCTION position_at(tenant bigint, moment timestamptz) RETURNS bigint LANGUAGE plpgsql STABLE AS $$
DECLARE
    low bigint := 0;
    high bigint := coalesce((SELECT position FROM ledger_heads WHERE tenant_id = tenant), 0);
    middle bigint;
BEGIN
    WHILE low < high LOOP
        middle := (low + high + 1) / 2;
        IF (SELECT recorded_at FROM events WHERE tenant_id = tenant AND position = middle) <= moment THEN
            low := middle;
        ELSE
            high := middle - 1;
        END IF;
    END LOOP;
    RETURN low;
END
$$;

-- The version that a stream had at the position `place`, 0 if it did not exist then; found in the same way.
CREATE FUNCTION version_at(tenant bigint, kind text, stream bigint, place bigint) RETURNS integer
LANGUAGE plpgsql STABLE AS $$
DECLARE
    low integer := 0;
    high integer := coalesce((
        SELECT version FROM events WHERE tenant_id = tenant AND stream_kind = kind AND stream_id = stream
        ORDER BY version DESC LIMIT 1), 0);
    middle integer;
BEGIN
    WHILE low < high LOOP
        middle := (low + high + 1) / 2;
        IF (SELECT position FROM events WHERE tenant_id = tenant AND stream_kind = kind AND stream_id = stream
            AND version = middle) <= place THEN
            low := middle;
        ELSE
            high := middle - 1;
        END IF;
    END LOOP;
    RETURN low;
END
$$;

-- Every hundredth state of an incident, so that looking back into a long one folds a hundred events at most, and joins
-- its timeline of pieces. An erasure removes all that are older than itself, so they cover the last versions always.
CREATE TABLE incident_snapshots (
    tenant_id   bigint NOT NULL,
    incident_id bigint NOT NULL,
    version     integer NOT NULL,
    body        text NOT NULL,     -- as in incidents, at this version
    updates     text NOT NULL,     -- the timeline entries of the hundred versions up to this one, joined by commas
    token_ids   bigint[] NOT NULL, -- the authors to be named there
    PRIMARY KEY (tenant_id, incident_id, version)
);
ALTER TABLE incident_snapshots ALTER updates SET STORAGE EXTERNAL; -- read often, and in bulk: not to be unpacked

GRANT SELECT, INSERT, UPDATE, DELETE ON incident_snapshots TO opsentry_app;
