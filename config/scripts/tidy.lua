-- Takes away what outlives the jobs and the workers it is of.
--
-- KEYS: 1 dead letters (sorted set), 2 newest taken job of each priority (sorted set), 3 ended jobs (stream), 4 messages that
-- could not be read (stream), 5 what workers keep for how long (hash), 6 workers by Celery's names (sorted set), 7 what kombu
-- notes of who hears Celery's remote commands (set), 8 what records' keys begin with
-- ARGV: 1 how many dead letters to look at, 2 seconds without a sign after which a worker is gone, 3 seconds that the second
-- key stays behind the last worker, 4 and 5 what is before and behind a worker's name in the seventh key
local now = clock()
redis.call("EXPIRE", KEYS[2], ARGV[3])

local result, dead_letter = unpack(redis.call("HMGET", KEYS[5], "result", "dead_letter"))
if result and dead_letter then
  redis.call("ZREMRANGEBYSCORE", KEYS[1], "-inf", now - dead_letter)
  redis.call("XTRIM", KEYS[4], "MINID", string.format("%d", math.max(0, now - dead_letter) * 1000))
  -- But for the newest: who has read all must not think that something is missing.
  local newest = redis.call("XREVRANGE", KEYS[3], "+", "-", "COUNT", 1)[1]
  local oldest = math.max(0, now - math.max(result, dead_letter)) * 1000
  if newest and oldest < tonumber(string.match(newest[1], "^%d+")) then
    redis.call("XTRIM", KEYS[3], "MINID", string.format("%d", oldest))
  elseif newest then
    redis.call("XTRIM", KEYS[3], "MINID", newest[1])
  end
end

for _, job_id in ipairs(redis.call("ZRANDMEMBER", KEYS[1], ARGV[1])) do
  if redis.call("EXISTS", KEYS[8] .. job_id) == 0 then
    redis.call("ZREM", KEYS[1], job_id)
  end
end

for _, name in ipairs(redis.call("ZRANGEBYSCORE", KEYS[6], "-inf", now - ARGV[2])) do
  redis.call("SREM", KEYS[7], ARGV[4] .. name .. ARGV[5])
  redis.call("ZREM", KEYS[6], name)
end
