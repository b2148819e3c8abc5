-- Lists, totals and uptime that take as long for a million incidents as for a few. Tables are locked in the order in
-- which a pass writes them.

-- Uptime of a window long past, without reading all that came after it: periods of a week at most lie between a week
-- before the window and its end, and longer ones are few.
CREATE INDEX impact_periods_brief ON impact_periods (tenant_id, service_id, from_at)
    WHERE NOT (to_at AT TIME ZONE 'UTC' > from_at AT TIME ZONE 'UTC' + interval '168 hours');
CREATE INDEX impact_periods_long ON impact_periods (tenant_id, service_id, to_at)
    WHERE to_at AT TIME ZONE 'UTC' > from_at AT TIME ZONE 'UTC' + interval '168 hours';
-- A service's status asks only for what lasts.
DROP INDEX impact_periods_of_service;
CREATE INDEX impact_periods_lasting ON impact_periods (tenant_id, service_id) WHERE to_at = 'infinity';

-- Indexes that hold what lists filter by: a page takes its ids from one of them alone, and an offset skips no rows.
DROP INDEX incidents_newest, incidents_open;
CREATE INDEX incidents_newest ON incidents (tenant_id, occurred_at DESC, incident_id DESC) INCLUDE (status);
CREATE INDEX incidents_open ON incidents (tenant_id, occurred_at DESC, incident_id DESC) INCLUDE (status, severity)
    WHERE status <> 'resolved';
CREATE INDEX incidents_of_severity ON incidents (tenant_id, severity, occurred_at DESC, incident_id DESC)
    INCLUDE (status);

-- How many rows incidents has of each kind that lists can be asked for, where it has any: a list's total is the sum of
-- at most twenty. Whoever writes incidents keeps it in the same statement.
CREATE TABLE incident_counts (
    tenant_id bigint NOT NULL,
    status    text NOT NULL,
    severity  text NOT NULL,
    incidents bigint NOT NULL,
    PRIMARY KEY (tenant_id, status, severity)
) WITH (fillfactor = 50); -- updated at most commands: room for heap-only updates
INSERT INTO incident_counts
    SELECT tenant_id, status, severity, count(*) FROM incidents GROUP BY tenant_id, status, severity;

GRANT SELECT, INSERT, UPDATE, DELETE ON incident_counts TO opsentry_app;
