#!/bin/sh
# Makes the secrets of infra/compose.yaml, once, in a folder that only its owner may enter: `sh infra/make-secrets.sh [FOLDER]`.
# The files in it can be read by all, because a container's user is another one than the host's.
set -eu
folder=${1:-$(dirname "$0")/secrets}
[ ! -e "$folder" ] || { echo "$folder is there already" >&2; exit 1; }
mkdir -m 700 "$folder"
random() { od -An -N 24 -t x1 /dev/urandom | tr -d ' \n'; }
keep() { printf '%s' "$2" > "$folder/$1"; }
umask 022
keep AWS_ACCESS_KEY_ID "MM$(random | cut -c1-18)"
keep AWS_SECRET_ACCESS_KEY "$(random)"
keep PREFECT_SERVER_DATABASE_PASSWORD "$(random)"
keep PREFECT_SERVER_API_AUTH_STRING "mmimpute:$(random)"
keep RAY_AUTH_TOKEN "$(random)"
keep identities.json "{\"identities\": [{\"name\": \"mmimpute\", \"actions\": [\"Admin\", \"Read\", \"List\", \"Tagging\", \"Write\"],
 \"credentials\": [{\"accessKey\": \"$(cat "$folder/AWS_ACCESS_KEY_ID")\", \"secretKey\": \"$(cat "$folder/AWS_SECRET_ACCESS_KEY")\"}]}]}"
