-- Forgets a job that failed: record, events, dead letter, Celery's result, and its idempotency key, so that the same job may
-- come again.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 dead letters (sorted set), 4 Celery's result (string), 5 the job's idempotency
-- key (string), if it has one
-- ARGV: 1 job id
if redis.call("ZREM", KEYS[3], ARGV[1]) == 1 then
  redis.call("DEL", KEYS[1], KEYS[2], KEYS[4])
  if KEYS[5] and owns(KEYS[5], ARGV[1]) then
    redis.call("DEL", KEYS[5])
  end
end
