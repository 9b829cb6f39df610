-- RUNNING -> QUEUED by the holder of the newest token, whose process ends: another worker's reaper publishes the job at
-- once. The attempt keeps its number, so that no two have the same, and does not count: the job may have one more.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set)
-- ARGV: 1 job id, 2 token, 3 the new token
-- Returns "queued", "cancelled" (the caller wants no other attempt, the lease stays) or "lost"
local record = redis.call("HMGET", KEYS[1], "state", "token", "cancel_requested", "attempts")
if record[1] ~= "RUNNING" or record[2] ~= ARGV[2] then
  return "lost"
elseif record[3] then
  return "cancelled"
end

local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6
redis.call("HINCRBY", KEYS[1], "max_attempts", 1)
redis.call("HSET", KEYS[1], "state", "QUEUED", "token", ARGV[3])
redis.call("ZADD", KEYS[3], now, ARGV[1])
local queued = cjson.encode({ type = "stage", stage = "queued", attempt = tonumber(record[4]), at = now })
redis.call("XADD", KEYS[2], "*", "event", queued)
return "queued"
