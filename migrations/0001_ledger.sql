-- The ledger: one gapless, hash-chained, append-only log of events for each tenant.

-- The application's permissions belong to this group role. The operator creates login users as its members
-- (CREATE ROLE opsentry LOGIN PASSWORD '…' IN ROLE opsentry_app); they own nothing.
DO $$
BEGIN
    CREATE ROLE opsentry_app NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- roles belong to the cluster: another database of it has created this one
END
$$;

CREATE TABLE tenants (
    tenant_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slug       text NOT NULL UNIQUE CHECK (slug ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    name       text NOT NULL CHECK (name <> ''),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- The end of each tenant's ledger. An append locks this row before it assigns positions and ids.
CREATE TABLE ledger_heads (
    tenant_id       bigint PRIMARY KEY REFERENCES tenants,
    position        bigint NOT NULL,
    hash            bytea NOT NULL,
    recorded_at     timestamptz NOT NULL,
    -- last_stream_ids[i] is the tenant's last id of stream_kinds[i]. Arrays: a new kind needs no migration.
    stream_kinds    text[] NOT NULL DEFAULT '{}',
    last_stream_ids bigint[] NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50); -- every append updates it: free space allows heap-only updates

CREATE TABLE events (
    tenant_id       bigint NOT NULL,
    position        bigint NOT NULL,      -- dense and in commit order within the tenant
    stream_kind     text NOT NULL,
    stream_id       bigint NOT NULL,
    version         integer NOT NULL,
    type            text NOT NULL,
    schema_version  smallint NOT NULL,
    occurred_at     timestamptz NOT NULL, -- real-world time; may lie in the past
    recorded_at     timestamptz NOT NULL, -- database time; strictly increasing within the tenant
    data            text NOT NULL,        -- text, not jsonb: the chain covers the exact bytes
    meta            text NOT NULL,        -- ids of actor and request; no names, no addresses
    erasable        text,                 -- free text; NULL if there is none or it was redacted
    salt            bytea,
    erasable_digest bytea,                -- sha256(salt || erasable); a redaction keeps it
    hash            bytea NOT NULL,       -- sha256(previous hash || canonical form)
    PRIMARY KEY (tenant_id, position),
    CONSTRAINT events_stream_version UNIQUE (tenant_id, stream_kind, stream_id, version)
);

-- Names that only one stream of a tenant may hold (a service's slug, an imported record's id). The append reserves
-- them in its own transaction, because no single stream can see the names of the others.
CREATE TABLE reservations (
    tenant_id   bigint NOT NULL,
    name        text NOT NULL,
    stream_kind text NOT NULL,
    stream_id   bigint NOT NULL,
    PRIMARY KEY (tenant_id, name)
);

-- The outcome of each command that carried an idempotency key, recorded by the append. The response is derived
-- again from the ledger as of this position, so no copy of it is stored.
CREATE TABLE idempotency_keys (
    tenant_id   bigint NOT NULL,
    key         bytea NOT NULL,   -- sha256 of the token's id and the client's key
    fingerprint bytea NOT NULL,   -- sha256 of the request: method, path, body
    stream_kind text NOT NULL,
    stream_id   bigint NOT NULL,
    version     integer NOT NULL, -- of the stream, after the command
    position    bigint NOT NULL,  -- of the ledger head, after the command
    recorded_at timestamptz NOT NULL,
    PRIMARY KEY (tenant_id, key)
);
CREATE INDEX idempotency_keys_oldest ON idempotency_keys (recorded_at);

-- Ledgers that have grown and are not yet projected. The append inserts a row; the projector deletes it with the
-- checkpoint's move. The worker thus finds lagging tenants without reading the others. Rows are inserted and deleted
-- but never updated, so an append never waits for a projector, not even for a frozen one.
CREATE TABLE projection_backlog (
    tenant_id bigint NOT NULL,
    position  bigint NOT NULL,
    PRIMARY KEY (tenant_id, position)
);

CREATE FUNCTION open_ledger() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    INSERT INTO ledger_heads (tenant_id, position, hash, recorded_at)
    VALUES (NEW.tenant_id, 0, decode(repeat('00', 32), 'hex'), '-infinity');
    RETURN NULL;
END
$$;
CREATE TRIGGER tenants_open_ledger AFTER INSERT ON tenants FOR EACH ROW EXECUTE FUNCTION open_ledger();

-- A redaction is the one permitted change: erasable and salt become NULL together, and nothing else changes.
CREATE FUNCTION events_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.erasable IS NULL AND NEW.salt IS NULL AND OLD.erasable_digest IS NOT NULL THEN
        OLD.erasable := NULL;
        OLD.salt := NULL;
        IF OLD IS NOT DISTINCT FROM NEW THEN
            RETURN NEW;
        END IF;
    END IF;
    RAISE EXCEPTION 'the ledger is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END
$$;
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON events
    FOR EACH ROW EXECUTE FUNCTION events_append_only();
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON events
    FOR EACH STATEMENT EXECUTE FUNCTION events_append_only();
-- ALWAYS: a session with session_replication_role = replica skips ordinary triggers.
ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only;
ALTER TABLE events ENABLE ALWAYS TRIGGER events_no_truncate;

-- An event to append.
CREATE TYPE new_event AS (
    type           text,
    schema_version smallint,
    occurred_at    bigint, -- microseconds since 1970 UTC, because the driver sends the last of 9999 as infinity;
                           -- NULL: the time of recording
    data           text,
    meta           text,
    erasable       text,
    salt           bytea
);

-- Events to append to one stream, all or none.
CREATE TYPE append_command AS (
    tenant_id        bigint,
    stream_kind      text,
    stream_id        bigint,  -- 0: a new stream, under the tenant's next id of this kind
    expected_version integer, -- 0: the stream must not exist
    events           new_event[],
    reservation      text,    -- a name to reserve together with the append; NULL: none
    idempotency_key  bytea,   -- the command is appended once under this key, however often it arrives; NULL: none
    fingerprint      bytea    -- of the request under that key
);

CREATE TYPE append_outcome AS (
    outcome     text,       -- appended | replayed | key_reused | conflict | reserved | busy | no_tenant
    stream_id   bigint,     -- appended, replayed: of the command's stream; reserved: of the holder
    version     integer,    -- appended, replayed: after the command; conflict: the actual version
    position    bigint,     -- appended, replayed: of the ledger head after the command
    recorded_at timestamptz -- appended: of the first event; each further event is recorded one microsecond later
);

CREATE FUNCTION to_microseconds(moment timestamptz) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT (extract(epoch FROM moment) * 1000000)::bigint
$$;

-- In two parts: an interval is multiplied in floating point, which is exact for each part but not for the whole.
CREATE FUNCTION from_microseconds(microseconds bigint) RETURNS timestamptz LANGUAGE sql STABLE AS $$
    SELECT timestamptz 'epoch' + (microseconds / 1000000) * interval '1 second'
        + (microseconds % 1000000) * interval '1 microsecond'
$$;

-- Returns the octets that an event's hash covers, after the previous hash: netstrings of its columns. A single concat()
-- builds them, because a chain of || copies the growing text at every step and then costs more than the insert.
CREATE FUNCTION canonical_form(event events) RETURNS bytea LANGUAGE sql STABLE AS $$
    SELECT convert_to(concat(
        octet_length(event.tenant_id::text), ':', event.tenant_id, ',',
        octet_length(event.position::text), ':', event.position, ',',
        octet_length(event.stream_kind), ':', event.stream_kind, ',',
        octet_length(event.stream_id::text), ':', event.stream_id, ',',
        octet_length(event.version::text), ':', event.version, ',',
        octet_length(event.type), ':', event.type, ',',
        octet_length(event.schema_version::text), ':', event.schema_version, ',',
        octet_length(to_microseconds(event.occurred_at)::text), ':', to_microseconds(event.occurred_at), ',',
        octet_length(to_microseconds(event.recorded_at)::text), ':', to_microseconds(event.recorded_at), ',',
        octet_length(event.data), ':', event.data, ',',
        octet_length(event.meta), ':', event.meta, ',',
        coalesce(2 * octet_length(event.erasable_digest), 0), ':', encode(event.erasable_digest, 'hex'), ','), 'UTF8')
$$;

-- Stores a moved ledger head and adds its tenant to the projection backlog.
CREATE FUNCTION move_ledger_head(head ledger_heads) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    UPDATE ledger_heads h SET
        position = head.position,
        hash = head.hash,
        recorded_at = head.recorded_at,
        stream_kinds = head.stream_kinds,
        last_stream_ids = head.last_stream_ids
    WHERE h.tenant_id = head.tenant_id;
    INSERT INTO projection_backlog (tenant_id, position) VALUES (head.tenant_id, head.position);
END
$$;

-- Appends a batch of commands in one round trip and one commit; returns the outcome of each, in their order.
--
-- Commands arrive sorted by tenant. If another writer holds a tenant's head, `wait` waits for it, at most for
-- lock_timeout; without `wait`, the tenant's commands are answered `busy`. A batch that waits has one tenant, because two
-- waiting batches could wait for each other. Every statement names the tenant, so a batch of one tenant touches that
-- tenant's rows alone.
CREATE FUNCTION append_events(commands append_command[], wait boolean) RETURNS SETOF append_outcome
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '1s' AS $$
DECLARE
    command append_command;
    input new_event;
    event events;
    tenant bigint;           -- of the current command
    head ledger_heads;       -- of that tenant; NULL if it was not taken
    taken_at bigint;         -- the head's position when it was taken
    kind_index integer;      -- of the command's stream kind in head.stream_kinds
    id bigint;               -- of the command's stream
    current_version integer; -- of the command's stream
    earlier idempotency_keys;
    holder bigint;
    first_moment timestamptz;
    moment timestamptz;
BEGIN
    FOREACH command IN ARRAY commands LOOP
        IF tenant IS DISTINCT FROM command.tenant_id THEN
            IF head.position > taken_at THEN
                PERFORM move_ledger_head(head);
            END IF;
            tenant := command.tenant_id;
            IF wait THEN
                SELECT * INTO head FROM ledger_heads h WHERE h.tenant_id = tenant FOR NO KEY UPDATE;
            ELSE
                SELECT * INTO head FROM ledger_heads h WHERE h.tenant_id = tenant FOR NO KEY UPDATE SKIP LOCKED;
            END IF;
            taken_at := head.position;
        END IF;
        IF head.tenant_id IS NULL THEN
            RETURN NEXT (
                CASE WHEN EXISTS (SELECT FROM ledger_heads h WHERE h.tenant_id = tenant) THEN 'busy'
                    ELSE 'no_tenant' END,
                NULL, NULL, NULL, NULL)::append_outcome;
            CONTINUE;
        END IF;

        -- Keys come before versions: a repeated command would conflict with its own first time.
        IF command.idempotency_key IS NOT NULL THEN
            SELECT * INTO earlier FROM idempotency_keys k
            WHERE k.tenant_id = tenant AND k.key = command.idempotency_key;
            IF FOUND THEN
                RETURN NEXT (
                    CASE WHEN earlier.fingerprint = command.fingerprint THEN 'replayed' ELSE 'key_reused' END,
                    earlier.stream_id, earlier.version, earlier.position, NULL)::append_outcome;
                CONTINUE;
            END IF;
        END IF;

        id := command.stream_id;
        current_version := 0;
        IF id <> 0 THEN
            SELECT e.version INTO current_version FROM events e
            WHERE e.tenant_id = tenant AND e.stream_kind = command.stream_kind AND e.stream_id = id
            ORDER BY e.version DESC LIMIT 1;
            current_version := coalesce(current_version, 0);
        END IF;
        IF current_version <> command.expected_version THEN
            RETURN NEXT ('conflict', id, current_version, NULL, NULL)::append_outcome;
            CONTINUE;
        END IF;

        IF current_version = 0 THEN
            kind_index := coalesce(
                array_position(head.stream_kinds, command.stream_kind), cardinality(head.stream_kinds) + 1);
            IF id = 0 THEN
                id := coalesce(head.last_stream_ids[kind_index], 0) + 1;
            END IF;
        END IF;

        IF command.reservation IS NOT NULL THEN
            INSERT INTO reservations (tenant_id, name, stream_kind, stream_id)
            VALUES (tenant, command.reservation, command.stream_kind, id)
            ON CONFLICT (tenant_id, name) DO NOTHING;
            IF NOT FOUND THEN
                SELECT r.stream_id INTO holder FROM reservations r
                WHERE r.tenant_id = tenant AND r.name = command.reservation;
                RETURN NEXT ('reserved', holder, NULL, NULL, NULL)::append_outcome;
                CONTINUE;
            END IF;
        END IF;

        -- Nothing refuses the command from here on, so its events consume the id. A given id raises the counter too:
        -- the next new stream must not meet it.
        IF current_version = 0 AND cardinality(command.events) > 0 THEN
            head.stream_kinds[kind_index] := command.stream_kind;
            head.last_stream_ids[kind_index] := greatest(head.last_stream_ids[kind_index], id);
        END IF;

        first_moment := greatest(clock_timestamp(), head.recorded_at + interval '1 microsecond');
        moment := first_moment;
        FOREACH input IN ARRAY command.events LOOP
            current_version := current_version + 1;
            head.position := head.position + 1;
            head.recorded_at := moment;
            event.tenant_id := tenant;
            event.position := head.position;
            event.stream_kind := command.stream_kind;
            event.stream_id := id;
            event.version := current_version;
            event.type := input.type;
            event.schema_version := input.schema_version;
            event.occurred_at := coalesce(from_microseconds(input.occurred_at), moment);
            event.recorded_at := moment;
            event.data := input.data;
            event.meta := input.meta;
            event.erasable := input.erasable;
            event.salt := input.salt;
            event.erasable_digest := sha256(input.salt || convert_to(input.erasable, 'UTF8'));
            head.hash := sha256(head.hash || canonical_form(event));
            event.hash := head.hash;
            INSERT INTO events (
                tenant_id, position, stream_kind, stream_id, version, type, schema_version, occurred_at, recorded_at,
                data, meta, erasable, salt, erasable_digest, hash)
            VALUES (event.*);
            -- A redaction happens only here, through the event that records it.
            IF input.type LIKE '%.redacted' THEN
                UPDATE events e SET erasable = NULL, salt = NULL
                WHERE e.tenant_id = tenant AND e.stream_kind = command.stream_kind AND e.stream_id = id
                    AND e.version < current_version AND e.erasable_digest IS NOT NULL AND e.version IN (
                        SELECT named::integer FROM json_array_elements_text(input.data::json -> 'versions') AS named);
            END IF;
            moment := moment + interval '1 microsecond';
        END LOOP;

        IF command.idempotency_key IS NOT NULL THEN
            INSERT INTO idempotency_keys (
                tenant_id, key, fingerprint, stream_kind, stream_id, version, position, recorded_at)
            VALUES (
                tenant, command.idempotency_key, command.fingerprint, command.stream_kind, id, current_version,
                head.position, clock_timestamp());
        END IF;
        RETURN NEXT ('appended', id, current_version, head.position, first_moment)::append_outcome;
    END LOOP;
    IF head.position > taken_at THEN
        PERFORM move_ledger_head(head);
    END IF;
END
$$;

-- Returns the last position that was recorded at `moment` or before, 0 if there is none. recorded_at increases with
-- position, so a binary search over the primary key finds it, and appends maintain no further index.
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

-- Returns the version that a stream had at position `until`, 0 if it did not exist then; by binary search as above.
CREATE FUNCTION version_at(tenant bigint, kind text, stream bigint, until bigint) RETURNS integer
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
            AND version = middle) <= until THEN
            low := middle;
        ELSE
            high := middle - 1;
        END IF;
    END LOOP;
    RETURN low;
END
$$;

GRANT SELECT, INSERT ON tenants TO opsentry_app;
GRANT SELECT ON ledger_heads, reservations TO opsentry_app;
GRANT SELECT, DELETE ON idempotency_keys TO opsentry_app;
GRANT SELECT, INSERT, DELETE ON projection_backlog TO opsentry_app;
-- append_events runs as the owner and alone writes events: the application cannot insert a row without a position
-- and a hash.
GRANT SELECT ON events TO opsentry_app;
REVOKE ALL ON FUNCTION append_events FROM PUBLIC;
GRANT EXECUTE ON FUNCTION append_events TO opsentry_app;
