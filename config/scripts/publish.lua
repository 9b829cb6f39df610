-- Gives a job its message, behind those of its priority, or at their head where its turn had come and it was left to newer
-- workers: from now on it waits in the queue, and no reaper need look after it. One that ended while it waited gets its
-- message too, for its Celery result; one that was claimed since gets none.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 queued jobs of its priority (sorted set), 4 messages of its priority
-- (list)
-- ARGV: 1 job id, 2 the newest token when it was found without a message, 0 before the first, 3 message
local state, token, left_seconds = unpack(redis.call("HMGET", KEYS[1], "state", "token", "left_seconds"))
if state == "RUNNING" or (token or "0") ~= ARGV[2] then
  return
end
redis.call(left_seconds and "RPUSH" or "LPUSH", KEYS[4], ARGV[3])
redis.call("ZREM", KEYS[2], ARGV[1])
if state == "QUEUED" then
  redis.call("HSET", KEYS[1], "is_republished", 1)
  redis.call("ZADD", KEYS[3], clock(), ARGV[1])
end
