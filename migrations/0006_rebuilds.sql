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
    ADD COLUMN rebuild_halted_at   bigint, -- an event that a rebuild could not apply: the rows are as they were before it
    ADD COLUMN rebuild_error text;

-- Who is still to be rebuilt, and who stands still: found without looking at the others.
CREATE INDEX checkpoints_generation ON checkpoints (projection, generation) WHERE rebuild_error IS NULL;
CREATE INDEX checkpoints_stopped ON checkpoints (projection)
    WHERE halted_at IS NOT NULL OR rebuild_error IS NOT NULL;

-- Where ledgers have grown and nobody has projected it yet: written with the append, deleted with the checkpoint. So the
-- worker's poll finds who lags without looking at those who do not. Rows are only ever inserted and deleted, never
-- updated, so that an append waits for no projector, not even for one that is frozen.
CREATE TABLE unprojected (
    tenant_id bigint NOT NULL,
    position       bigint NOT NULL,
    PRIMARY KEY (tenant_id, position)
);
INSERT INTO unprojected SELECT tenant_id, position FROM ledger_heads WHERE position > 0;

-- The same function as before, which now also notes whose ledgers have grown.

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
CREATE OR REPLACE FUNCTION append_events(
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
    INSERT INTO unprojected SELECT * FROM unnest(grown, grown_to);
END
$$;

GRANT SELECT, INSERT, UPDATE ON projections TO opsentry_app;
GRANT SELECT, INSERT, DELETE ON unprojected TO opsentry_app;
