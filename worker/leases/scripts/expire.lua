-- QUEUED -> EXPIRED, for a job whose deadline has passed while nobody had it. The worker of a running one sees to it.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 queued jobs of its priority (sorted set),
-- 5 deadlines (sorted set), 6 the job's idempotency key (string), if it has one
-- ARGV: 1 job id, 2 outcome (JSON), 3 seconds until all of it expires, 4 seconds until a running job is looked at again
-- Returns 1 where it expired
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

local record = redis.call("HMGET", KEYS[1], "state", "deadline_at")
if record[1] == "RUNNING" then
  redis.call("ZADD", KEYS[5], now + ARGV[4], ARGV[1])
  return 0
end
redis.call("ZREM", KEYS[5], ARGV[1])
if record[1] ~= "QUEUED" or tonumber(record[2]) > now then
  return 0
end
redis.call("HSET", KEYS[1], "state", "EXPIRED", "outcome", ARGV[2], "ended_at", string.format("%.6f", now))
redis.call("ZREM", KEYS[4], ARGV[1])
-- One that waited without a message gets one, for its Celery result.
redis.call("ZADD", KEYS[3], "XX", now, ARGV[1])
redis.call("XADD", KEYS[2], "*", "event", cjson.encode({ type = "ended", state = "EXPIRED", at = now }))
redis.call("EXPIRE", KEYS[1], ARGV[3])
redis.call("EXPIRE", KEYS[2], ARGV[3])
local owner = KEYS[6] and redis.call("GET", KEYS[6])
if owner and string.sub(owner, 1, #ARGV[1] + 1) == ARGV[1] .. " " then
  redis.call("EXPIRE", KEYS[6], ARGV[3])
end
return 1
