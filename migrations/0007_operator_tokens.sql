-- Tokens of operators, who belong to no tenant and read how all of them stand. Kept as tenants' tokens are.
CREATE TABLE operator_tokens (
    token_id   bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    prefix     text NOT NULL,
    digest     bytea NOT NULL UNIQUE,
    name       text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz,
    revoked_at timestamptz
);

GRANT SELECT, INSERT ON operator_tokens TO opsentry_app;
GRANT UPDATE (revoked_at) ON operator_tokens TO opsentry_app;
