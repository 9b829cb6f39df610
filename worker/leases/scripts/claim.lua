-- QUEUED -> RUNNING: one more attempt under a new token, with a lease, said on the job's stream.
-- A job that was published without a record gets it here. One whose attempts ended twice with their worker, or once when
-- this one is its last, is claimed only by who runs nothing beside it: it may be what killed them, and its neighbours
-- must not pay for it again. Asked again under the same token (its answer got lost on the way) it gives that answer again.
-- What the job asks is what its record says: others may send messages under its id.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 newest taken job of each priority (sorted set), 5
-- deadlines (sorted set), 6.. queued jobs of each priority (sorted sets)
-- ARGV: 1 job id, 2 worker, 3 lease seconds, 4 whether it would run alone (0 or 1), 5 the token, 6.. fields and values of
-- the record, once it is known that there is none
-- Returns {"claimed", sealed, canvas, attempt, max_attempts, claimed_at, submitted_at, deadline_at, max_visual_tokens},
-- {"settled", outcome, canvas}, {"held"} (by another worker, or until its first or next attempt is due), {"suspect"} or
-- {"unknown"} (no record: it is asked again with one)
local time = redis.call("TIME")
local now = time[1] + time[2] / 1e6

local function read()
  return redis.call(
    "HMGET", KEYS[1],
    "state", "due_at", "deaths", "attempts", "max_attempts", "token", "submitted_at", "deadline_at", "max_visual_tokens",
    "claimed_at", "is_republished", "sealed", "canvas", "priority"
  )
end

local record = read()

local function claimed(attempt, claimed_at)
  return {
    "claimed", record[12] or "null", record[13] or "",
    attempt, record[5] or "1", claimed_at, record[7] or "", record[8] or "", record[9] or "",
  }
end

if not record[1] and not ARGV[6] then
  return { "unknown" }
elseif not record[1] then
  redis.call("HSET", KEYS[1], unpack(ARGV, 6))
  record = read()
  if tonumber(record[2] or 0) > now then
    -- Nobody's yet: the reaper publishes it when it is due.
    redis.call("ZADD", KEYS[3], record[2], ARGV[1])
    if (record[8] or "") ~= "" then
      redis.call("ZADD", KEYS[5], record[8], ARGV[1])
    end
    return { "held" }
  end
elseif record[1] == "RUNNING" and record[6] == ARGV[5] then
  return claimed(record[4], record[10])
elseif record[1] == "RUNNING" or (record[1] == "QUEUED" and tonumber(record[2] or 0) > now) then
  return { "held" }
elseif record[1] ~= "QUEUED" then
  return { "settled", redis.call("HGET", KEYS[1], "outcome"), record[13] or "" }
end

local deaths = tonumber(record[3] or 0)
local attempt = tonumber(record[4] or 0) + 1
local is_last = attempt >= tonumber(record[5] or 1)
if ARGV[4] == "0" and (deaths >= 2 or deaths == 1 and is_last) then
  return { "suspect" }
end
-- Whatever priority its message says: left among the queued, it would be taken from its worker as lost.
for i = 6, #KEYS do
  local published_at = redis.call("ZSCORE", KEYS[i], ARGV[1])
  if published_at then
    redis.call("ZREM", KEYS[i], ARGV[1])
    -- Of two messages the earlier may be the one that was taken: it does not tell how far the queue has come.
    if record[14] and not record[11] then
      redis.call("ZADD", KEYS[4], "GT", published_at, record[14])
    end
  end
end
local claimed_at = string.format("%.6f", now)
redis.call(
  "HSET", KEYS[1],
  "state", "RUNNING", "token", ARGV[5], "attempts", attempt, "worker", ARGV[2], "claimed_at", claimed_at
)
-- A worker knows how to read it now: should it come back to the queue, its time with those that do not begins anew.
redis.call("HDEL", KEYS[1], "left_seconds")
redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
local started = cjson.encode({ type = "stage", stage = "open", attempt = attempt, at = now })
redis.call("XADD", KEYS[2], "*", "event", started)
return claimed(attempt, claimed_at)
