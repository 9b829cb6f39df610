-- Writes the record of a new job, unless its idempotency key was used before. Until its publication is confirmed the
-- job stands among the leases: a worker's reaper publishes it should its producer die or lose Redis in between.
-- Sent twice because a reply was lost, it changes nothing: the job is published only after the reply.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 the model's context (string), 4 deadlines (sorted set), 5 the
-- idempotency key's entry (string), if the job has one
-- ARGV: 1 job id, 2 fingerprint of the job, 3 lease seconds, 4 max_new_tokens, 5 deadline or "", 6.. fields and values of
-- the record
-- Returns {"owner", "job_id fingerprint"} of the job that owns the idempotency key, this one or an earlier one, or
-- {"too_long", context}
local entry = ARGV[1] .. " " .. ARGV[2]
local earlier = KEYS[5] and redis.call("GET", KEYS[5])
if earlier then
  return { "owner", earlier }
end
local context = redis.call("GET", KEYS[3])
if context and tonumber(ARGV[4]) >= tonumber(context) then
  return { "too_long", context }
end
if KEYS[5] then
  redis.call("SET", KEYS[5], entry)
end
local time = redis.call("TIME")
redis.call("HSET", KEYS[1], unpack(ARGV, 6))
redis.call("ZADD", KEYS[2], time[1] + time[2] / 1e6 + ARGV[3], ARGV[1])
if ARGV[5] ~= "" then
  redis.call("ZADD", KEYS[4], ARGV[5], ARGV[1])
end
return { "owner", entry }
