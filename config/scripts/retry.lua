-- RUNNING -> QUEUED by the holder of the newest token: the attempt failed, and another is due later. Until then the job
-- waits among the leases, as if somebody held it; the reaper, who looks after what is overdue there, publishes it.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set)
-- ARGV: 1 job id, 2 token, 3 seconds to wait, 4 stage, 5 code, 6 message, 7 most visual tokens or "",
-- 8 the new token, 9 whether the job may have one more attempt for this one (0 or 1)
-- Returns "queued", "cancelled" (the caller wants no other attempt, the lease stays) or "lost"
local state, token, cancel_requested, attempt, worker, claimed_at = unpack(redis.call(
  "HMGET", KEYS[1], "state", "token", "cancel_requested", "attempts", "worker", "claimed_at"
))
if state ~= "RUNNING" or token ~= ARGV[2] then
  return "lost"
elseif cancel_requested then
  return "cancelled"
end

local now = clock()
local due_at = string.format("%.6f", now + ARGV[3])
add_failed_attempt(KEYS[1], attempt, worker, claimed_at, now, ARGV[4], ARGV[5], ARGV[6])
requeue(KEYS[1], KEYS[2], attempt, ARGV[8], now, "retry")
redis.call("HSET", KEYS[1], "due_at", due_at, "pause_seconds", ARGV[3])
if ARGV[9] == "1" then
  redis.call("HINCRBY", KEYS[1], "max_attempts", 1)
end
if ARGV[5] == "MEDIA_UNREACHABLE" then
  redis.call("HSETNX", KEYS[1], "unreachable_since", string.format("%.6f", now))
  redis.call("HINCRBY", KEYS[1], "num_unreachable", 1)
end
if ARGV[7] ~= "" then
  redis.call("HSET", KEYS[1], "max_visual_tokens", ARGV[7])
end
redis.call("ZADD", KEYS[3], due_at, ARGV[1])
return "queued"
