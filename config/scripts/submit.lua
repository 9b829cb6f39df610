-- Queues a new job, record and message in one move, unless its idempotency key was used before. Sent twice because a
-- reply was lost, it changes nothing.
--
-- KEYS: 1 record (hash), 2 the model's context (string), 3 queued jobs of its priority (sorted set), 4 messages of its
-- priority (list), 5 deadlines (sorted set), 6 the job's idempotency key (string), if it has one
-- ARGV: 1 job id, 2 fingerprint of the job, 3 max_new_tokens, 4 deadline or "", 5 message, 6.. fields and values of the
-- record
-- Returns {"owner", "job_id fingerprint"} of the job that owns the idempotency key, this one or an earlier one, or
-- {"too_long", context}
local entry = ARGV[1] .. " " .. ARGV[2]
local earlier = KEYS[6] and redis.call("GET", KEYS[6])
if earlier then
  return { "owner", earlier }
end
local context = redis.call("GET", KEYS[2])
if context and tonumber(ARGV[3]) >= tonumber(context) then
  return { "too_long", context }
end
if redis.call("EXISTS", KEYS[1]) == 1 then
  return { "owner", entry }
end
-- First: it alone can fail, where somebody put something else in its place.
redis.call("LPUSH", KEYS[4], ARGV[5])
redis.call("HSET", KEYS[1], unpack(ARGV, 6))
redis.call("ZADD", KEYS[3], clock(), ARGV[1])
if ARGV[4] ~= "" then
  redis.call("ZADD", KEYS[5], ARGV[4], ARGV[1])
end
if KEYS[6] then
  redis.call("SET", KEYS[6], entry)
end
return { "owner", entry }
