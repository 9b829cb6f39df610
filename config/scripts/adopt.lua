-- Hands the messages of our queue out again that workers of 0.2 took long ago and nobody acknowledged: such a worker alive
-- would have done so itself. What other Celery apps keep in the same place is passed over, a few at each look.
--
-- KEYS: 1 messages that are not acknowledged, of all Celery apps (hash), 2 the same by time (sorted set), 3.. messages of each
-- priority (lists), the one that is served first foremost
-- ARGV: 1 seconds after which a message was taken long ago, 2 how an entry of ours ends, 3 where among the old ones to begin, 4
-- how many to look at
-- Returns how many are handed out, and where to begin the next time
local tags = redis.call(
  "ZRANGEBYSCORE", KEYS[2], "-inf", clock() - ARGV[1], "LIMIT", ARGV[3], ARGV[4]
)
local adopted = 0
for _, tag in ipairs(tags) do
  local entry = redis.call("HGET", KEYS[1], tag)
  if entry and string.sub(entry, -#ARGV[2]) == ARGV[2] then
    -- Its workers' door wrote the message: outside its body, which is base64, there is one priority.
    local step = tonumber(string.match(entry, '"priority": (%d)') or 3)
    redis.call("RPUSH", KEYS[3 + math.min(math.floor(step / 3), 2)], string.sub(entry, 2, -#ARGV[2] - 1))
    redis.call("HDEL", KEYS[1], tag)
    redis.call("ZREM", KEYS[2], tag)
    adopted = adopted + 1
  end
end
return { adopted, #tags < tonumber(ARGV[4]) and 0 or ARGV[3] + #tags - adopted }
