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

-- RUNNING -> QUEUED, under a new token that nobody holds.
local function requeue(key, events, attempt, token, now)
  redis.call("HSET", key, "state", "QUEUED", "token", token)
  add_event(events, { type = "stage", stage = "queued", attempt = tonumber(attempt), at = now })
end

-- Adds an attempt that did not answer the job to its record, once.
local function add_failed_attempt(key, attempt, worker, claimed_at, now, stage, code, message)
  redis.call("HSETNX", key, "attempt:" .. attempt, cjson.encode({
    attempt = tonumber(attempt), worker = worker, began_at = tonumber(claimed_at), ended_at = now,
    stage = stage, code = code, message = message,
  }))
end

-- A final state with its outcome and the last event; record and events expire.
local function finish(key, events, state, outcome, now, ttl)
  redis.call("HSET", key, "state", state, "outcome", outcome, "ended_at", string.format("%.6f", now))
  add_event(events, { type = "ended", state = state, at = now })
  redis.call("EXPIRE", key, ttl)
  redis.call("EXPIRE", events, ttl)
end

