-- Takes back the record of a job that could not be published.
--
-- KEYS: 1 record (hash), 2 the idempotency key's entry (string), if the job has one
-- Returns 1 when it is gone, 0 when a worker has the job: its message went out, only the receipt was lost
if redis.call("HGET", KEYS[1], "state") ~= "QUEUED" then
  return 0
end
redis.call("DEL", unpack(KEYS))
return 1
