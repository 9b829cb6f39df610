-- Gives a job its message, behind those of its priority, or at their head where its turn had come: it was left to newer
-- workers, or its worker died twice. Those that died together are taken together then, and their worker has to end all others
-- once before they run alone, not before each of them. Whoever goes on to kill leaves the head to others. From now on it waits
-- in the queue, and no reaper need look after it. One that has ended gets its message too, for its Celery result or what that
-- is to call, and is kept until the message is gone; one that was claimed since gets none.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 queued jobs of its priority (sorted set), 4 messages of its priority
-- (list), 5 ended jobs of its priority that have a message (sorted set)
-- ARGV: 1 job id, 2 the newest token when it was found without a message, 0 before the first, 3 message
local state, token, left_seconds, deaths = unpack(redis.call("HMGET", KEYS[1], "state", "token", "left_seconds", "deaths"))
if state == "RUNNING" or (token or "0") ~= ARGV[2] then
  return
end
redis.call((left_seconds or deaths == "2") and "RPUSH" or "LPUSH", KEYS[4], ARGV[3])
redis.call("ZREM", KEYS[2], ARGV[1])
if state == "QUEUED" then
  redis.call("HSET", KEYS[1], "is_republished", 1)
  redis.call("ZADD", KEYS[3], clock(), ARGV[1])
elseif state then
  redis.call("ZADD", KEYS[5], clock(), ARGV[1])
  local seconds = redis.call("TTL", KEYS[1])
  if seconds > 0 then
    redis.call("HSET", KEYS[1], "kept_seconds", seconds)
    redis.call("PERSIST", KEYS[1])
  end
end
