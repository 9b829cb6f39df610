-- QUEUED -> RUNNING: one more attempt under a new token, with a lease, said on the job's stream.
-- A job that was published without a record gets it here. One whose attempts ended twice with their worker, or once when
-- this one is its last, is claimed only by who runs nothing beside it: it may be what killed them, and its neighbours
-- must not pay for it again.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 queued jobs of its priority (sorted set), 5 newest
-- taken job of each priority (hash)
-- ARGV: 1 job id, 2 worker, 3 lease seconds, 4 priority, 5 whether it would run alone (0 or 1), 6.. fields and values of the
-- record, used where there is none
-- Returns {"claimed", token, attempt, now, submitted_at, deadline_at, max_visual_tokens}, {"settled", outcome}, {"held"}
-- (by another worker, or back until its next attempt is due) or {"suspect"}
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

local record = redis.call("HMGET", KEYS[1], "state", "due_at", "deaths", "attempts", "max_attempts")
if not record[1] then
  redis.call("HSET", KEYS[1], unpack(ARGV, 6))
elseif record[1] == "RUNNING" or (record[1] == "QUEUED" and tonumber(record[2] or 0) > now) then
  return { "held" }
elseif record[1] ~= "QUEUED" then
  return { "settled", redis.call("HGET", KEYS[1], "outcome") }
end

local deaths = tonumber(record[3] or 0)
local is_last = tonumber(record[4] or 0) + 1 >= tonumber(record[5] or 1)
if ARGV[5] == "0" and (deaths >= 2 or deaths == 1 and is_last) then
  return { "suspect" }
end
local published_at = redis.call("ZSCORE", KEYS[4], ARGV[1])
if published_at then
  redis.call("ZREM", KEYS[4], ARGV[1])
  if tonumber(published_at) > tonumber(redis.call("HGET", KEYS[5], ARGV[4]) or 0) then
    redis.call("HSET", KEYS[5], ARGV[4], published_at)
  end
end
local token = redis.call("HINCRBY", KEYS[1], "token", 1)
local attempt = redis.call("HINCRBY", KEYS[1], "attempts", 1)
redis.call("HSET", KEYS[1], "state", "RUNNING", "worker", ARGV[2], "claimed_at", string.format("%.6f", now))
redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
local started = cjson.encode({ type = "stage", stage = "open", attempt = attempt, at = now })
redis.call("XADD", KEYS[2], "*", "event", started)
local facts = redis.call("HMGET", KEYS[1], "submitted_at", "deadline_at", "max_visual_tokens")
return { "claimed", token, attempt, string.format("%.6f", now), facts[1] or "", facts[2] or "", facts[3] or "" }
