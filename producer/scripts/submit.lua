-- Writes the record of a new job, unless its idempotency key was used before.
-- Sent twice because a reply was lost, it changes nothing: the job is published only after the reply.
--
-- KEYS: 1 record (hash), 2 the idempotency key's entry (string), if the job has one
-- ARGV: 1 job id, 2 fingerprint of the job, 3.. fields and values of the record
-- Returns "job_id fingerprint" of the job that owns the idempotency key: this one or an earlier one
local entry = ARGV[1] .. " " .. ARGV[2]
if KEYS[2] then
  local earlier = redis.call("GET", KEYS[2])
  if earlier then
    return earlier
  end
  redis.call("SET", KEYS[2], entry)
end
redis.call("HSET", KEYS[1], unpack(ARGV, 3))
return entry
