#!/bin/sh
# What a container of the fleet server does before it becomes `edge-fleet ...`: it brings what is mounted at $EDGE_FLEET_FROM
# (fleet.yaml, pki/, keys/, read-only) into the data folder, which it may write.
#
# With EDGE_FLEET_KEEP=1 only what is missing in pki/ and keys/ is brought: a process that decides changes these itself.
set -eu
umask 077
from=${EDGE_FLEET_FROM:-/etc/edge-fleet}
folder=${EDGE_FLEET_FOLDER:-/srv/fleet}
for part in . pki keys; do
    [ -d "$from/$part" ] || continue
    mkdir -p "$folder/$part"
    for file in "$from/$part"/*; do
        [ -f "$file" ] || continue
        name=${file##*/}
        if [ "$part" != . ] && [ "${EDGE_FLEET_KEEP:-}" = 1 ] && [ -e "$folder/$part/$name" ]; then
            continue
        fi
        cp "$file" "$folder/$part/.$name.new"
        mv "$folder/$part/.$name.new" "$folder/$part/$name"
    done
done
exec edge-fleet "$@"
