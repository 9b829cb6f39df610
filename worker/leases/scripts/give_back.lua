-- RUNNING -> QUEUED by the holder of the newest tokens, whose process ends. Each job's new message goes to the head of its
-- queue, the first job's foremost: others have waited less long. An attempt keeps its number, so that no two have the
-- same, and does not count: the job may have one more.
--
-- KEYS: 1 leases (sorted set), then for each job 2 record (hash), 3 events (stream), 4 messages of its priority (list)
-- ARGV: 1 seconds until a reaper publishes what nobody has taken, then for each job 2 its id, 3 token, 4 the new token,
-- 5 message
-- Returns for each job "queued", "cancelled" (the caller wants no other attempt, the lease stays) or "lost"
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

local answers = {}
for i = (#KEYS - 1) / 3, 1, -1 do
  local key, arg = 3 * i - 1, 4 * i - 2
  local record = redis.call("HMGET", KEYS[key], "state", "token", "cancel_requested", "attempts")
  if record[1] ~= "RUNNING" or record[2] ~= ARGV[arg + 1] then
    answers[i] = "lost"
  elseif record[3] then
    answers[i] = "cancelled"
  else
    answers[i] = "queued"
    redis.call("HINCRBY", KEYS[key], "max_attempts", 1)
    redis.call("HSET", KEYS[key], "state", "QUEUED", "token", ARGV[arg + 2])
    redis.call("RPUSH", KEYS[key + 2], ARGV[arg + 3])
    -- Not among the queued by age: it overtakes older ones, whose messages would then seem lost.
    redis.call("ZADD", KEYS[1], now + ARGV[1], ARGV[arg])
    local queued = cjson.encode({ type = "stage", stage = "queued", attempt = tonumber(record[4]), at = now })
    redis.call("XADD", KEYS[key + 1], "*", "event", queued)
  end
end
return answers
