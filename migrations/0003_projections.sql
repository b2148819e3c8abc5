-- Projections: rows derived from the ledger and shaped like responses. `version` is the version of the stream that a
-- row shows, so applying an event twice changes nothing.

-- Known projections. A rebuild of all tenants raises `generation`; a checkpoint with a lower one is yet to be rebuilt.
CREATE TABLE projections (
    name       text PRIMARY KEY,
    version    integer NOT NULL,           -- of the code that derives the rows
    generation integer NOT NULL DEFAULT 0, -- number of rebuilds of all tenants
    paused     boolean NOT NULL DEFAULT false
);

-- The progress of each projection in each tenant. The lock of its row makes each event apply exactly once.
CREATE TABLE checkpoints (
    tenant_id         bigint NOT NULL,
    projection        text NOT NULL,
    position          bigint NOT NULL DEFAULT 0,  -- of the last applied event
    halted_at         bigint,                     -- position of an event that could not be applied, until a retry
    halt_error        text,
    generation        integer NOT NULL DEFAULT 0, -- -1: derived by an older version of the code, or not at all
    rebuilt_at        timestamptz,
    rebuild_halted_at bigint,                     -- position of an event that a rebuild could not apply
    rebuild_error     text,
    PRIMARY KEY (tenant_id, projection)
) WITH (fillfactor = 50);
-- Tenants to rebuild and halted projections are found without reading the others.
CREATE INDEX checkpoints_generation ON checkpoints (projection, generation) WHERE rebuild_error IS NULL;
CREATE INDEX checkpoints_halted ON checkpoints (projection)
    WHERE halted_at IS NOT NULL OR rebuild_error IS NOT NULL;

CREATE TABLE services (
    tenant_id  bigint NOT NULL,
    service_id bigint NOT NULL,
    version    integer NOT NULL,
    slug       text NOT NULL,
    name       text NOT NULL,
    visibility text NOT NULL,
    retired    boolean NOT NULL,
    created_at timestamptz NOT NULL, -- start of the service in real-world time; uptime is not counted before
    body       text NOT NULL,        -- the response, with current_status null: a read fills it in
    link       text NOT NULL,        -- {"id", "slug", "name"} as other responses link it
    PRIMARY KEY (tenant_id, service_id)
);
CREATE INDEX services_by_name ON services (tenant_id, name COLLATE "C", service_id); -- the same order on every server

-- The indexes contain the columns that lists filter by. A list page reads its ids from one index alone, so an offset
-- skips no table rows.
CREATE TABLE incidents (
    tenant_id   bigint NOT NULL,
    incident_id bigint NOT NULL,
    version     integer NOT NULL,
    status      text NOT NULL,
    severity    text NOT NULL,
    visibility  text NOT NULL,
    service_ids bigint[] NOT NULL,
    occurred_at timestamptz NOT NULL,
    body        text NOT NULL, -- the response, with services []: a read fills in their names
    PRIMARY KEY (tenant_id, incident_id)
) WITH (fillfactor = 80);
CREATE INDEX incidents_newest ON incidents (tenant_id, occurred_at DESC, incident_id DESC) INCLUDE (status);
CREATE INDEX incidents_open ON incidents (tenant_id, occurred_at DESC, incident_id DESC) INCLUDE (status, severity)
    WHERE status <> 'resolved';
CREATE INDEX incidents_of_severity ON incidents (tenant_id, severity, occurred_at DESC, incident_id DESC)
    INCLUDE (status);

-- The number of incidents per status and severity, where there are any: a list's total is the sum of at most twenty
-- rows. Each statement that writes incidents also writes this.
CREATE TABLE incident_counts (
    tenant_id bigint NOT NULL,
    status    text NOT NULL,
    severity  text NOT NULL,
    incidents bigint NOT NULL,
    PRIMARY KEY (tenant_id, status, severity)
) WITH (fillfactor = 50); -- most commands update it: free space allows heap-only updates

