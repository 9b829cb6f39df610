-- Forgets a job that failed: record, events, dead letter, and its idempotency key, so that the same job may come again.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 dead letters (sorted set), 4 the idempotency key's entry, if it has one
-- ARGV: 1 job id
if redis.call("ZREM", KEYS[3], ARGV[1]) == 0 then
  return
end
redis.call("DEL", KEYS[1], KEYS[2])
local owner = KEYS[4] and redis.call("GET", KEYS[4])
if owner and string.sub(owner, 1, #ARGV[1] + 1) == ARGV[1] .. " " then
  redis.call("DEL", KEYS[4])
end
