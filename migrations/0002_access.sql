-- API tokens. The value is never stored: sha256 of it finds the row, the public prefix names it to people.
CREATE TABLE tokens (
    tenant_id  bigint NOT NULL REFERENCES tenants,
    token_id   bigint GENERATED ALWAYS AS IDENTITY,
    prefix     text NOT NULL,
    digest     bytea NOT NULL UNIQUE,
    name       text NOT NULL,
    scopes     text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    PRIMARY KEY (tenant_id, token_id)
);

GRANT SELECT, INSERT ON tokens TO opsentry_app;
GRANT UPDATE (revoked_at) ON tokens TO opsentry_app;
