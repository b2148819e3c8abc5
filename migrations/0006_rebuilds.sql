-- Read models derived anew: how often for each tenant, and which rebuilds are under way, so that one that was killed
-- goes on where it was.
ALTER TABLE checkpoints
    ADD COLUMN generation integer NOT NULL DEFAULT 0, -- how often the rows were derived anew
    ADD COLUMN rebuilt_at timestamptz;

CREATE TABLE rebuilds (
    projection text PRIMARY KEY,
    started_at timestamptz NOT NULL
);

GRANT SELECT, INSERT, DELETE ON rebuilds TO opsentry_app;
