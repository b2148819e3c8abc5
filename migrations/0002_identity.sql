-- API tokens of tenants. A row holds sha256 of the token's value, never the value; people know it by its prefix.
CREATE TABLE api_tokens (
    tenant_id  bigint NOT NULL REFERENCES tenants,
    token_id   bigint NOT NULL, -- of the token's stream: the append that records the token assigns it
    prefix     text NOT NULL,
    digest     bytea NOT NULL UNIQUE,
    name       text NOT NULL,
    scopes     text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz,
    PRIMARY KEY (tenant_id, token_id)
);

-- Operator tokens belong to no tenant and read the state of all tenants.
CREATE TABLE operator_tokens (
    token_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    prefix     text NOT NULL,
    digest     bytea NOT NULL UNIQUE,
    name       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);

GRANT SELECT, INSERT ON api_tokens, operator_tokens TO opsentry_app;
GRANT UPDATE (revoked_at) ON api_tokens TO opsentry_app;
GRANT UPDATE (revoked_at) ON operator_tokens TO opsentry_app;
