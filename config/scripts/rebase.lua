-- After the server's clock was set back, what lies in a future that it cannot have been put into is put where it would lie
-- now: a lease, a pause and a time of publication count from a "now" that has not come yet. Absolute times stay: deadlines,
-- and when a first attempt is due. Some at a time; asked again until it has looked at fewer than it may.
--
-- KEYS: 1 leases (sorted set), 2 newest taken job of each priority (sorted set), 3 what records' keys begin with, then for each
-- priority its queued jobs and its ended jobs that have a message (sorted sets)
-- ARGV: 1 seconds of a lease whose record does not say how long it is, 2 leases to pass over, 3 most to look at in each set
-- Returns {how many leases it looked at, how many of these it left, the most that it moved in a queue}
local now, lease, most = clock(), tonumber(ARGV[1]), tonumber(ARGV[3])

local looked, left = redis.call("ZREVRANGEBYSCORE", KEYS[1], "+inf", now, "WITHSCORES", "LIMIT", ARGV[2], most), 0
for i = 1, #looked, 2 do
  local job_id, ends_at = looked[i], tonumber(looked[i + 1])
  -- pcall: strangers may have written what is no job.
  local state, seconds, attempts, due_at, pause = unpack(redis.pcall(
    "HMGET", KEYS[3] .. job_id, "state", "lease_seconds", "attempts", "due_at", "pause_seconds"
  ))
  local latest, is_paused = now + 2 * lease, state == "QUEUED" and tonumber(due_at) == ends_at
  if state == "RUNNING" then
    latest = now + (tonumber(seconds) or lease)
  elseif is_paused then
    latest = attempts == "0" and ends_at or now + (tonumber(pause) or 2 * lease)
  end
  if ends_at > latest then
    latest = string.format("%.6f", latest)
    redis.call("ZADD", KEYS[1], latest, job_id)
    if is_paused then
      redis.call("HSET", KEYS[3] .. job_id, "due_at", latest)
    end
  else
    left = left + 1
  end
end

for _, taken in ipairs(redis.call("ZRANGEBYSCORE", KEYS[2], now, "+inf")) do
  redis.call("ZADD", KEYS[2], now, taken)
end
local longest = 0
for i = 4, #KEYS, 2 do
  local published = {}
  for _, key in ipairs({ KEYS[i], KEYS[i + 1] }) do
    -- A second: those that were moved before lie a little behind now, in their order.
    local found = redis.call("ZRANGEBYSCORE", key, now + 1, "+inf", "WITHSCORES", "LIMIT", 0, most)
    for j = 1, #found, 2 do
      published[#published + 1] = { key, found[j], tonumber(found[j + 1]) }
    end
  end
  table.sort(published, function(one, other) return one[3] < other[3] end)
  for place = 1, math.min(#published, most) do
    redis.call("ZADD", published[place][1], now + place * 1e-6, published[place][2])
  end
  longest = math.max(longest, math.min(#published, most))
end
return { #looked / 2, left, longest }
