-- Takes a job from a holder whose lease ran out: RUNNING -> QUEUED, or, where it may not run again (attempts used up,
-- or its caller cancelled it), the lease goes to the reaper, who settles it. Either way the old token is worth nothing.
-- The job stays among the leases until its message is published or it is settled: a reaper may die here too.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set)
-- ARGV: 1 job id, 2 reaper, 3 lease seconds, 4 the new token
-- Returns {"requeued", dead worker or "", sealed, priority, token}, {"taken_over", worker, sealed, cancel_requested, stage,
-- attempts, max_attempts, now, submitted_at, deadline_at, max_visual_tokens} or {"kept"}
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

local ends_at = redis.call("ZSCORE", KEYS[3], ARGV[1])
if not ends_at or tonumber(ends_at) > now then
  return { "kept" }
end
local record = redis.call(
  "HMGET", KEYS[1],
  "state", "worker", "sealed", "attempts", "max_attempts", "submitted_at", "deadline_at", "cancel_requested",
  "claimed_at", "priority", "token"
)
local priority = record[10] or "normal"
if not record[1] then
  redis.call("ZREM", KEYS[3], ARGV[1])
  return { "kept" }
elseif record[1] ~= "RUNNING" then
  redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
  return { "requeued", "", record[3], priority, record[11] or "0" }
end

-- Where the dead worker was, from the last that it told.
local stages = { frames = "decode", text = "generate" }
local newest = redis.call("XREVRANGE", KEYS[2], "+", "-", "COUNT", 1)
local event = newest[1] and cjson.decode(newest[1][2][2]) or {}
local stage = event.stage or stages[event.type] or "open"

local attempts, max_attempts = tonumber(record[4] or 0), tonumber(record[5] or 1)
local cancel_requested = record[8] or ""
redis.call("HSET", KEYS[1], "token", ARGV[4])
redis.call("HINCRBY", KEYS[1], "deaths", 1)
redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
-- A reaper that took the job over and died too is no attempt of its own.
redis.call("HSETNX", KEYS[1], "attempt:" .. attempts, cjson.encode({
  attempt = attempts, worker = record[2], began_at = tonumber(record[9]), ended_at = now,
  stage = stage, code = "WORKER_LOST", message = "The worker died under the job.",
}))
if attempts < max_attempts and cancel_requested == "" then
  redis.call("HSET", KEYS[1], "state", "QUEUED")
  local queued = cjson.encode({ type = "stage", stage = "queued", attempt = attempts, at = now })
  redis.call("XADD", KEYS[2], "*", "event", queued)
  return { "requeued", record[2], record[3], priority, ARGV[4] }
end
redis.call("HSET", KEYS[1], "worker", ARGV[2])
return {
  "taken_over", record[2], record[3], cancel_requested, stage,
  attempts, max_attempts, string.format("%.6f", now), record[6] or "", record[7] or "", "",
}
