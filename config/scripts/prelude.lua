-- What the scripts of this folder share: functions, each a paragraph and below those that it calls. `load_script` puts those
-- that a script calls before it.

-- Unix seconds of the server's clock.
local function clock()
  local time = redis.call("TIME")
  return time[1] + time[2] / 1e6
end

local function add_event(events, event)
  redis.call("XADD", events, "*", "event", cjson.encode(event))
end

-- Whether the job is the first that was sent under its idempotency key: the key may have been freed and taken by a later
-- one, and a job that was published without a record may carry one that belongs to another.
local function owns(key, job_id)
  local owner = redis.call("GET", key)
  return owner and string.sub(owner, 1, #job_id + 1) == job_id .. " "
end

-- Record, events and idempotency key (nil for none) of an ended job expire.
local function expire(key, job_id, ttl, idempotency_key)
  redis.call("EXPIRE", key, ttl)
  redis.call("EXPIRE", key .. ":events", ttl)
  if idempotency_key and owns(idempotency_key, job_id) then
    redis.call("EXPIRE", idempotency_key, ttl)
  end
end

-- The same for a job that was kept for its message, once that is gone.
local function let_go(key, job_id)
  local seconds, idempotency_key = unpack(redis.call("HMGET", key, "kept_seconds", "kept_key"))
  if seconds then
    redis.call("HDEL", key, "kept_seconds", "kept_key")
    expire(key, job_id, seconds, idempotency_key)
  end
end

-- RUNNING -> QUEUED, under a new token that nobody holds. `reason` is a `keye.config.codes.QueuedAgain`.
local function requeue(key, events, attempt, token, now, reason)
  redis.call("HSET", key, "state", "QUEUED", "token", token)
  add_event(events, { type = "stage", stage = "queued", attempt = tonumber(attempt), at = now, reason = reason })
end

-- Adds an attempt that did not answer the job to its record, once. The newest 50 are kept: of a store that is away for days,
-- or a host that is sick, there is no end of them.
local function add_failed_attempt(key, attempt, worker, claimed_at, now, stage, code, message)
  redis.call("HSETNX", key, "attempt:" .. attempt, cjson.encode({
    attempt = tonumber(attempt), worker = worker, began_at = tonumber(claimed_at), ended_at = now,
    stage = stage, code = code, message = message,
  }))
  redis.call("HDEL", key, "attempt:" .. attempt - 50)
end

-- A final state with its outcome, the last event and the entry in the feed of ended jobs. `began` is when the attempt that
-- ended it was claimed, nil for none.
local function finish(key, events, ended, job_id, state, outcome, now, began)
  redis.call("HSET", key, "state", state, "outcome", outcome, "ended_at", string.format("%.6f", now))
  add_event(events, { type = "ended", state = state, at = now })
  local seconds = began and string.format("%.3f", now - began) or ""
  -- pcall: a feed that cannot be written costs no job its end.
  redis.pcall("XADD", ended, "MAXLEN", "~", 100000, "*", "job_id", job_id, "state", state, "seconds", seconds)
end

-- How many seconds the newest of the ended jobs ran, on average, and, by as many as run now, from one end to the next. Nil
-- where none has ended after it ran; the latter too where none runs.
local function pace(ended, leases)
  local total, count, running = 0, 0, redis.call("ZCARD", leases)
  for _, entry in ipairs(redis.call("XREVRANGE", ended, "+", "-", "COUNT", 100)) do
    local seconds = tonumber(entry[2][6])
    -- Clocks are set back, and strangers write.
    if seconds and seconds >= 0 and seconds < 1e9 then
      total, count = total + seconds, count + 1
    end
  end
  local mean = count > 0 and total / count or nil
  return mean, mean and running > 0 and mean / running or nil
end
