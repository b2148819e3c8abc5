-- How far each projection of each tenant has come. Its row lock is what makes an event be applied exactly once.
CREATE TABLE checkpoints (
    tenant_id  bigint NOT NULL,
    projection text NOT NULL,
    position   bigint NOT NULL DEFAULT 0, -- position of the last event that was applied
    halted_at bigint,                    -- an event that could not be applied: nothing after it is, until a retry
    error      text,
    PRIMARY KEY (tenant_id, projection)
) WITH (fillfactor = 50);

-- Rows below are shaped like the answers. `version` is the version of the stream that a row shows: applying an
-- event twice changes nothing.

CREATE TABLE services (
    tenant_id  bigint NOT NULL,
    service_id bigint NOT NULL,
    version    integer NOT NULL,
    slug       text NOT NULL,
    name       text NOT NULL,
    visibility text NOT NULL,
    retired    boolean NOT NULL,
    since      timestamptz NOT NULL, -- when the service began; uptime is not counted before
    body       text NOT NULL,        -- the answer, with current_status null: that is known only when reading
    ref        text NOT NULL,        -- {"id", "slug", "name"} as other answers link it
    PRIMARY KEY (tenant_id, service_id)
);
CREATE INDEX services_by_name ON services (tenant_id, name COLLATE "C", service_id); -- one order on every server

CREATE TABLE incidents (
    tenant_id   bigint NOT NULL,
    incident_id bigint NOT NULL,
    version     integer NOT NULL,
    status      text NOT NULL,
    severity    text NOT NULL,
    visibility  text NOT NULL,
    service_ids bigint[] NOT NULL,
    occurred_at timestamptz NOT NULL,
    body        text NOT NULL, -- the answer, with services [] (their names are looked up when reading)
    PRIMARY KEY (tenant_id, incident_id)
) WITH (fillfactor = 80);
CREATE INDEX incidents_newest ON incidents (tenant_id, occurred_at DESC, incident_id DESC);
CREATE INDEX incidents_open ON incidents (tenant_id, occurred_at DESC, incident_id DESC) WHERE status <> 'resolved';

CREATE TABLE incident_updates (
    tenant_id   bigint NOT NULL,
    incident_id bigint NOT NULL,
    version     integer NOT NULL,
    actor_kind  text NOT NULL,
    actor_id    bigint,
    body        text NOT NULL, -- the entry, with author null (looked up when reading)
    PRIMARY KEY (tenant_id, incident_id, version)
);

CREATE TABLE maintenance (
    tenant_id       bigint NOT NULL,
    maintenance_id  bigint NOT NULL,
    version         integer NOT NULL,
    status          text NOT NULL,
    visibility      text NOT NULL,
    service_ids     bigint[] NOT NULL,
    announced_at    timestamptz NOT NULL,
    scheduled_start timestamptz NOT NULL,
    due_at          timestamptz, -- when the scheduler has to start or complete it, if it has to
    body            text NOT NULL,
    PRIMARY KEY (tenant_id, maintenance_id)
) WITH (fillfactor = 80);
CREATE INDEX maintenance_newest ON maintenance (tenant_id, announced_at DESC, maintenance_id DESC);
CREATE INDEX maintenance_upcoming ON maintenance (tenant_id, scheduled_start) WHERE status = 'scheduled';
CREATE INDEX maintenance_due ON maintenance (due_at) WHERE due_at IS NOT NULL;

CREATE TABLE maintenance_updates (
    tenant_id      bigint NOT NULL,
    maintenance_id bigint NOT NULL,
    version        integer NOT NULL,
    actor_kind     text NOT NULL,
    actor_id       bigint,
    body           text NOT NULL,
    PRIMARY KEY (tenant_id, maintenance_id, version)
);

-- What touches services now: one row for each incident or window, the state from which its periods go on.
CREATE TABLE impact_sources (
    tenant_id   bigint NOT NULL,
    kind        text NOT NULL,     -- incident | maintenance
    source_id   bigint NOT NULL,
    version     integer NOT NULL,
    live        boolean NOT NULL,  -- the incident is open, the window active
    level       smallint NOT NULL, -- severity as 0 informational … 4 critical; 0 for windows
    excluded    boolean NOT NULL,  -- the window is cut out of uptime
    visibility  text NOT NULL,
    service_ids bigint[] NOT NULL,
    PRIMARY KEY (tenant_id, kind, source_id)
) WITH (fillfactor = 80);

CREATE TABLE impact_periods (
    tenant_id    bigint NOT NULL,
    service_id   bigint NOT NULL,
    kind         text NOT NULL,
    source_id    bigint NOT NULL,
    from_version integer NOT NULL, -- of the event that began the period
    from_at      timestamptz NOT NULL,
    to_at        timestamptz NOT NULL, -- 'infinity' while it lasts
    level        smallint NOT NULL,
    excluded     boolean NOT NULL,
    PRIMARY KEY (tenant_id, kind, source_id, service_id, from_version)
) WITH (fillfactor = 80);
CREATE INDEX impact_periods_of_service ON impact_periods (tenant_id, service_id, to_at);

-- The status of each service that something touches; a service without a row is operational.
CREATE VIEW service_status AS
    SELECT tenant_id, service_id,
        CASE max(level) FILTER (WHERE kind = 'incident')
            WHEN 4 THEN 'major_outage' WHEN 3 THEN 'major_outage' WHEN 2 THEN 'partial_outage'
            WHEN 1 THEN 'degraded_performance'
            ELSE CASE WHEN bool_or(kind = 'maintenance') THEN 'under_maintenance' ELSE 'operational' END
        END AS status
    FROM impact_periods
    WHERE to_at = 'infinity'
    GROUP BY tenant_id, service_id;

-- Who must be told what. An intent's id is derived from (event, subscription, channel): deriving it again is harmless.
CREATE TABLE outbox_intents (
    tenant_id       bigint NOT NULL,
    intent_id       uuid NOT NULL,
    position             bigint NOT NULL,  -- the event to tell of
    subscription_id bigint NOT NULL,
    channel         text NOT NULL,
    topic           text NOT NULL,    -- the event's type
    stream_kind     text NOT NULL,
    stream_id       bigint NOT NULL,
    suppressed      boolean NOT NULL,
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, intent_id)
);
CREATE INDEX outbox_intents_pending ON outbox_intents (created_at) WHERE NOT suppressed;

-- What the outbox has to know of other streams as of an event: subscriptions, active windows, incidents' services.
CREATE TABLE outbox_state (
    tenant_id bigint NOT NULL,
    kind      text NOT NULL,
    id        bigint NOT NULL,
    state     text NOT NULL,
    PRIMARY KEY (tenant_id, kind, id)
) WITH (fillfactor = 80);

-- Subscriptions and active windows are few among many incidents. With an index of their own the planner never takes
-- them by scanning, not even from statistics of the table's first minute.
CREATE INDEX outbox_state_few ON outbox_state (tenant_id) WHERE kind IN ('subscription', 'active');

GRANT SELECT, INSERT, UPDATE, DELETE ON
    checkpoints, services, incidents, incident_updates, maintenance, maintenance_updates,
    impact_sources, impact_periods, outbox_intents, outbox_state
TO opsentry_app;
GRANT SELECT ON service_status TO opsentry_app;
