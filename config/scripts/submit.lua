-- Queues a new job, record and message in one move, unless its idempotency key was used before; where it asks for that,
-- the key of a job that asks for the same and ended without an answer, or is gone, is its own from now on. Sent twice because
-- a reply was lost, it changes nothing.
--
-- KEYS: 1 record (hash), 2 the tokens that workers hold (string), 3 messages of its priority (list), 4 deadlines (sorted set),
-- 5 ended jobs (stream), 6 leases (sorted set), 7 queued jobs of its priority, 8 and 9 of the others (sorted sets),
-- 10 the job's idempotency key (string), if it has one, 11 what records' keys begin with, where it may take over that key
-- ARGV: 1 job id, 2 fingerprint of the job, 3 tokens the job has at least, 4 seconds to its deadline or "", 5 message, 6 most
-- jobs that may be queued or "", 7.. fields and values of the record, whose times are those of this clock in the end
-- Returns {"owner", "job_id fingerprint"} of the job that owns the idempotency key, this one or an earlier one,
-- {"too_long", context} or {"full", jobs that are queued, seconds from one's end to the next's or ""}
local entry = ARGV[1] .. " " .. ARGV[2]
local earlier = KEYS[10] and redis.call("GET", KEYS[10])
if earlier then
  local owner, fingerprint = string.match(earlier, "^(.*) (.*)$")
  local is_free = false
  if KEYS[11] and fingerprint == ARGV[2] and owner ~= ARGV[1] then
    local state = redis.call("HGET", KEYS[11] .. owner, "state")
    is_free = not state or state == "FAILED" or state == "CANCELLED" or state == "EXPIRED"
  end
  if not is_free then
    return { "owner", earlier }
  end
end
local context = redis.call("GET", KEYS[2])
if context and tonumber(ARGV[3]) > tonumber(context) then
  return { "too_long", context }
end
if redis.call("EXISTS", KEYS[1]) == 1 then
  return { "owner", entry }
end
if ARGV[6] ~= "" then
  local queued = redis.call("ZCARD", KEYS[7]) + redis.call("ZCARD", KEYS[8]) + redis.call("ZCARD", KEYS[9])
  if queued >= tonumber(ARGV[6]) then
    local _, seconds = pace(KEYS[5], KEYS[6])
    return { "full", queued, tostring(seconds or "") }
  end
end
-- First: it alone can fail, where somebody put something else in its place.
redis.call("LPUSH", KEYS[3], ARGV[5])
redis.call("HSET", KEYS[1], unpack(ARGV, 7))
local now, deadline_at = clock(), ""
if ARGV[4] ~= "" then
  deadline_at = string.format("%.6f", now + ARGV[4])
  redis.call("ZADD", KEYS[4], deadline_at, ARGV[1])
end
redis.call("HSET", KEYS[1], "submitted_at", string.format("%.6f", now), "deadline_at", deadline_at)
redis.call("ZADD", KEYS[7], now, ARGV[1])
if KEYS[10] then
  redis.call("SET", KEYS[10], entry)
end
return { "owner", entry }
