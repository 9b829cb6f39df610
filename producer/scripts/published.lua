-- The job has its message: from now on no reaper need publish it. A worker that claimed it meanwhile keeps its lease.
--
-- KEYS: 1 record (hash), 2 leases (sorted set)
-- ARGV: 1 job id
if redis.call("HGET", KEYS[1], "state") == "QUEUED" then
  redis.call("ZREM", KEYS[2], ARGV[1])
end