CREATE TABLE incident_updates (
    tenant_id   bigint NOT NULL,
    incident_id bigint NOT NULL,
    version     integer NOT NULL,
    actor_kind  text NOT NULL,
    actor_id    bigint,
    body        text NOT NULL, -- the entry, with author null: a read fills it in
    PRIMARY KEY (tenant_id, incident_id, version)
);

-- Every hundredth state of an incident. An as-of query replays at most a hundred events and joins the timeline from
-- these pieces. A redaction deletes all older snapshots, so the remaining ones always cover the last versions.
CREATE TABLE incident_snapshots (
    tenant_id   bigint NOT NULL,
    incident_id bigint NOT NULL,
    version     integer NOT NULL,
    body        text NOT NULL,     -- as in incidents, at this version
    updates     text NOT NULL,     -- the timeline entries of the hundred versions up to this one, joined by commas
    token_ids   bigint[] NOT NULL, -- the authors to be named there
    PRIMARY KEY (tenant_id, incident_id, version)
);
ALTER TABLE incident_snapshots ALTER updates SET STORAGE EXTERNAL; -- read often and in bulk: no decompression

CREATE TABLE maintenance (
    tenant_id       bigint NOT NULL,
    maintenance_id  bigint NOT NULL,
    version         integer NOT NULL,
    status          text NOT NULL,
    visibility      text NOT NULL,
    service_ids     bigint[] NOT NULL,
    announced_at    timestamptz NOT NULL,
    scheduled_start timestamptz NOT NULL,
    transition_due_at      timestamptz, -- when the scheduler starts or completes it; NULL: never
    reminder_pending_since timestamptz, -- scheduled windows without a reminder: when the start was announced
    body            text NOT NULL,
    PRIMARY KEY (tenant_id, maintenance_id)
) WITH (fillfactor = 80);
CREATE INDEX maintenance_newest ON maintenance (tenant_id, announced_at DESC, maintenance_id DESC);
CREATE INDEX maintenance_upcoming ON maintenance (tenant_id, scheduled_start) WHERE status = 'scheduled';
CREATE INDEX maintenance_due ON maintenance (transition_due_at) WHERE transition_due_at IS NOT NULL;
CREATE INDEX maintenance_to_remind ON maintenance (scheduled_start) WHERE reminder_pending_since IS NOT NULL;

CREATE TABLE maintenance_updates (
    tenant_id      bigint NOT NULL,
    maintenance_id bigint NOT NULL,
    version        integer NOT NULL,
    actor_kind     text NOT NULL,
    actor_id       bigint,
    body           text NOT NULL,
    PRIMARY KEY (tenant_id, maintenance_id, version)
);

-- Subscriptions as responses show them and as the sender needs them. A removed one keeps no erasable text.
CREATE TABLE subscriptions (
    tenant_id       bigint NOT NULL,
    subscription_id bigint NOT NULL,
    version         integer NOT NULL,
    status          text NOT NULL,
    channel         text NOT NULL,
    target          text NOT NULL, -- as responses show it
    created_at      timestamptz NOT NULL,
    state           text NOT NULL, -- the aggregate's state as JSON, with its encrypted secrets
    body            text NOT NULL, -- the response
    PRIMARY KEY (tenant_id, subscription_id)
) WITH (fillfactor = 80);
CREATE INDEX subscriptions_by_target ON subscriptions (tenant_id, channel, target) WHERE status <> 'removed';
-- Unconfirmed subscriptions; the worker removes old ones.
CREATE INDEX subscriptions_pending ON subscriptions (created_at, tenant_id, subscription_id) WHERE status = 'pending';

-- The present state of each incident or maintenance window, as far as services feel it.
CREATE TABLE impact_states (
    tenant_id   bigint NOT NULL,
    stream_kind text NOT NULL,     -- incident | maintenance
    stream_id   bigint NOT NULL,
    version     integer NOT NULL,
    is_active   boolean NOT NULL,  -- the incident is open, or the window is active
    level       smallint NOT NULL, -- severity as 0 informational … 4 critical; 0 for windows
    is_excluded boolean NOT NULL,  -- uptime excludes the time
    service_ids bigint[] NOT NULL,
    PRIMARY KEY (tenant_id, stream_kind, stream_id)
) WITH (fillfactor = 80);

