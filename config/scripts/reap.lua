-- Takes a job from a holder whose lease ran out: RUNNING -> QUEUED, or, where it may not run again (attempts used up,
-- or its caller cancelled it), the lease goes to the reaper, who settles it. Either way the old token is worth nothing.
-- The job stays among the leases until its message is published or it is settled: a reaper may die here too.
-- A death under a job that was being fetched, or that waited for its turn, is no death of the job's: the attempt does not
-- count, and it may have one more. Ten times: should it be to blame all the same, it comes to an end. Who asks for fewer than
-- the usual three attempts gets no other for a fetch that was cut off.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set)
-- ARGV: 1 job id, 2 reaper, 3 lease seconds, 4 the new token, 5 the latest end of a lease that is over, whatever the clock shows
-- Returns {"requeued", dead worker or "", sealed, priority, token, stage or "", attempts}, {"taken_over", worker, sealed,
-- cancel_requested, stage, attempts, max_attempts, now, submitted_at, deadline_at, "", "", "", "", ""} or {"kept"}
local MOST_SPARED, USUAL_ATTEMPTS = 10, 3
local now = clock()
local ends_at = redis.call("ZSCORE", KEYS[3], ARGV[1])
if not ends_at or tonumber(ends_at) > math.min(now, tonumber(ARGV[5])) then
  return { "kept" }
end
local state, token, sealed, priority, worker, claimed_at, attempts, max_attempts, cancel_requested, waits, spared = unpack(
  redis.call(
    "HMGET", KEYS[1],
    "state", "token", "sealed", "priority", "worker", "claimed_at", "attempts", "max_attempts", "cancel_requested", "waits",
    "spared"
  )
)
if not state then
  redis.call("ZREM", KEYS[3], ARGV[1])
  return { "kept" }
end
redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
if state ~= "RUNNING" then
  return { "requeued", "", sealed, priority or "normal", token or "0", "", attempts or "0" }
end

-- Where the dead worker was, from the last that it told.
local stages = { frames = "decode", text = "generate" }
local newest = redis.call("XREVRANGE", KEYS[2], "+", "-", "COUNT", 1)
local event = newest[1] and cjson.decode(newest[1][2][2]) or {}
local stage = event.stage or stages[event.type] or "open"

-- Whoever writes text has begun, even if that could not be noted.
local was_waiting = stage == "fetch" and tonumber(max_attempts or 1) >= USUAL_ATTEMPTS or waits and waits == attempts and event.type ~= "text"
-- A reaper that took the job over and died too is no attempt of its own.
attempts, max_attempts = tonumber(attempts or 0), tonumber(max_attempts or 1)
local message = "The worker died under the job."
if was_waiting and tonumber(spared or 0) < MOST_SPARED and not cancel_requested then
  message = "The worker died while the job waited for its turn or for its media; that does not count."
  max_attempts = max_attempts + 1
  redis.call("HSET", KEYS[1], "max_attempts", max_attempts)
  redis.call("HINCRBY", KEYS[1], "spared", 1)
else
  redis.call("HINCRBY", KEYS[1], "deaths", 1)
end
add_failed_attempt(KEYS[1], attempts, worker, claimed_at, now, stage, "WORKER_LOST", message)
if attempts < max_attempts and not cancel_requested then
  requeue(KEYS[1], KEYS[2], attempts, ARGV[4], now, "lost")
  return { "requeued", worker, sealed, priority or "normal", ARGV[4], stage, attempts }
end
redis.call("HSET", KEYS[1], "token", ARGV[4], "worker", ARGV[2], "lease_seconds", ARGV[3])
local submitted_at, deadline_at = unpack(redis.call("HMGET", KEYS[1], "submitted_at", "deadline_at"))
return {
  "taken_over", worker, sealed, cancel_requested or "", stage,
  attempts, max_attempts, string.format("%.6f", now), submitted_at or "", deadline_at or "", "", "", "", "", "",
}
