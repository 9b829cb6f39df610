-- What can be told of a job at one moment.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 ended jobs (stream), 5 the model's context (string),
-- which is there while a worker with a model is, 6.. queued jobs of each priority (sorted sets), the one that is served first
-- foremost
-- ARGV: 1 job id, 2 events to look at
-- Returns {state, attempts, claimed_at or "", now, jobs queued before it or "", seconds that a job runs or "", seconds from one
-- job's end to the next's or "", whether a worker is there (0 or 1), newest event (JSON), the one before, ...}, or nil where
-- there is no job
local state, attempts, claimed_at = unpack(redis.call("HMGET", KEYS[1], "state", "attempts", "claimed_at"))
if not state then
  return nil
end
local before, place = 0, ""
for i = 6, #KEYS do
  local rank = redis.call("ZRANK", KEYS[i], ARGV[1])
  if rank then
    place = before + rank
  end
  before = before + redis.call("ZCARD", KEYS[i])
end
local mean, seconds = pace(KEYS[4], KEYS[3])
local found = {
  state, attempts or "0", claimed_at or "", tostring(clock()), tostring(place), tostring(mean or ""),
  tostring(seconds or ""), redis.call("EXISTS", KEYS[5]),
}
for _, entry in ipairs(redis.call("XREVRANGE", KEYS[2], "+", "-", "COUNT", ARGV[2])) do
  found[#found + 1] = entry[2][2]
end
return found
