#!/bin/sh
# Writes this node's configuration before Redis and Sentinel start. Both rewrite their files when a primary changes,
# so the files live on a volume of the pod's own, and a pod that comes back asks the Sentinels who is primary now.
set -eu
umask 077
me=${POD_NAME:?}

# More than once, since a pod's network may need a moment, and a second primary would be worse than a late one.
primary=
for _ in 1 2 3; do
  for peer in redis-0 redis-1 redis-2; do
    [ "$peer" = "$me" ] && continue
    primary=$(REDISCLI_AUTH=$SENTINEL_PASSWORD timeout 3 redis-cli -h "$peer" -p 26379 \
      sentinel get-master-addr-by-name online-store 2>/dev/null | sed -n 1p) || true
    case $primary in redis-[0-2]) break 2 ;; *) primary= ;; esac
  done
  sleep 1
done
primary=${primary:-redis-0}
echo "$me: the primary is $primary"

cat >/conf/redis.conf <<EOF
include /etc/redis/conf/redis.conf
replica-announce-ip $me
replica-announce-port 6379
masteruser replica
masterauth $REPLICA_PASSWORD
# A primary that lost its replicas stops taking writes that a failover would throw away.
min-replicas-to-write 1
min-replicas-max-lag 10
EOF
[ "$primary" = "$me" ] || echo "replicaof $primary 6379" >>/conf/redis.conf

cat >/conf/sentinel.conf <<EOF
bind 0.0.0.0
port 26379
dir /tmp
requirepass $SENTINEL_PASSWORD
sentinel sentinel-pass $SENTINEL_PASSWORD
sentinel resolve-hostnames yes
sentinel announce-hostnames yes
sentinel announce-ip $me
sentinel announce-port 26379
sentinel monitor online-store $primary 6379 2
sentinel auth-user online-store sentinel
sentinel auth-pass online-store $SENTINEL_PASSWORD
sentinel down-after-milliseconds online-store 5000
sentinel failover-timeout online-store 15000
sentinel parallel-syncs online-store 1
EOF
