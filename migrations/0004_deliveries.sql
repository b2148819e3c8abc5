-- Deliveries: a ledger of facts about sending. Intents are derived from events; no rebuild touches these tables.

-- The position up to which all of a tenant's intents became deliveries. An intent that a later rebuild derives for an
-- event before it is not sent.
CREATE TABLE outbox_settled (
    tenant_id bigint PRIMARY KEY,
    position  bigint NOT NULL
) WITH (fillfactor = 50);

-- Tenants with intents beyond that position. As in projection_backlog, rows are inserted and deleted but never
-- updated, so that no transaction waits for another.
CREATE TABLE outbox_fresh (
    tenant_id bigint NOT NULL,
    position  bigint NOT NULL,
    PRIMARY KEY (tenant_id, position)
);

-- A trigger writes the row, in the transaction that writes the intents: a projector and a rebuild of any version of
-- the code do so alike.
CREATE FUNCTION note_fresh_intents() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO outbox_fresh (tenant_id, position)
    SELECT n.tenant_id, max(n.position) FROM new_intents n
    LEFT JOIN LATERAL (SELECT position FROM outbox_settled WHERE tenant_id = n.tenant_id LIMIT 1) AS s ON true
    WHERE n.position > coalesce(s.position, 0)
    GROUP BY n.tenant_id
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER outbox_intents_fresh AFTER INSERT ON outbox_intents REFERENCING NEW TABLE AS new_intents
    FOR EACH STATEMENT EXECUTE FUNCTION note_fresh_intents();

-- One row for each enqueued intent, in state `waiting` until it reaches a final state. `due_at` is the time of its next
-- attempt. It is NULL in a final state, and while an older delivery of the same subscription and stream is pending; the
-- end of that one sets it.
CREATE TABLE deliveries (
    tenant_id       bigint NOT NULL,
    intent_id       uuid NOT NULL,
    subscription_id bigint NOT NULL,
    stream_kind     text NOT NULL,
    stream_id       bigint NOT NULL,
    position        bigint NOT NULL,      -- of the event
    channel         text NOT NULL,
    topic           text NOT NULL,
    created_at      timestamptz NOT NULL, -- when the event was recorded
    state           text NOT NULL DEFAULT 'waiting' CHECK (state IN (
        'waiting',
        'delivered',   -- the endpoint accepted it
        'merged',      -- sent within the message of an older intent, `leader`
        'suppressed',  -- withheld by a window with suppress_alerts
        'withheld',    -- no longer public when it was due to the public
        'parked',      -- attempts exhausted, or rejected for good
        'dropped',     -- cancelled by an operator
        'disabled')),  -- the subscription was disabled or removed before
    due_at          timestamptz,
    until_position  bigint,                     -- of the last event that its message contains, once that is final
    leader          uuid,
    attempts        integer NOT NULL DEFAULT 0, -- of this round; a redelivery begins another
    tried           integer NOT NULL DEFAULT 0, -- in total
    answer          integer,                    -- status of the last attempt
    error           text,
    settled_at      timestamptz,
    PRIMARY KEY (tenant_id, intent_id),
    CHECK ((state = 'waiting') = (settled_at IS NULL)),
    CHECK (due_at IS NULL OR state = 'waiting')
) WITH (fillfactor = 70);
-- Due deliveries by endpoint; pending ones by subscription and stream, in order. That order is spelled differently from
-- the index for lists, so that no planner ever uses the latter instead.
CREATE INDEX deliveries_due ON deliveries (tenant_id, subscription_id, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX deliveries_waiting ON deliveries (tenant_id, subscription_id, stream_kind, stream_id, created_at, position)
    WHERE settled_at IS NULL;
CREATE INDEX deliveries_of_subscription ON deliveries (tenant_id, subscription_id, position DESC, intent_id);
CREATE INDEX deliveries_parked ON deliveries (tenant_id) WHERE state = 'parked';
CREATE INDEX deliveries_settled ON deliveries (settled_at) WHERE settled_at IS NOT NULL;

-- Each attempt to send a delivery, with its result.
CREATE TABLE delivery_attempts (
    tenant_id    bigint NOT NULL,
    intent_id    uuid NOT NULL,
    number       integer NOT NULL,
    at           timestamptz NOT NULL,
    milliseconds integer NOT NULL,
    answer       integer, -- status of HTTP or SMTP; NULL: no response
    error        text,    -- NULL: accepted
    PRIMARY KEY (tenant_id, intent_id, number)
);

-- One row for each subscription that a message was ever enqueued for. A sender leases an endpoint and thereby all of its
-- due deliveries. `due_at` is the time of the next look; while leased, the time when the lease ends.
CREATE TABLE endpoints (
    tenant_id       bigint NOT NULL,
    subscription_id bigint NOT NULL,
    channel         text NOT NULL,
    due_at          timestamptz,
    lease           uuid,
    failures        integer NOT NULL DEFAULT 0,  -- consecutive
    failing_since   timestamptz,
    held_until      timestamptz,                 -- no attempt before
    width           smallint NOT NULL DEFAULT 1, -- concurrent messages that it is trusted with; 1 until it proves more
    PRIMARY KEY (tenant_id, subscription_id)
) WITH (fillfactor = 50);
CREATE INDEX endpoints_due ON endpoints (channel, due_at) WHERE due_at IS NOT NULL;

-- Tenants for which an operator has paused sending; tenant 0 pauses all.
CREATE TABLE outbox_paused (
    tenant_id bigint PRIMARY KEY,
    since     timestamptz NOT NULL DEFAULT now()
);

GRANT SELECT, INSERT, UPDATE, DELETE ON
    outbox_settled, outbox_fresh, deliveries, delivery_attempts, endpoints, outbox_paused
TO opsentry_app;
