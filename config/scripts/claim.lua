-- QUEUED -> RUNNING: one more attempt under a new token, with a lease, said on the job's stream.
-- A job that was published without a record gets it here; one that had a record has ended. One whose attempts ended twice
-- with their worker, or once when this one is its last, or that met a fault of a host that was found fit, is claimed only by
-- who runs nothing beside it: it may be what caused that, and its neighbours must not pay for it again. One whose worker died
-- once waits from the start, until its holder says that it has its place among few such jobs. Asked again
-- under the same token (its answer got lost on the way) it gives that answer again. What the job asks is what its record
-- says: others may send messages under its id.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 newest taken job of each priority (sorted set), 5
-- deadlines (sorted set), 6.. queued jobs of each priority (sorted sets)
-- ARGV: 1 job id, 2 worker, 3 lease seconds, 4 what it would run beside ("nothing", "company": few whose worker died once,
-- "any"), 5 the token, 6.. fields and values of the record, once it is known that there is none
-- Returns {"claimed", sealed, canvas, attempt, max_attempts, claimed_at, submitted_at, deadline_at, max_visual_tokens,
-- unreachable_since, num_unreachable, host_faults, whether it waits ("1" or "")},
-- {"settled", outcome, canvas}, {"held"} (by another worker, or until its first or next attempt is due), {"suspect"} or
-- {"unknown"} (no record: it is asked again with one, if its message came without)
local now, is_new = clock(), false
if ARGV[6] and redis.call("HEXISTS", KEYS[1], "state") == 0 then
  redis.call("HSET", KEYS[1], unpack(ARGV, 6))
  -- Of one that had the same id: readers would see its end, and it expires.
  redis.call("DEL", KEYS[2])
  is_new = true
end
local state, token, attempts, max_attempts, deaths, due_at, left_seconds, sealed, canvas,
  claimed_at, submitted_at, deadline_at, max_visual_tokens, priority, is_republished, queued_at,
  unreachable_since, num_unreachable, host_faults, waits = unpack(redis.call(
  "HMGET", KEYS[1],
  "state", "token", "attempts", "max_attempts", "deaths", "due_at", "left_seconds", "sealed", "canvas",
  "claimed_at", "submitted_at", "deadline_at", "max_visual_tokens", "priority", "is_republished",
  "queued_at", "unreachable_since", "num_unreachable", "host_faults", "waits"
))

local function claimed(attempt, since)
  return {
    "claimed", sealed or "null", canvas or "", attempt, max_attempts or "1", since,
    submitted_at or "", deadline_at or "", max_visual_tokens or "", unreachable_since or "", num_unreachable or "",
    host_faults or "", tonumber(waits) == tonumber(attempt) and "1" or "",
  }
end

local is_due = tonumber(due_at or 0) <= now
if not state then
  return { "unknown" }
elseif is_new and not is_due then
  -- Nobody's yet: the reaper publishes it when it is due.
  redis.call("ZADD", KEYS[3], due_at, ARGV[1])
  if (deadline_at or "") ~= "" then
    redis.call("ZADD", KEYS[5], deadline_at, ARGV[1])
  end
  return { "held" }
elseif state == "RUNNING" and token == ARGV[5] then
  return claimed(attempts, claimed_at)
elseif state == "RUNNING" or (state == "QUEUED" and not is_due) then
  return { "held" }
elseif state ~= "QUEUED" then
  let_go(KEYS[1], ARGV[1])
  return { "settled", redis.call("HGET", KEYS[1], "outcome"), canvas or "" }
end

deaths = tonumber(deaths or 0)
local attempt = tonumber(attempts or 0) + 1
local is_last = attempt >= tonumber(max_attempts or 1)
if ARGV[4] ~= "nothing" and (deaths >= 2 or deaths == 1 and is_last or host_faults) then
  return { "suspect" }
end
-- Whatever priority its message says: left among the queued, it would be taken from its worker as lost.
for i = 6, #KEYS do
  local published_at = redis.call("ZSCORE", KEYS[i], ARGV[1])
  if published_at then
    queued_at = published_at
    redis.call("ZREM", KEYS[i], ARGV[1])
    -- Of two messages the earlier may be the one that was taken: it does not tell how far the queue has come.
    if priority and not is_republished then
      redis.call("ZADD", KEYS[4], "GT", published_at, priority)
    end
  end
end
claimed_at = string.format("%.6f", now)
redis.call(
  "HSET", KEYS[1],
  "state", "RUNNING", "token", ARGV[5], "attempts", attempt, "worker", ARGV[2], "claimed_at", claimed_at,
  "queued_at", queued_at or claimed_at, "lease_seconds", ARGV[3]
)
if ARGV[4] == "company" and deaths == 1 then
  waits = attempt
  redis.call("HSET", KEYS[1], "waits", waits)
end
if left_seconds then
  -- A worker knows how to read it now: should it come back to the queue, its time with those that do not begins anew.
  redis.call("HDEL", KEYS[1], "left_seconds")
end
redis.call("ZADD", KEYS[3], now + ARGV[3], ARGV[1])
add_event(KEYS[2], { type = "stage", stage = "open", attempt = attempt, at = now })
return claimed(attempt, claimed_at)
