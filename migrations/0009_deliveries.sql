-- Sending. What must be told is derived from the ledger (outbox_intents) and may be derived anew at any time; what came
-- of it is a ledger of facts of its own, which no rebuild touches.

-- What exists already comes first, in the order in which passes write it: so no pass waits for this while it is waited for.

-- Scheduled windows that nobody has been reminded of yet: since when people know the hour; NULL for all others.
ALTER TABLE maintenance ADD COLUMN remind_since timestamptz;
CREATE INDEX maintenance_to_remind ON maintenance (scheduled_start) WHERE remind_since IS NOT NULL;

-- Incidents whose last message was withheld by a window, of which people hear when it is over. States hold no erasable.
CREATE INDEX outbox_state_muted ON outbox_state (tenant_id) WHERE kind = 'incident' AND state LIKE '%"muted":%';

-- Subscriptions, as answers show them and as the sender needs them. A read model; a removed one has no erasable left.
CREATE TABLE subscriptions (
    tenant_id       bigint NOT NULL,
    subscription_id bigint NOT NULL,
    version         integer NOT NULL,
    status          text NOT NULL,
    channel         text NOT NULL,
    target          text NOT NULL, -- as answers show it
    created_at      timestamptz NOT NULL,
    state           text NOT NULL, -- the aggregate's state as JSON, encrypted_secret secrets among it
    body            text NOT NULL, -- the answer
    PRIMARY KEY (tenant_id, subscription_id)
) WITH (fillfactor = 80);
CREATE INDEX subscriptions_by_target ON subscriptions (tenant_id, channel, target) WHERE status <> 'removed';
-- Those that wait for whoever owns their target, to be forgotten if nobody agrees.
CREATE INDEX subscriptions_pending ON subscriptions (created_at, tenant_id, subscription_id) WHERE status = 'pending';

-- Up to which event of a tenant it is settled what is sent: all intents until there were taken over into deliveries.
-- One that is derived later for an event until there, by a changed rule, is not sent.
CREATE TABLE outbox_settled (
    tenant_id bigint PRIMARY KEY,
    position  bigint NOT NULL
) WITH (fillfactor = 50);

-- What happened before there was a sender is not told now.
INSERT INTO outbox_settled (tenant_id, position) SELECT tenant_id, position FROM ledger_heads;

-- Tenants that have intents beyond there, as `unprojected` has those with events that were not projected: rows are only
-- inserted and deleted, so that nobody waits for anybody.
CREATE TABLE outbox_fresh (
    tenant_id bigint NOT NULL,
    position       bigint NOT NULL,
    PRIMARY KEY (tenant_id, position)
);

-- Whoever writes intents, a pass or a rebuild of whatever version of the code, leaves the note in the same transaction.
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

-- One row for each intent that was taken over: waiting until it comes to one of the ends. `due_at` is when it may be
-- tried (next); it is NULL at the end, and while an older one of the same subscription and stream waits, whose end
-- sets it.
CREATE TABLE deliveries (
    tenant_id       bigint NOT NULL,
    intent_id       uuid NOT NULL,
    subscription_id bigint NOT NULL,
    stream_kind     text NOT NULL,
    stream_id       bigint NOT NULL,
    position             bigint NOT NULL,      -- the event that is told
    channel         text NOT NULL,
    topic           text NOT NULL,
    created_at      timestamptz NOT NULL, -- when the event was recorded
    state           text NOT NULL DEFAULT 'waiting' CHECK (state IN (
        'waiting',
        'delivered',   -- the endpoint took it
        'merged',      -- told by the message of an older intent, `leader`, in one with it
        'suppressed',  -- withheld by a window with suppress_alerts
        'withheld',    -- not public any more when it was to be sent to the public
        'parked',      -- tried as often as anything is, or refused for good
        'dropped',     -- an operator said so
        'disabled')),  -- the subscription was disabled or removed before
    due_at          timestamptz,
    until_position       bigint,               -- the last event that its message tells, once that is settled
    leader          uuid,
    attempts        integer NOT NULL DEFAULT 0, -- of this round; a redelivery begins another
    tried           integer NOT NULL DEFAULT 0, -- ever
    answer          integer,              -- status of the last attempt
    error           text,
    settled_at      timestamptz,
    PRIMARY KEY (tenant_id, intent_id),
    CHECK ((state = 'waiting') = (settled_at IS NULL)),
    CHECK (due_at IS NULL OR state = 'waiting')
) WITH (fillfactor = 70);
-- What may be tried, by endpoint; what waits, by subscription and stream, in order. That order has another name than in
-- the index for lists, so that no planner ever takes that one instead.
CREATE INDEX deliveries_due ON deliveries (tenant_id, subscription_id, due_at) WHERE due_at IS NOT NULL;
CREATE INDEX deliveries_waiting ON deliveries (tenant_id, subscription_id, stream_kind, stream_id, created_at, position)
    WHERE settled_at IS NULL;
CREATE INDEX deliveries_of_subscription ON deliveries (tenant_id, subscription_id, position DESC, intent_id);
CREATE INDEX deliveries_parked ON deliveries (tenant_id) WHERE state = 'parked';
CREATE INDEX deliveries_settled ON deliveries (settled_at) WHERE settled_at IS NOT NULL;

-- Each time something was sent, and what came of it.
CREATE TABLE delivery_attempts (
    tenant_id    bigint NOT NULL,
    intent_id    uuid NOT NULL,
    number       integer NOT NULL,
    at           timestamptz NOT NULL,
    milliseconds integer NOT NULL,
    answer       integer, -- status, of HTTP or SMTP; NULL: none came
    error        text,    -- NULL: it was taken
    PRIMARY KEY (tenant_id, intent_id, number)
);

-- Who is sent to: one row for each subscription that anything was ever sent to. A sender takes an endpoint, by a lease,
-- and so all that is due there. `due_at` is when somebody should look at it next, which for a leased one is when the
-- lease ends.
CREATE TABLE endpoints (
    tenant_id       bigint NOT NULL,
    subscription_id bigint NOT NULL,
    channel         text NOT NULL,
    due_at          timestamptz,
    lease           uuid,
    failures        integer NOT NULL DEFAULT 0, -- in a row
    failing_since   timestamptz,
    held_until      timestamptz,                -- it is left alone until then, whatever comes
    width           smallint NOT NULL DEFAULT 1, -- so many messages at once it is trusted to take: 1 until it has shown
    PRIMARY KEY (tenant_id, subscription_id)
) WITH (fillfactor = 50);
CREATE INDEX endpoints_due ON endpoints (channel, due_at) WHERE due_at IS NOT NULL;

-- Where an operator has stopped sending: one tenant, or, with tenant 0, all.
CREATE TABLE outbox_paused (
    tenant_id bigint PRIMARY KEY,
    since     timestamptz NOT NULL DEFAULT now()
);

DROP INDEX outbox_intents_pending;
CREATE INDEX outbox_intents_by_position ON outbox_intents (tenant_id, position);

GRANT SELECT, INSERT, UPDATE, DELETE ON
    subscriptions, outbox_settled, outbox_fresh, deliveries, delivery_attempts, endpoints, outbox_paused
TO opsentry_app;
