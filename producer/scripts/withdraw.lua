-- Takes back a job that could not be published.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 deadlines (sorted set), 4 the idempotency key's entry (string), if the
-- job has one
-- ARGV: 1 job id
-- Returns 1 when it is gone, 0 when a worker has the job: its message went out, only the receipt was lost
if redis.call("HGET", KEYS[1], "state") ~= "QUEUED" then
  return 0
end
redis.call("ZREM", KEYS[2], ARGV[1])
redis.call("ZREM", KEYS[3], ARGV[1])
redis.call("DEL", KEYS[1])
if KEYS[4] then
  redis.call("DEL", KEYS[4])
end
return 1
