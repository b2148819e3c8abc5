#!/bin/sh
# Run once by the postgres image: the application's login, which owns nothing. Its rights hang on opsentry_app and are
# granted by the migrations.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set password="$OPSENTRY_DB_PASSWORD" <<'SQL'
CREATE ROLE opsentry_app NOLOGIN;
CREATE ROLE opsentry LOGIN PASSWORD :'password' IN ROLE opsentry_app;
SQL
