-- Finds queued jobs whose message was lost: jobs published after them were taken, or there are no messages at all. One that
-- was missed the last time, too, is put among the overdue leases, whose reaper publishes it: once proves nothing, its message
-- may have left its list a moment ago and be on its way to a claim. Wrongly found, a job has two messages: one is wasted.
-- Ended jobs that were kept for their messages are let go where those are lost.
--
-- KEYS: 1 queued jobs of a priority (sorted set), 2 newest taken job of each priority (sorted set), 3 leases (sorted set),
-- 4 messages of the priority (list), 5 its ended jobs that have a message (sorted set), 6 what records' keys begin with
-- ARGV: 1 priority, 2 seconds that a message may take to be seen, 3 most jobs to find of each, 4.. ids missed the last time
-- Returns {ids of the lost, ids of those that are missed for the first time}
local now = clock()
local before = now - ARGV[2]
if redis.call("LLEN", KEYS[4]) > 0 then
  before = math.min(before, tonumber(redis.call("ZSCORE", KEYS[2], ARGV[1]) or 0))
end
local missed_before, lost, missed = {}, {}, {}
for i = 4, #ARGV do
  missed_before[ARGV[i]] = true
end
for _, job_id in ipairs(redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", before, "LIMIT", 0, ARGV[3])) do
  if missed_before[job_id] then
    redis.call("ZREM", KEYS[1], job_id)
    redis.call("ZADD", KEYS[3], now, job_id)
    lost[#lost + 1] = job_id
  else
    missed[#missed + 1] = job_id
  end
end
for _, job_id in ipairs(redis.call("ZRANGEBYSCORE", KEYS[5], "-inf", before, "LIMIT", 0, ARGV[3])) do
  redis.call("ZREM", KEYS[5], job_id)
  let_go(KEYS[6] .. job_id, job_id)
end
return { lost, missed }
