-- A queued job that this worker does not know how to read goes back for others: it waits among the leases, whose reaper
-- publishes it again, at the head of its queue: its turn has come before. At first that is after a second, then after as
-- long as it has been left, up to five. Only these pauses count as time that it is left: waiting behind a backlog is no
-- reason to end it. A job that was published without a record gets it here.
--
-- KEYS: 1 record (hash), 2 leases (sorted set), 3 queued jobs of its priority (sorted set), 4 deadlines (sorted set)
-- ARGV: 1 job id, 2 seconds that it is left to others in all, 3 its deadline or "", 4.. fields and values of the record,
-- used where there is none and its message came without
-- Returns the seconds that it was left before, nil where its time is over or it is not queued
if ARGV[4] and redis.call("EXISTS", KEYS[1]) == 0 then
  redis.call("HSET", KEYS[1], unpack(ARGV, 4))
  if ARGV[3] ~= "" then
    redis.call("ZADD", KEYS[4], ARGV[3], ARGV[1])
  end
end
local state, left, due_at = unpack(redis.call("HMGET", KEYS[1], "state", "left_seconds", "due_at"))
left = tonumber(left or 0)
if state ~= "QUEUED" or left >= tonumber(ARGV[2]) then
  return nil
end
local pause = math.max(1, math.min(left, 5))
redis.call("HSET", KEYS[1], "left_seconds", left + pause)
redis.call("ZREM", KEYS[3], ARGV[1])
redis.call("ZADD", KEYS[2], math.max(clock() + pause, tonumber(due_at or 0)), ARGV[1])
return tostring(left)
