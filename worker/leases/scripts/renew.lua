-- Extends every lease that is still its holder's, and tells which jobs their callers want cancelled.
--
-- KEYS: 1 leases (sorted set), 2.. one record (hash) per job
-- ARGV: 1 lease seconds, then job id and token of each job, in the order of KEYS
-- Returns "renewed", "cancelled" (renewed too: its outcome is still to be written) or "lost" per job
local time = redis.call("TIME")
local ends_at = time[1] + time[2] / 1e6 + ARGV[1]

local answers = {}
for i = 2, #KEYS do
  local job_id, token = ARGV[2 * i - 2], ARGV[2 * i - 1]
  local record = redis.call("HMGET", KEYS[i], "state", "token", "cancel_requested")
  if record[1] ~= "RUNNING" or record[2] ~= token then
    answers[#answers + 1] = "lost"
  else
    redis.call("ZADD", KEYS[1], ends_at, job_id)
    answers[#answers + 1] = record[3] and "cancelled" or "renewed"
  end
end
return answers
