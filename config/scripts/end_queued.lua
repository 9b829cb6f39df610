-- QUEUED -> CANCELLED, or EXPIRED once the deadline has passed, for a job that nobody has: outcome, last event and state in
-- one move. It expires once its message is gone too: whoever took that would find a job that never was. The worker of a
-- running one ends it: it is asked to, or looked at again later.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 queued jobs of its priority (sorted set),
-- 5 deadlines (sorted set), 6 ended jobs (stream), 7 what workers keep for how long (hash), 8 ended jobs of its priority
-- that have a message (sorted set), 9 cancellations (channel), 10 the job's idempotency key (string), if it has one
-- ARGV: 1 job id, 2 CANCELLED or EXPIRED, 3 outcome (JSON of a JobFailure), 4 seconds until all of it expires where no
-- worker has said so, 5 the same where the job says so itself, or "", 6 seconds until a running job's deadline is looked at
-- again; of a cancellation anything where a running job is to be left alone
-- Returns the state the job was found in, nil where there is no job, or the deadline has not passed
local now, is_cancel = clock(), ARGV[2] == "CANCELLED"
local state, deadline_at = unpack(redis.call("HMGET", KEYS[1], "state", "deadline_at"))
if state == "RUNNING" then
  if is_cancel and not ARGV[6] then
    redis.call("HSET", KEYS[1], "cancel_requested", "1")
    -- pcall: who may not publish is heard all the same, when the worker renews its lease.
    redis.pcall("PUBLISH", KEYS[9], ARGV[1])
  elseif not is_cancel then
    redis.call("ZADD", KEYS[5], now + ARGV[6], ARGV[1])
  end
  return state
end
redis.call("ZREM", KEYS[5], ARGV[1])
if state ~= "QUEUED" then
  return state
elseif not is_cancel and tonumber(deadline_at) > now then
  return nil
end
finish(KEYS[1], KEYS[2], KEYS[6], ARGV[1], ARGV[2], ARGV[3], now)
local own = ARGV[5] ~= "" and ARGV[5]
redis.call("HSET", KEYS[1], "kept_seconds", own or redis.call("HGET", KEYS[7], "result") or ARGV[4])
if KEYS[10] then
  redis.call("HSET", KEYS[1], "kept_key", KEYS[10])
end
redis.call("ZADD", KEYS[8], redis.call("ZSCORE", KEYS[4], ARGV[1]) or now, ARGV[1])
redis.call("ZREM", KEYS[4], ARGV[1])
-- One that waited without a message gets one, for its Celery result.
redis.call("ZADD", KEYS[3], "XX", now, ARGV[1])
return state