-- The periods in which an incident or a maintenance window affects a service.
CREATE TABLE service_impacts (
    tenant_id       bigint NOT NULL,
    service_id      bigint NOT NULL,
    stream_kind     text NOT NULL,
    stream_id       bigint NOT NULL,
    started_version integer NOT NULL,     -- of the event that started the impact
    started_at      timestamptz NOT NULL,
    ended_at        timestamptz NOT NULL, -- 'infinity' until it ends
    level           smallint NOT NULL,
    is_excluded     boolean NOT NULL,
    PRIMARY KEY (tenant_id, stream_kind, stream_id, service_id, started_version)
) WITH (fillfactor = 80);
-- Two indexes let the uptime of an old window of time skip all later impacts. An impact of at most a week starts at
-- most a week before the window, and longer impacts are few.
CREATE INDEX service_impacts_brief ON service_impacts (tenant_id, service_id, started_at)
    WHERE NOT (ended_at AT TIME ZONE 'UTC' > started_at AT TIME ZONE 'UTC' + interval '168 hours');
CREATE INDEX service_impacts_long ON service_impacts (tenant_id, service_id, ended_at)
    WHERE ended_at AT TIME ZONE 'UTC' > started_at AT TIME ZONE 'UTC' + interval '168 hours';
-- A service's current status reads only ongoing impacts.
CREATE INDEX service_impacts_ongoing ON service_impacts (tenant_id, service_id) WHERE ended_at = 'infinity';

-- The status of each service with an ongoing impact; a service without a row is operational.
CREATE VIEW service_status AS
    SELECT tenant_id, service_id,
        CASE max(level) FILTER (WHERE stream_kind = 'incident')
            WHEN 4 THEN 'major_outage' WHEN 3 THEN 'major_outage' WHEN 2 THEN 'partial_outage'
            WHEN 1 THEN 'degraded_performance'
            ELSE CASE WHEN bool_or(stream_kind = 'maintenance') THEN 'under_maintenance' ELSE 'operational' END
        END AS status
    FROM service_impacts
    WHERE ended_at = 'infinity'
    GROUP BY tenant_id, service_id;

-- Messages to send: one intent for each event and subscription. Its id is derived from (event, subscription, channel),
-- so deriving it again is harmless.
CREATE TABLE outbox_intents (
    tenant_id       bigint NOT NULL,
    intent_id       uuid NOT NULL,
    position        bigint NOT NULL, -- of the event to send
    subscription_id bigint NOT NULL,
    channel         text NOT NULL,
    topic           text NOT NULL,   -- the event's type
    stream_kind     text NOT NULL,
    stream_id       bigint NOT NULL,
    suppressed      boolean NOT NULL,
    created_at      timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, intent_id)
);
CREATE INDEX outbox_intents_by_position ON outbox_intents (tenant_id, position);

-- The outbox's knowledge of other streams as of an event: subscriptions, active windows, incidents' services.
CREATE TABLE outbox_state (
    tenant_id bigint NOT NULL,
    kind      text NOT NULL,
    id        bigint NOT NULL,
    state     text NOT NULL, -- JSON; contains no erasable text
    PRIMARY KEY (tenant_id, kind, id)
) WITH (fillfactor = 80);
-- Subscriptions and active windows are few among many incidents. Their own index keeps the planner from scanning the
-- table, even with statistics of the table's first minute.
CREATE INDEX outbox_state_few ON outbox_state (tenant_id) WHERE kind IN ('subscription', 'active');
-- Open incidents whose last notification a window withheld; the end of the window announces them.
CREATE INDEX outbox_state_withheld ON outbox_state (tenant_id)
    WHERE kind = 'incident' AND state LIKE '%"is_withheld":%';

GRANT SELECT, INSERT, UPDATE ON projections TO opsentry_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    checkpoints, services, incidents, incident_counts, incident_updates, incident_snapshots, maintenance,
    maintenance_updates, subscriptions, impact_states, service_impacts, outbox_intents, outbox_state
TO opsentry_app;
GRANT SELECT ON service_status TO opsentry_app;
