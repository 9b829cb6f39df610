-- Finds queued jobs whose message was lost: jobs published after them were taken, or there are no messages at all. They
-- are put among the overdue leases, whose reaper publishes them. Wrongly found, a job has two messages: one is wasted.
-- Ended jobs that were kept for their messages are let go where those are lost.
--
-- KEYS: 1 queued jobs of a priority (sorted set), 2 newest taken job of each priority (sorted set), 3 leases (sorted set),
-- 4 messages of the priority (list), 5 its ended jobs that have a message (sorted set), 6 what records' keys begin with
-- ARGV: 1 priority, 2 seconds that a message may take to be seen, 3 most jobs to find of each
-- Returns their ids
local now = clock()
local before = now - ARGV[2]
if redis.call("LLEN", KEYS[4]) > 0 then
  before = math.min(before, tonumber(redis.call("ZSCORE", KEYS[2], ARGV[1]) or 0))
end
local lost = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", before, "LIMIT", 0, ARGV[3])
for _, job_id in ipairs(lost) do
  redis.call("ZREM", KEYS[1], job_id)
  redis.call("ZADD", KEYS[3], now, job_id)
end
for _, job_id in ipairs(redis.call("ZRANGEBYSCORE", KEYS[5], "-inf", before, "LIMIT", 0, ARGV[3])) do
  redis.call("ZREM", KEYS[5], job_id)
  let_go(KEYS[6] .. job_id, job_id)
end
return lost
