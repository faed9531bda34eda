#!/bin/sh
# Run once by the image's entry point, when the data directory is empty.
set -eu
psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname "$POSTGRES_DB" \
  --command "CREATE DATABASE mlflow_auth OWNER \"$POSTGRES_USER\""
