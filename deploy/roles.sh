#!/bin/sh
# The postgres image runs this script once, in an empty database. It creates the login of the application, which owns
# nothing: migrations grant rights to the role opsentry_app, and the login is a member of it.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" --set password="$OPSENTRY_DB_PASSWORD" <<'SQL'
CREATE ROLE opsentry_app NOLOGIN;
CREATE ROLE opsentry LOGIN PASSWORD :'password' IN ROLE opsentry_app;
SQL
