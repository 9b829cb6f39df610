-- What waits and what runs: numbers, and of which kinds of job, from a look at so many of each.
--
-- KEYS: 1 leases (sorted set), 2 work (hash), 3 dead letters (sorted set), 4 messages that could not be read (stream), 5
-- what workers keep for how long (hash), 6 what records' keys begin with, 7.. queued jobs of each priority (sorted sets)
-- ARGV: 1 most jobs to look at of each set
-- Returns JSON: queues (a list of depth, oldest, kinds: name to number among those looked at), running (number), runs (a
-- list of kind, seconds), work (name to "weights seconds"), dead, quarantined
local now, most = clock(), tonumber(ARGV[1])

local function look(ids)
  local kinds = {}
  for _, id in ipairs(ids) do
    -- pcall: one that somebody put in the place of a record stops nothing, here and below.
    local kind = redis.pcall("HGET", KEYS[6] .. id, "kind")
    kind = type(kind) == "string" and kind or ""
    kinds[kind] = (kinds[kind] or 0) + 1
  end
  return kinds
end

local queues = {}
for i = 7, #KEYS do
  local oldest = redis.call("ZRANGE", KEYS[i], 0, 0, "WITHSCORES")[2]
  queues[#queues + 1] = {
    depth = redis.call("ZCARD", KEYS[i]),
    oldest = oldest and math.max(0, now - oldest) or 0,
    kinds = look(redis.call("ZRANDMEMBER", KEYS[i], most)),
  }
end

local runs, looked_at = {}, redis.call("ZRANDMEMBER", KEYS[1], most)
for _, id in ipairs(looked_at) do
  local state, kind, claimed_at = unpack(redis.pcall("HMGET", KEYS[6] .. id, "state", "kind", "claimed_at"))
  if state == "RUNNING" then
    runs[#runs + 1] = { kind or "", math.max(0, now - (tonumber(claimed_at) or now)) }
  end
end
local running = #looked_at > 0 and #runs * redis.call("ZCARD", KEYS[1]) / #looked_at or 0

local work, fields = {}, redis.call("HGETALL", KEYS[2])
for i = 1, #fields, 2 do
  work[fields[i]] = fields[i + 1]
end

local kept = redis.call("HGET", KEYS[5], "dead_letter")
return cjson.encode({
  queues = queues, running = running, runs = runs, work = work,
  dead = redis.call("ZCOUNT", KEYS[3], kept and now - kept or "-inf", "+inf"), quarantined = redis.call("XLEN", KEYS[4]),
})
