-- Forgets a job that failed: record, events, dead letter, and its idempotency key, so that the same job may come again.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 dead letters (sorted set), 4 the job's idempotency key (string), if it has one
-- ARGV: 1 job id
if redis.call("ZREM", KEYS[3], ARGV[1]) == 1 then
  redis.call("DEL", KEYS[1], KEYS[2])
  if KEYS[4] and owns(KEYS[4], ARGV[1]) then
    redis.call("DEL", KEYS[4])
  end
end
