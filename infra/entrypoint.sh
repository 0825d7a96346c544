#!/bin/sh
# Secrets are files, named like the variable that is to hold them; a program's own variables never stand in an image or a compose file.
set -eu
for secret in "${SECRETS:-/run/secrets}"/[A-Z]*; do
    [ -f "$secret" ] && export "${secret##*/}=$(cat "$secret")"
done
exec "$@"
