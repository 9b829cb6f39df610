-- QUEUED -> CANCELLED: outcome, last event, state and expiry in one move. The worker of a running job is asked to stop.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 queued jobs of its priority (sorted set),
-- 5 deadlines (sorted set), 6 the idempotency key's entry (string), if the job has one
-- ARGV: 1 job id, 2 outcome (JSON of a JobFailure), 3 seconds until all of it expires, 4 channel of cancellations
-- Returns the state the job was found in, nil where there is no job
local state = redis.call("HGET", KEYS[1], "state")
if state == "RUNNING" then
  redis.call("HSET", KEYS[1], "cancel_requested", "1")
  -- pcall: who may not publish is heard all the same, when the worker renews its lease.
  redis.pcall("PUBLISH", ARGV[4], ARGV[1])
elseif state == "QUEUED" then
  local time = redis.call("TIME")
  local now = time[1] + time[2] / 1e6
  redis.call("HSET", KEYS[1], "state", "CANCELLED", "outcome", ARGV[2], "ended_at", string.format("%.6f", now))
  redis.call("XADD", KEYS[2], "*", "event", cjson.encode({ type = "ended", state = "CANCELLED", at = now }))
  redis.call("ZREM", KEYS[4], ARGV[1])
  redis.call("ZREM", KEYS[5], ARGV[1])
  -- One that waited without a message gets one, for its Celery result.
  redis.call("ZADD", KEYS[3], "XX", now, ARGV[1])
  redis.call("EXPIRE", KEYS[1], ARGV[3])
  redis.call("EXPIRE", KEYS[2], ARGV[3])
  -- A job that was published without a record may carry a key that belongs to another job.
  local owner = KEYS[6] and redis.call("GET", KEYS[6])
  if owner and string.sub(owner, 1, #ARGV[1] + 1) == ARGV[1] .. " " then
    redis.call("EXPIRE", KEYS[6], ARGV[3])
  end
end
return state
