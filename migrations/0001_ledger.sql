-- The ledger: one gapless, hash-chained, append-only log of events for each tenant.

-- What the application may do hangs on this group role. Its login users are made by the operator
-- (CREATE ROLE opsentry LOGIN PASSWORD '…' IN ROLE opsentry_app) and own nothing.
DO $$
BEGIN
    CREATE ROLE opsentry_app NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- another database of the same cluster has made it
END
$$;

CREATE TABLE tenants (
    tenant_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slug       text NOT NULL UNIQUE CHECK (slug ~ '^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$'),
    name       text NOT NULL CHECK (name <> ''),
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Where each tenant's ledger ends. An append locks this row; whoever holds it gives out the next numbers.
CREATE TABLE ledger_heads (
    tenant_id   bigint PRIMARY KEY REFERENCES tenants,
    position         bigint NOT NULL,
    hash        bytea NOT NULL,
    recorded_at timestamptz NOT NULL
) WITH (fillfactor = 50); -- updated at every append: room for heap-only updates

CREATE TABLE events (
    tenant_id      bigint NOT NULL,
    position            bigint NOT NULL,
    stream_kind    text NOT NULL,
    stream_id      bigint NOT NULL,
    version        integer NOT NULL,
    type           text NOT NULL,
    schema_version smallint NOT NULL,
    occurred_at    timestamptz NOT NULL, -- when it happened in the world
    recorded_at    timestamptz NOT NULL, -- when the ledger took it, strictly increasing within a tenant
    data           text NOT NULL,        -- the exact bytes that were written, never jsonb
    meta           text NOT NULL,        -- ids of actor and request; no names, no addresses
    erasable          text,                 -- what people wrote; NULL where nothing, or erased
    salt           bytea,
    erasable_digest   bytea,                -- sha256(salt || erasable); stays when the erasable are erased
    hash           bytea NOT NULL,       -- sha256(previous hash || canonical form)
    PRIMARY KEY (tenant_id, position),
    CONSTRAINT events_stream_version UNIQUE (tenant_id, stream_kind, stream_id, version)
);

-- Names that only one stream of a tenant may hold (a service's slug, an imported record's id), taken in the
-- append's own transaction because no single stream can see that another one has taken them.
CREATE TABLE reservations (
    tenant_id   bigint NOT NULL,
    name        text NOT NULL,
    stream_kind text NOT NULL,
    stream_id   bigint NOT NULL,
    PRIMARY KEY (tenant_id, name)
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

-- The one change that a written event allows: erasable and salt together become NULL, nothing else moves.
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
-- Also where a session replays as a replica, which skips ordinary triggers.
ALTER TABLE events ENABLE ALWAYS TRIGGER events_append_only;
ALTER TABLE events ENABLE ALWAYS TRIGGER events_no_truncate;

-- Appends a batch of commands, each with its own outcome, in one round trip and one commit.
--
-- Command i is (tenants[i], kinds[i], streams[i], expected[i], sizes[i], reserved[i]); its events are the next
-- sizes[i] entries of the event arrays. streams[i] = 0 asks for a new stream id. CommandHandler come sorted by tenant.
-- occurred is in microseconds since 1970 UTC; NULL means the moment of recording.
-- wait = false never waits for a head that another writer holds: its commands are answered 'busy'.
--
-- outcomes: appended | conflict (versions: the actual one) | reserved (stream_ids: the holder) | busy | no_tenant.
-- versions, positions: of the command's last event. recorded: of its first; each further one is 1 microsecond later.
CREATE FUNCTION append_events(
    tenants bigint[], kinds text[], streams bigint[], expected integer[], sizes integer[], reserved text[],
    types text[], schemas smallint[], occurred bigint[], datas text[], metas text[], erasables text[], salts bytea[],
    wait boolean,
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
BEGIN
    FOR c IN 1 .. cardinality(tenants) LOOP
        first := e + 1;
        e := e + sizes[c];
        stream := streams[c];

        IF current_tenant IS DISTINCT FROM tenants[c] THEN
            IF head_is = 'open' THEN
                UPDATE ledger_heads SET position = head.position, hash = head.hash, recorded_at = head.recorded_at
                WHERE ledger_heads.tenant_id = current_tenant;
            END IF;
            current_tenant := tenants[c];
            IF wait THEN
                SELECT * INTO head FROM ledger_heads WHERE ledger_heads.tenant_id = current_tenant FOR NO KEY UPDATE;
            ELSE
                SELECT * INTO head FROM ledger_heads WHERE ledger_heads.tenant_id = current_tenant FOR NO KEY UPDATE SKIP LOCKED;
            END IF;
            IF FOUND THEN
                head_is := 'open';
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
            moment := moment + interval '1 microsecond';
            moment_us := moment_us + 1;
        END LOOP;

        outcomes[c] := 'appended';
        stream_ids[c] := stream;
        versions[c] := actual;
        positions[c] := head.position;
    END LOOP;

    IF head_is = 'open' THEN
        UPDATE ledger_heads SET position = head.position, hash = head.hash, recorded_at = head.recorded_at
        WHERE ledger_heads.tenant_id = current_tenant;
    END IF;
END
$$;

GRANT SELECT, INSERT ON tenants TO opsentry_app;
GRANT SELECT ON ledger_heads, reservations TO opsentry_app;
-- Events are written through append_events alone, which runs as the owner: the application cannot even insert a
-- row that is not numbered and chained.
GRANT SELECT ON events TO opsentry_app;
REVOKE ALL ON FUNCTION append_events FROM PUBLIC;
GRANT EXECUTE ON FUNCTION append_events TO opsentry_app;
