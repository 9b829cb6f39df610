-- The job has its message: from now on it waits in the queue, and no reaper need publish it. Said too late, when
-- somebody has claimed the job since, it changes nothing.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 queued jobs of its priority (sorted set)
-- ARGV: 1 job id, 2 the newest token when it was published, 0 before the first
local record = redis.call("HMGET", KEYS[1], "state", "token")
if record[1] == "RUNNING" or (record[2] or "0") ~= ARGV[2] then
  return
end
redis.call("ZREM", KEYS[2], ARGV[1])
if record[1] == "QUEUED" then
  local time = redis.call("TIME")
  redis.call("ZADD", KEYS[3], time[1] + time[2] / 1e6, ARGV[1])
end
