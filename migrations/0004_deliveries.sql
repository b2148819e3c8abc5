-- Deliveries: a ledger of facts about sending. Intents are derived from events; no rebuild touches these tables.

-- The outbox cursor: the position up to which all of a tenant's intents became deliveries. An intent that a later
-- rebuild derives for an event before it is not sent.
CREATE TABLE outbox_cursors (
    tenant_id bigint PRIMARY KEY,
    position  bigint NOT NULL
) WITH (fillfactor = 50);

-- Tenants with intents beyond their cursor. As in projection_backlog, rows are inserted and deleted but never updated,
-- so that no transaction waits for another.
CREATE TABLE outbox_backlog (
    tenant_id bigint NOT NULL,
    position  bigint NOT NULL,
    PRIMARY KEY (tenant_id, position)
);

-- A trigger writes the row, in the transaction that writes the intents: a projector and a rebuild of any version of
-- the code do so alike.
CREATE FUNCTION add_to_outbox_backlog() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO outbox_backlog (tenant_id, position)
    SELECT n.tenant_id, max(n.position) FROM new_intents n
    LEFT JOIN LATERAL (SELECT position FROM outbox_cursors WHERE tenant_id = n.tenant_id LIMIT 1) AS c ON true
    WHERE n.position > coalesce(c.position, 0)
    GROUP BY n.tenant_id
    ON CONFLICT DO NOTHING;
    RETURN NULL;
END
$$;
CREATE TRIGGER outbox_intents_backlog AFTER INSERT ON outbox_intents REFERENCING NEW TABLE AS new_intents
    FOR EACH STATEMENT EXECUTE FUNCTION add_to_outbox_backlog();

-- One row for each enqueued intent. `pending` is the only state that is not final; a redelivery returns to it.
-- `next_attempt_at` is NULL in a final state, and while an older delivery of the same ordering key is pending: the end
-- of that one sets it. The ordering key is (tenant_id, subscription_id, stream_kind, stream_id).
CREATE TABLE deliveries (
    tenant_id         bigint NOT NULL,
    intent_id         uuid NOT NULL,
    subscription_id   bigint NOT NULL,
    stream_kind       text NOT NULL,
    stream_id         bigint NOT NULL,
    position          bigint NOT NULL,      -- of the event
    channel           text NOT NULL,
    topic             text NOT NULL,
    created_at        timestamptz NOT NULL, -- when the event was recorded
    state             text NOT NULL DEFAULT 'pending' CHECK (state IN (
        'pending',
        'delivered',   -- the endpoint accepted the message
        'coalesced',   -- reported by the message of an older delivery, `coalesced_into`
        'suppressed',  -- withheld by a maintenance window with suppress_alerts
        'withheld',    -- no longer visible to the subscription's audience when it was due
        'exhausted',   -- all attempts failed
        'cancelled',   -- cancelled by an operator
        'disabled')),  -- the subscription was disabled or removed before
    next_attempt_at   timestamptz,
    last_position     bigint,               -- of the last event that the message reports; set by the first attempt
    coalesced_into    uuid,
    attempts_in_round integer NOT NULL DEFAULT 0, -- since the delivery was last put back to pending
    attempts_total    integer NOT NULL DEFAULT 0,
    response_status   integer,              -- of the last attempt
    error             text,
    finalized_at      timestamptz,
    PRIMARY KEY (tenant_id, intent_id),
    CHECK ((state = 'pending') = (finalized_at IS NULL)),
    CHECK (next_attempt_at IS NULL OR state = 'pending')
) WITH (fillfactor = 70);
-- Due deliveries by endpoint; pending ones by ordering key, in order. That order is spelled differently from the index
-- for lists, so that no planner ever uses the latter instead.
CREATE INDEX deliveries_due ON deliveries (tenant_id, subscription_id, next_attempt_at)
    WHERE next_attempt_at IS NOT NULL;
CREATE INDEX deliveries_pending ON deliveries (tenant_id, subscription_id, stream_kind, stream_id, created_at, position)
    WHERE finalized_at IS NULL;
CREATE INDEX deliveries_of_subscription ON deliveries (tenant_id, subscription_id, position DESC, intent_id);
CREATE INDEX deliveries_exhausted ON deliveries (tenant_id) WHERE state = 'exhausted';
CREATE INDEX deliveries_finalized ON deliveries (finalized_at) WHERE finalized_at IS NOT NULL;

-- Each attempt to send a delivery, with its result.
CREATE TABLE delivery_attempts (
    tenant_id       bigint NOT NULL,
    intent_id       uuid NOT NULL,
    number          integer NOT NULL,
    attempted_at    timestamptz NOT NULL,
    duration_ms     integer NOT NULL,
    response_status integer, -- of HTTP or SMTP; NULL: no response
    error           text,    -- NULL: accepted
    PRIMARY KEY (tenant_id, intent_id, number)
);

-- One row for each subscription that a message was ever enqueued for, with the health of its endpoint. A sender leases
-- an endpoint and thereby all of its due deliveries. `available_at` is the time from which a sender may lease it: the
-- next attempt, or the end of the present lease.
CREATE TABLE endpoints (
    tenant_id            bigint NOT NULL,
    subscription_id      bigint NOT NULL,
    channel              text NOT NULL,
    available_at         timestamptz,
    lease                uuid,
    consecutive_failures integer NOT NULL DEFAULT 0,
    failing_since        timestamptz,
    backoff_until        timestamptz,                 -- no attempt before
    concurrency          smallint NOT NULL DEFAULT 1, -- messages in flight at once; 1 until successes earn more
    PRIMARY KEY (tenant_id, subscription_id)
) WITH (fillfactor = 50);
CREATE INDEX endpoints_available ON endpoints (channel, available_at) WHERE available_at IS NOT NULL;

-- Tenants for which an operator has paused sending; tenant 0 pauses all.
CREATE TABLE sending_pauses (
    tenant_id bigint PRIMARY KEY,
    paused_at timestamptz NOT NULL DEFAULT now()
);

GRANT SELECT, INSERT, UPDATE, DELETE ON
    outbox_cursors, outbox_backlog, deliveries, delivery_attempts, endpoints, sending_pauses
TO opsentry_app;
