-- Writes the record of a new job, unless its idempotency key was used before.
-- Sent twice because a reply was lost, it changes nothing: the job is published only after the reply.
--
-- KEYS[1]     the job's record (hash)
-- KEYS[2]     the idempotency key's entry (string), absent for a job without one
-- ARGV[1]     job id
-- ARGV[2]     fingerprint of the job
-- ARGV[3...]  field, value, field, value ... of the record
-- Returns "job_id fingerprint" of the job that owns the key: this one or an earlier one.
local entry = ARGV[1] .. ' ' .. ARGV[2]
if KEYS[2] then
  local earlier = redis.call('GET', KEYS[2])
  if earlier then
    return earlier
  end
  redis.call('SET', KEYS[2], entry)
end
redis.call('HSET', KEYS[1], unpack(ARGV, 3))
return entry
