-- The functions that write the rows of projections. A catch-up calls `advance_checkpoints` and a writer for each
-- projection in one statement, and so in one transaction.
--
-- Running code of the release before calls its functions with its types. So a later migration never changes a type or a
-- function of an earlier one, nor gives a function another's name: it adds both under new names.
--
-- All plans are generic. A writer's rows are few or many at random, and the planner would plan most calls again. A plan
-- from when a table was small must not scan it later, so plans go by indexes.

-- Deletes the tenant's rows of `projection_backlog` up to `until`, as far as all running projections have come.
CREATE FUNCTION trim_backlog(tenant bigint, until bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    DELETE FROM projection_backlog AS entry
    WHERE entry.tenant_id = tenant AND entry.position <= until AND NOT EXISTS (
        SELECT FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
        WHERE c.tenant_id = tenant AND c.position < entry.position
            AND c.halted_at IS NULL AND NOT coalesce(p.paused, false));
END
$$;

-- Moves the checkpoints of the projections `names` from `expected` to `reached`, and trims the backlog. Returns false,
-- and changes nothing, unless all of them are running, at `expected`, and last rebuilt at `rebuilt`: a rebuild moves no
-- checkpoint if nothing was appended, but replaces the rows that the caller has read.
--
-- - All callers lock the checkpoints in one order, so that two catch-ups never deadlock.
-- - The commit need not wait for the disk: after a crash of the server, rows and checkpoints are back where they were, and
--   the next catch-up continues there.
-- - The server stops waiting for the locks when the caller does, about.
-- - `versions` are those of the caller's code. Rows that newer code has registered need a rebuild after older code has
--   written to them.
CREATE FUNCTION advance_checkpoints(
    tenant bigint, names text[], versions integer[], rebuilt timestamptz[], expected bigint, reached bigint
) RETURNS boolean LANGUAGE plpgsql
SET lock_timeout = '30s' SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
DECLARE
    locked integer;
BEGIN
    PERFORM set_config('synchronous_commit', 'off', true);
    PERFORM FROM checkpoints c LEFT JOIN projections p ON p.name = c.projection
    WHERE c.tenant_id = tenant AND c.projection = ANY (names) AND c.position = expected
        AND c.halted_at IS NULL AND NOT coalesce(p.paused, false)
        AND c.rebuilt_at IS NOT DISTINCT FROM rebuilt[array_position(names, c.projection)]
    ORDER BY c.projection FOR NO KEY UPDATE OF c;
    GET DIAGNOSTICS locked = ROW_COUNT;
    IF locked < cardinality(names) THEN
        RETURN false;
    END IF;
    UPDATE checkpoints c SET position = reached, generation = CASE
        WHEN EXISTS (
            SELECT FROM projections p
            WHERE p.name = c.projection AND p.version > versions[array_position(names, c.projection)])
        THEN least(c.generation, -1) ELSE c.generation END
    WHERE c.tenant_id = tenant AND c.projection = ANY (names);
    PERFORM trim_backlog(tenant, reached);
    RETURN true;
END
$$;

CREATE TYPE services_row AS (
    service_id bigint,
    version    integer,
    slug       text,
    name       text,
    visibility text,
    retired    boolean,
    created_at timestamptz,
    body       text,
    link       text
);

-- Writes one row for each service, unless a newer version is stored.
CREATE FUNCTION write_services(tenant bigint, new_services services_row[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    INSERT INTO services AS s (
        tenant_id, service_id, version, slug, name, visibility, retired, created_at, body, link)
    SELECT tenant, row.* FROM unnest(new_services) AS row
    ON CONFLICT (tenant_id, service_id) DO UPDATE SET
        version = excluded.version,
        slug = excluded.slug,
        name = excluded.name,
        visibility = excluded.visibility,
        retired = excluded.retired,
        created_at = excluded.created_at,
        body = excluded.body,
        link = excluded.link
    WHERE s.version < excluded.version;
END
$$;

-- A timeline entry of an incident or a maintenance window.
CREATE TYPE timeline_row AS (
    stream_id  bigint,
    version    integer,
    actor_kind text,
    actor_id   bigint,
    body       text
);

CREATE TYPE incidents_row AS (
    incident_id bigint,
    version     integer,
    status      text,
    severity    text,
    visibility  text,
    service_ids bigint[],
    occurred_at timestamptz,
    body        text
);

CREATE TYPE incident_snapshots_row AS (
    incident_id bigint,
    version     integer,
    body        text,
    updates     text,
    token_ids   bigint[]
);

-- A redaction: the incident, and the version of the event that records it.
CREATE TYPE incident_redaction AS (
    incident_id bigint,
    version     integer
);

-- Writes one row for each incident, unless a newer version is stored, and adjusts the counts; inserts timeline entries
-- and snapshots, unless they are stored; replaces redacted entries; deletes the snapshots from before a redaction, which
-- still hold the redacted text.
CREATE FUNCTION write_incidents(
    tenant bigint,
    new_incidents incidents_row[],
    new_entries timeline_row[],
    redacted_entries timeline_row[],
    redactions incident_redaction[],
    snapshots incident_snapshots_row[]
) RETURNS void LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    -- Counts the rows before they are stored. The lock of the checkpoint keeps other writers away meanwhile. LIMIT makes
    -- it one index lookup for each incident, even where the plan dates from when the table was small.
    INSERT INTO incident_counts AS c (tenant_id, status, severity, incidents)
    SELECT tenant, moves.status, moves.severity, sum(moves.change)
    FROM unnest(new_incidents) AS row
    LEFT JOIN LATERAL (
        SELECT i.version, i.status, i.severity FROM incidents i
        WHERE i.tenant_id = tenant AND i.incident_id = row.incident_id LIMIT 1) AS old ON true
    CROSS JOIN LATERAL (
        VALUES (row.status, row.severity, 1), (old.status, old.severity, -1)) AS moves (status, severity, change)
    WHERE row.version > coalesce(old.version, 0) AND moves.status IS NOT NULL
    GROUP BY moves.status, moves.severity HAVING sum(moves.change) <> 0
    ON CONFLICT (tenant_id, status, severity) DO UPDATE SET incidents = c.incidents + excluded.incidents;
    DELETE FROM incident_counts c WHERE c.tenant_id = tenant AND c.incidents = 0;

    INSERT INTO incidents AS i (
        tenant_id, incident_id, version, status, severity, visibility, service_ids, occurred_at, body)
    SELECT tenant, row.* FROM unnest(new_incidents) AS row
    ON CONFLICT (tenant_id, incident_id) DO UPDATE SET
        version = excluded.version,
        status = excluded.status,
        severity = excluded.severity,
        visibility = excluded.visibility,
        service_ids = excluded.service_ids,
        body = excluded.body
    WHERE i.version < excluded.version;

    IF cardinality(new_entries) > 0 THEN
        INSERT INTO incident_updates (tenant_id, incident_id, version, actor_kind, actor_id, body)
        SELECT tenant, row.* FROM unnest(new_entries) AS row
        ON CONFLICT DO NOTHING;
    END IF;
    IF cardinality(redactions) > 0 THEN
        UPDATE incident_updates u SET body = row.body FROM unnest(redacted_entries) AS row
        WHERE u.tenant_id = tenant AND u.incident_id = row.stream_id AND u.version = row.version;
        DELETE FROM incident_snapshots s USING unnest(redactions) AS row
        WHERE s.tenant_id = tenant AND s.incident_id = row.incident_id AND s.version < row.version;
    END IF;
    IF cardinality(snapshots) > 0 THEN
        INSERT INTO incident_snapshots (tenant_id, incident_id, version, body, updates, token_ids)
        SELECT tenant, row.* FROM unnest(snapshots) AS row
        ON CONFLICT DO NOTHING;
    END IF;
END
$$;

CREATE TYPE maintenance_row AS (
    maintenance_id         bigint,
    version                integer,
    status                 text,
    visibility             text,
    service_ids            bigint[],
    announced_at           timestamptz,
    scheduled_start        timestamptz,
    transition_due_at      timestamptz,
    reminder_pending_since timestamptz,
    body                   text
);

-- Writes one row for each window, unless a newer version is stored; inserts timeline entries, unless they are stored, and
-- replaces redacted ones.
CREATE FUNCTION write_maintenance(
    tenant bigint, new_windows maintenance_row[], new_entries timeline_row[], redacted_entries timeline_row[]
) RETURNS void LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    INSERT INTO maintenance AS m (
        tenant_id, maintenance_id, version, status, visibility, service_ids, announced_at, scheduled_start,
        transition_due_at, reminder_pending_since, body)
    SELECT tenant, row.* FROM unnest(new_windows) AS row
    ON CONFLICT (tenant_id, maintenance_id) DO UPDATE SET
        version = excluded.version,
        status = excluded.status,
        visibility = excluded.visibility,
        service_ids = excluded.service_ids,
        scheduled_start = excluded.scheduled_start,
        transition_due_at = excluded.transition_due_at,
        reminder_pending_since = excluded.reminder_pending_since,
        body = excluded.body
    WHERE m.version < excluded.version;
    INSERT INTO maintenance_updates (tenant_id, maintenance_id, version, actor_kind, actor_id, body)
    SELECT tenant, row.* FROM unnest(new_entries) AS row
    ON CONFLICT DO NOTHING;
    UPDATE maintenance_updates u SET body = row.body FROM unnest(redacted_entries) AS row
    WHERE u.tenant_id = tenant AND u.maintenance_id = row.stream_id AND u.version = row.version;
END
$$;

CREATE TYPE subscriptions_row AS (
    subscription_id bigint,
    version         integer,
    status          text,
    channel         text,
    target          text,
    created_at      timestamptz,
    state           text,
    body            text
);

-- Writes one row for each subscription, unless a newer version is stored.
CREATE FUNCTION write_subscriptions(tenant bigint, new_subscriptions subscriptions_row[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    INSERT INTO subscriptions AS s (
        tenant_id, subscription_id, version, status, channel, target, created_at, state, body)
    SELECT tenant, row.* FROM unnest(new_subscriptions) AS row
    ON CONFLICT (tenant_id, subscription_id) DO UPDATE SET
        version = excluded.version,
        status = excluded.status,
        target = excluded.target,
        state = excluded.state,
        body = excluded.body
    WHERE s.version < excluded.version;
END
$$;

CREATE TYPE impact_states_row AS (
    stream_kind text,
    stream_id   bigint,
    version     integer,
    is_active   boolean,
    level       smallint,
    is_excluded boolean,
    service_ids bigint[]
);

CREATE TYPE service_impacts_row AS (
    stream_kind     text,
    stream_id       bigint,
    service_id      bigint,
    started_version integer,
    started_at      timestamptz,
    ended_at        timestamptz,
    level           smallint,
    is_excluded     boolean
);

CREATE TYPE impact_end AS (
    stream_kind text,
    stream_id   bigint,
    service_id  bigint,
    ended_at    timestamptz
);

-- Writes one state for each stream, unless a newer version is stored; ends ongoing impacts; inserts started ones, unless
-- they are stored.
CREATE FUNCTION write_impact(
    tenant bigint, states impact_states_row[], ended impact_end[], started service_impacts_row[]
) RETURNS void LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    INSERT INTO impact_states AS s (
        tenant_id, stream_kind, stream_id, version, is_active, level, is_excluded, service_ids)
    SELECT tenant, row.* FROM unnest(states) AS row
    ON CONFLICT (tenant_id, stream_kind, stream_id) DO UPDATE SET
        version = excluded.version,
        is_active = excluded.is_active,
        level = excluded.level,
        is_excluded = excluded.is_excluded,
        service_ids = excluded.service_ids
    WHERE s.version < excluded.version;
    IF cardinality(ended) > 0 THEN
        UPDATE service_impacts i SET ended_at = row.ended_at FROM unnest(ended) AS row
        WHERE i.tenant_id = tenant AND i.stream_kind = row.stream_kind AND i.stream_id = row.stream_id
            AND i.service_id = row.service_id AND i.ended_at = 'infinity';
    END IF;
    IF cardinality(started) > 0 THEN
        INSERT INTO service_impacts (
            tenant_id, stream_kind, stream_id, service_id, started_version, started_at, ended_at, level, is_excluded)
        SELECT tenant, row.* FROM unnest(started) AS row
        ON CONFLICT DO NOTHING;
    END IF;
END
$$;

CREATE TYPE outbox_state_row AS (
    kind  text,
    id    bigint,
    state text
);

CREATE TYPE outbox_state_key AS (
    kind text,
    id   bigint
);

CREATE TYPE outbox_intents_row AS (
    intent_id       uuid,
    position        bigint,
    subscription_id bigint,
    channel         text,
    topic           text,
    stream_kind     text,
    stream_id       bigint,
    suppressed      boolean,
    created_at      timestamptz
);

-- Inserts or replaces states, deletes others, and inserts intents. A repeated event changes nothing, because its intents
-- have the same ids.
CREATE FUNCTION write_outbox(
    tenant bigint, states outbox_state_row[], deleted outbox_state_key[], intents outbox_intents_row[]
) RETURNS void LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off AS $$
BEGIN
    INSERT INTO outbox_state (tenant_id, kind, id, state)
    SELECT tenant, row.* FROM unnest(states) AS row
    ON CONFLICT (tenant_id, kind, id) DO UPDATE SET state = excluded.state;
    IF cardinality(deleted) > 0 THEN
        DELETE FROM outbox_state s USING unnest(deleted) AS row
        WHERE s.tenant_id = tenant AND s.kind = row.kind AND s.id = row.id;
    END IF;
    IF cardinality(intents) > 0 THEN
        INSERT INTO outbox_intents (
            tenant_id, intent_id, position, subscription_id, channel, topic, stream_kind, stream_id, suppressed,
            created_at)
        SELECT tenant, row.* FROM unnest(intents) AS row
        ON CONFLICT DO NOTHING;
    END IF;
END
$$;
