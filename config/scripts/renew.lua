-- Extends every lease that is still its holder's, and tells which jobs their callers want cancelled.
--
-- KEYS: 1 leases (sorted set), 2.. one record (hash) per job
-- ARGV: 1 lease seconds, then job id and token of each job, in the order of KEYS
-- Returns "renewed", "cancelled" (renewed too: its outcome is still to be written) or "lost" per job
local ends_at, answers = clock() + ARGV[1], {}
for i = 2, #KEYS do
  local state, token, cancel_requested = unpack(redis.call("HMGET", KEYS[i], "state", "token", "cancel_requested"))
  if state ~= "RUNNING" or token ~= ARGV[2 * i - 1] then
    answers[i - 1] = "lost"
  else
    redis.call("ZADD", KEYS[1], ends_at, ARGV[2 * i - 2])
    answers[i - 1] = cancel_requested and "cancelled" or "renewed"
  end
end
return answers
