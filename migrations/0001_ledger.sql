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

-- The end of each tenant's ledger. An append locks this row before it assigns positions.
CREATE TABLE ledger_heads (
    tenant_id   bigint PRIMARY KEY REFERENCES tenants,
    position    bigint NOT NULL,
    hash        bytea NOT NULL,
    recorded_at timestamptz NOT NULL
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

CREATE SEQUENCE incident_ids;
CREATE SEQUENCE maintenance_ids;
CREATE SEQUENCE service_ids;
CREATE SEQUENCE subscription_ids;

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

-- Appends a batch of commands, each with its own outcome, in one round trip and one commit.
--
-- Command i is (tenants[i], kinds[i], streams[i], expected[i], sizes[i], reserved[i]); its events are the next
-- sizes[i] entries of the event arrays. streams[i] = 0 asks for a new stream id. CommandHandler come sorted by tenant.
-- occurred is in microseconds since 1970 UTC; NULL means the moment of recording.
-- keys[i], where not NULL, makes the command safe to send again; fingerprints[i] tells what was asked for under it.
-- wait = false never waits for a head that another writer holds: its commands are answered 'busy'.
--
-- outcomes: appended | replayed (stream_ids, versions, positions: of the first time) | key_reused | conflict (versions: the
-- actual one) | reserved (stream_ids: the holder) | busy | no_tenant.
-- versions, positions: of the command's last event, or what they were already where it has none.
-- recorded: of its first event; each further one is 1 microsecond later.
CREATE FUNCTION append_events(
    tenants bigint[], kinds text[], streams bigint[], expected integer[], sizes integer[], reserved text[],
    types text[], schemas smallint[], occurred bigint[], datas text[], metas text[], erasables text[], salts bytea[],
    wait boolean, keys bytea[] DEFAULT NULL, fingerprints bytea[] DEFAULT NULL,
    OUT outcomes text[], OUT stream_ids bigint[], OUT versions integer[], OUT positions bigint[], OUT recorded timestamptz[]
) LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '1s' AS $$
DECLARE
    head ledger_heads;
    head_is text;             -- 'open' | 'busy' | 'no_tenant': how taking the current tenant's head went
    current_tenant bigint;
    first integer;            -- index of the command's first event
    e integer := 0;           -- index of the last event looked at
    stream bigint;
    actual integer;
    holder bigint;
    moment timestamptz;       -- recorded_at of the current event, and the same in microseconds since 1970
    moment_us bigint;
    happened timestamptz;
    happened_us bigint;
    digest bytea;
    reserved_name text;
    earlier idempotency_keys;
    began bigint;             -- the position at which the current tenant's head was taken
    grown bigint[] := '{}';   -- tenants whose ledgers have grown, and to where
    grown_to bigint[] := '{}';
BEGIN
    FOR c IN 1 .. cardinality(tenants) LOOP
        first := e + 1;
        e := e + sizes[c];
        stream := streams[c];

        IF current_tenant IS DISTINCT FROM tenants[c] THEN
            IF head_is = 'open' AND head.position > began THEN
                UPDATE ledger_heads SET position = head.position, hash = head.hash, recorded_at = head.recorded_at
                WHERE ledger_heads.tenant_id = current_tenant;
                grown := grown || current_tenant;
                grown_to := grown_to || head.position;
            END IF;
            current_tenant := tenants[c];
            IF wait THEN
                SELECT * INTO head FROM ledger_heads WHERE ledger_heads.tenant_id = current_tenant FOR NO KEY UPDATE;
            ELSE
                SELECT * INTO head FROM ledger_heads WHERE ledger_heads.tenant_id = current_tenant FOR NO KEY UPDATE SKIP LOCKED;
            END IF;
            IF FOUND THEN
                head_is := 'open';
                began := head.position;
            ELSIF EXISTS (SELECT FROM ledger_heads WHERE ledger_heads.tenant_id = current_tenant) THEN
                head_is := 'busy';
            ELSE
                head_is := 'no_tenant';
            END IF;
        END IF;

        IF head_is <> 'open' THEN
            outcomes[c] := head_is;
            stream_ids[c] := stream;
            versions[c] := NULL; positions[c] := NULL; recorded[c] := NULL;
            CONTINUE;
        END IF;

        -- Before anything can conflict: the conflict would be with the command's own first time.
        IF keys[c] IS NOT NULL THEN
            SELECT * INTO earlier FROM idempotency_keys k WHERE k.tenant_id = current_tenant AND k.key = keys[c];
            IF FOUND THEN
                outcomes[c] := CASE WHEN earlier.fingerprint = fingerprints[c] THEN 'replayed' ELSE 'key_reused' END;
                stream_ids[c] := earlier.stream_id;
                versions[c] := earlier.version; positions[c] := earlier.position; recorded[c] := NULL;
                CONTINUE;
            END IF;
        END IF;

        actual := 0;
        IF stream <> 0 THEN
            SELECT version INTO actual FROM events
            WHERE events.tenant_id = current_tenant AND stream_kind = kinds[c] AND events.stream_id = stream
            ORDER BY version DESC LIMIT 1;
            actual := coalesce(actual, 0);
        END IF;
        IF actual <> expected[c] THEN
            outcomes[c] := 'conflict';
            stream_ids[c] := stream;
            versions[c] := actual; positions[c] := NULL; recorded[c] := NULL;
            CONTINUE;
        END IF;

        IF stream = 0 THEN
            stream := nextval((kinds[c] || '_ids')::regclass);
        END IF;

        reserved_name := reserved[c];
        IF reserved_name IS NOT NULL THEN
            INSERT INTO reservations VALUES (current_tenant, reserved_name, kinds[c], stream)
            ON CONFLICT (tenant_id, name) DO NOTHING;
            IF NOT FOUND THEN
                SELECT reservations.stream_id INTO holder FROM reservations
                WHERE reservations.tenant_id = current_tenant AND reservations.name = reserved_name;
                outcomes[c] := 'reserved';
                stream_ids[c] := holder;
                versions[c] := NULL; positions[c] := NULL; recorded[c] := NULL;
                CONTINUE;
            END IF;
        END IF;

        moment := greatest(date_trunc('microseconds', clock_timestamp()), head.recorded_at + interval '1 microsecond');
        moment_us := extract(epoch FROM moment) * 1000000;
        recorded[c] := moment;
        FOR i IN first .. e LOOP
            actual := actual + 1;
            head.position := head.position + 1;
            head.recorded_at := moment;
            IF occurred[i] IS NULL THEN
                happened := moment;
                happened_us := moment_us;
            ELSE
                happened_us := occurred[i];
                -- In two parts, as an interval is multiplied in floating point: each is exact, the whole is not.
                happened := timestamptz 'epoch' + (happened_us / 1000000) * interval '1 second'
                    + (happened_us % 1000000) * interval '1 microsecond';
            END IF;
            digest := sha256(salts[i] || convert_to(erasables[i], 'UTF8'));
            -- One concat() of netstrings: a chain of || copies the growing text at every step, and the hash of an
            -- event then costs more than its insert.
            head.hash := sha256(head.hash || convert_to(concat(
                octet_length(current_tenant::text), ':', current_tenant, ',',
                octet_length(head.position::text), ':', head.position, ',',
                octet_length(kinds[c]), ':', kinds[c], ',',
                octet_length(stream::text), ':', stream, ',',
                octet_length(actual::text), ':', actual, ',',
                octet_length(types[i]), ':', types[i], ',',
                octet_length(schemas[i]::text), ':', schemas[i], ',',
                octet_length(happened_us::text), ':', happened_us, ',',
                octet_length(moment_us::text), ':', moment_us, ',',
                octet_length(datas[i]), ':', datas[i], ',',
                octet_length(metas[i]), ':', metas[i], ',',
                coalesce(2 * octet_length(digest), 0), ':', encode(digest, 'hex'), ','), 'UTF8'));
            INSERT INTO events VALUES (
                current_tenant, head.position, kinds[c], stream, actual, types[i], schemas[i], happened, moment,
                datas[i], metas[i], erasables[i], salts[i], digest, head.hash);
            -- The one way to erase erasable: by the event that names them. There is no erasure without its record.
            IF types[i] LIKE '%.redacted' THEN
                UPDATE events SET erasable = NULL, salt = NULL
                WHERE events.tenant_id = current_tenant AND stream_kind = kinds[c] AND events.stream_id = stream
                    AND version < actual AND erasable_digest IS NOT NULL AND version IN (
                        SELECT named::integer FROM json_array_elements_text(datas[i]::json -> 'versions') AS named);
            END IF;
            moment := moment + interval '1 microsecond';
            moment_us := moment_us + 1;
        END LOOP;

        IF keys[c] IS NOT NULL THEN
            INSERT INTO idempotency_keys VALUES (
                current_tenant, keys[c], fingerprints[c], kinds[c], stream, actual, head.position, clock_timestamp());
        END IF;

        outcomes[c] := 'appended';
        stream_ids[c] := stream;
        versions[c] := actual;
        positions[c] := head.position;
    END LOOP;

    IF head_is = 'open' AND head.position > began THEN
        UPDATE ledger_heads SET position = head.position, hash = head.hash, recorded_at = head.recorded_at
        WHERE ledger_heads.tenant_id = current_tenant;
        grown := grown || current_tenant;
        grown_to := grown_to || head.position;
    END IF;
    INSERT INTO projection_backlog (tenant_id, position) SELECT * FROM unnest(grown, grown_to);
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
