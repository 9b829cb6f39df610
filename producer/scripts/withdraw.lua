-- Takes back the record of a job that could not be published.
--
-- KEYS[1]  the job's record (hash)
-- KEYS[2]  the idempotency key's entry (string), absent for a job without one
-- Returns 1 when it is gone, 0 when a worker has the job already: the message went out, only its receipt was lost.
if redis.call('HGET', KEYS[1], 'state') ~= 'QUEUED' then
  return 0
end
redis.call('DEL', unpack(KEYS))
return 1
