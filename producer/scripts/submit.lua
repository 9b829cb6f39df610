-- Writes the record of a new job, unless its idempotency key was used before. Until its publication is confirmed the
-- job stands among the leases: a worker's reaper publishes it should its producer die or lose Redis in between.
-- Sent twice because a reply was lost, it changes nothing: the job is published only after the reply.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 the idempotency key's entry (string), if the job has one
-- ARGV: 1 job id, 2 fingerprint of the job, 3 lease seconds, 4.. fields and values of the record
-- Returns "job_id fingerprint" of the job that owns the idempotency key: this one or an earlier one
local entry = ARGV[1] .. " " .. ARGV[2]
if KEYS[3] then
  local earlier = redis.call("GET", KEYS[3])
  if earlier then
    return earlier
  end
  redis.call("SET", KEYS[3], entry)
end
local time = redis.call("TIME")
redis.call("HSET", KEYS[1], unpack(ARGV, 4))
redis.call("ZADD", KEYS[2], time[1] + time[2] / 1e6 + ARGV[3], ARGV[1])
return entry
