-- RUNNING -> QUEUED by the holder of the newest token: the attempt failed, and another is due later. Until then the job
-- waits among the leases, as if somebody held it; the reaper, who looks after what is overdue there, publishes it.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set)
-- ARGV: 1 job id, 2 token, 3 seconds to wait, 4 stage, 5 code, 6 message, 7 most visual tokens or "",
-- 8 the new token
-- Returns "queued", "cancelled" (the caller wants no other attempt, the lease stays) or "lost"
local record =
  redis.call("HMGET", KEYS[1], "state", "token", "cancel_requested", "attempts", "worker", "claimed_at")
if record[1] ~= "RUNNING" or record[2] ~= ARGV[2] then
  return "lost"
elseif record[3] then
  return "cancelled"
end

local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6
local due_at = string.format("%.6f", now + ARGV[3])
local attempt = tonumber(record[4])
redis.call("HSET", KEYS[1], "state", "QUEUED", "token", ARGV[8], "due_at", due_at, "attempt:" .. attempt, cjson.encode({
  attempt = attempt, worker = record[5], began_at = tonumber(record[6]), ended_at = now,
  stage = ARGV[4], code = ARGV[5], message = ARGV[6],
}))
if ARGV[7] ~= "" then
  redis.call("HSET", KEYS[1], "max_visual_tokens", ARGV[7])
end
redis.call("ZADD", KEYS[3], due_at, ARGV[1])
redis.call("XADD", KEYS[2], "*", "event", cjson.encode({ type = "stage", stage = "queued", attempt = attempt, at = now }))
return "queued"
