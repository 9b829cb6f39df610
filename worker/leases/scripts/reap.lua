-- Takes a job from a holder whose lease ran out: RUNNING -> QUEUED, or, where it may not run again (attempts used up,
-- or its caller cancelled it), the lease goes to the reaper, who settles it. Either way the old token is worth nothing.
-- The job stays among the leases until its message is published or it is settled: a reaper may die here too.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set)
-- ARGV: 1 job id, 2 reaper, 3 lease seconds
-- Returns {"requeued", worker, sealed}, {"taken_over", worker, sealed, cancel_requested, newest event, token, attempts,
-- now, submitted_at, deadline_at} or {"kept"}
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

local ends_at = redis.call("ZSCORE", KEYS[3], ARGV[1])
if not ends_at or tonumber(ends_at) > now then
  return { "kept" }
end
local record = redis.call(
  "HMGET", KEYS[1],
  "state", "worker", "sealed", "attempts", "max_attempts", "submitted_at", "deadline_at", "cancel_requested"
)
if record[1] == "QUEUED" then
  redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
  return { "requeued", record[2], record[3] }
elseif record[1] ~= "RUNNING" then
  redis.call("ZREM", KEYS[3], ARGV[1])
  return { "kept" }
end

local attempts, max_attempts = tonumber(record[4] or 0), tonumber(record[5] or 1)
local cancel_requested = record[8] or ""
local token = redis.call("HINCRBY", KEYS[1], "token", 1)
redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
if attempts < max_attempts and cancel_requested == "" then
  redis.call("HSET", KEYS[1], "state", "QUEUED")
  local queued = cjson.encode({ type = "stage", stage = "queued", attempt = attempts, at = now })
  redis.call("XADD", KEYS[2], "*", "event", queued)
  return { "requeued", record[2], record[3] }
end
redis.call("HSET", KEYS[1], "worker", ARGV[2])
local newest = redis.call("XREVRANGE", KEYS[2], "+", "-", "COUNT", 1)
return {
  "taken_over", record[2], record[3], cancel_requested, newest[1] and newest[1][2][2] or "",
  token, attempts, string.format("%.6f", now), record[6], record[7],
}
