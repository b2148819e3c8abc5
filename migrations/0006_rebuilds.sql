-- What operators rely on: projections that are known by name and version, rebuilt, paused, and found when they lag.

-- A rebuild of all tenants raises `generation`: whoever has a lower one in its checkpoint is still to be done.
CREATE TABLE projections (
    name       text PRIMARY KEY,
    version    integer NOT NULL,           -- of the code that the rows are derived with
    generation integer NOT NULL DEFAULT 0, -- how often the rows of all tenants were to be derived anew
    paused     boolean NOT NULL DEFAULT false
);
INSERT INTO projections (name, version) SELECT DISTINCT projection, 1 FROM checkpoints;

ALTER TABLE checkpoints
    ADD COLUMN generation    integer NOT NULL DEFAULT 0, -- -1: derived by an older version of the code, or not at all
    ADD COLUMN rebuilt_at    timestamptz,
    ADD COLUMN rebuild_seq   bigint, -- an event that a rebuild could not apply: the rows are as they were before it
    ADD COLUMN rebuild_error text;

-- Who is still to be rebuilt, and who stands still: found without looking at the others.
CREATE INDEX checkpoints_generation ON checkpoints (projection, generation) WHERE rebuild_error IS NULL;
CREATE INDEX checkpoints_stopped ON checkpoints (projection)
    WHERE parked_seq IS NOT NULL OR rebuild_error IS NOT NULL;

-- Where ledgers have grown and nobody has projected it yet: written with the append, deleted with the checkpoint. So the
-- worker's poll finds who lags without looking at those who do not. Rows are only ever inserted and deleted, never
-- updated, so that an append waits for no projector, not even for one that is frozen.
CREATE TABLE unprojected (
    tenant_id bigint NOT NULL,
    seq       bigint NOT NULL,
    PRIMARY KEY (tenant_id, seq)
);
INSERT INTO unprojected SELECT tenant_id, seq FROM heads WHERE seq > 0;

CREATE FUNCTION note_unprojected() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO unprojected VALUES (NEW.tenant_id, NEW.seq) ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER heads_note_unprojected AFTER UPDATE ON heads
    FOR EACH ROW WHEN (NEW.seq > OLD.seq) EXECUTE FUNCTION note_unprojected();

GRANT SELECT, INSERT, UPDATE ON projections TO opsentry_app;
GRANT SELECT, INSERT, DELETE ON unprojected TO opsentry_app;
