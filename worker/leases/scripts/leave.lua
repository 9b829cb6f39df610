-- A queued job that this worker does not know how to read goes back for others: it waits among the leases, whose reaper
-- publishes it, at first after a second, then after as long as it has waited, up to half a minute. A job that was
-- published without a record gets it here. Its time counts from when it was left first, not from when it was sent: a
-- backlog is no reason to end it.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 queued jobs of its priority (sorted set)
-- ARGV: 1 job id, 2 seconds that it is left to others in all, 3.. fields and values of the record, used where there is none
-- Returns 1, or 0 where its time is over or it is not queued
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

if redis.call("EXISTS", KEYS[1]) == 0 then
  redis.call("HSET", KEYS[1], unpack(ARGV, 3))
end
redis.call("HSETNX", KEYS[1], "left_at", string.format("%.6f", now))
local record = redis.call("HMGET", KEYS[1], "state", "left_at", "due_at")
local waited = now - record[2]
if record[1] ~= "QUEUED" or waited >= tonumber(ARGV[2]) then
  return 0
end
redis.call("ZREM", KEYS[3], ARGV[1])
local due_at = math.max(now + math.max(1, math.min(waited, 30)), tonumber(record[3] or 0))
redis.call("ZADD", KEYS[2], due_at, ARGV[1])
return 1
