-- RUNNING -> QUEUED by the holder of the newest tokens, whose process ends or whose host failed the job. Each job's new
-- message goes to the head of its queue: others have waited less long. Those that are given back stand there in the order in which they came into the queue,
-- whoever gave them back. An attempt keeps its number, so that no two have the same, and does not count: the job may have one
-- more.
--
-- KEYS: 1 leases (sorted set), 2 what records' keys begin with, then for each job 3 record (hash), 4 events (stream), 5
-- messages of its priority (list)
-- ARGV: 1 seconds until a reaper publishes what nobody has taken, then for each job 2 its id, 3 token, 4 the new token, 5
-- message, 6 the host's fault (JSON: stage, message) or "", 7 the place whose fault speaks against the job, or ""
-- Returns for each job "queued", "cancelled" (the caller wants no other attempt, the lease stays) or "lost"
local MOST_BEFORE = 256

-- When the job of a message came into the queue, if it was given back and nobody has taken it since.
local function given_back_since(message)
  local job_id = string.match(message, '"id": "([^"]+)"')
  -- pcall: in a stranger's message it may be the name of anything.
  local state, attempts, given_back, queued_at = unpack(redis.pcall(
    "HMGET", KEYS[2] .. (job_id or ""), "state", "attempts", "given_back", "queued_at"
  ))
  return state == "QUEUED" and given_back == attempts and tonumber(queued_at) or nil
end

local function put_in_order(messages, message, queued_at)
  local before = {}
  while #before < MOST_BEFORE do
    local next_one = redis.call("LINDEX", messages, -1)
    local since = next_one and given_back_since(next_one)
    if not since or since > queued_at then
      break
    end
    before[#before + 1] = redis.call("RPOP", messages)
  end
  redis.call("RPUSH", messages, message)
  for i = #before, 1, -1 do
    redis.call("RPUSH", messages, before[i])
  end
end

local now, answers, given_back = clock(), {}, {}
for i = 1, (#KEYS - 2) / 3 do
  local record_key, events, messages = unpack(KEYS, 3 * i, 3 * i + 2)
  local job_id, token, new_token, message, host_fault, place = unpack(ARGV, 6 * i - 4, 6 * i + 1)
  local state, newest, cancel_requested, attempt, queued_at, claimed_at, worker, host_faults = unpack(redis.call(
    "HMGET", record_key,
    "state", "token", "cancel_requested", "attempts", "queued_at", "claimed_at", "worker", "host_faults"
  ))
  if state ~= "RUNNING" or newest ~= token then
    answers[i] = "lost"
  elseif cancel_requested then
    answers[i] = "cancelled"
  else
    answers[i] = "queued"
    requeue(record_key, events, attempt, new_token, now, "given_back")
    if host_fault ~= "" then
      local met = cjson.decode(host_fault)
      add_failed_attempt(record_key, attempt, worker, claimed_at, now, met.stage, "HOST_FAULT", met.message)
    end
    if place ~= "" then
      local met = host_faults and cjson.decode(host_faults) or {}
      met[place] = (met[place] or 0) + 1
      redis.call("HSET", record_key, "host_faults", cjson.encode(met))
    end
    -- Of a job that a worker of 0.2 claimed it is not known.
    queued_at = queued_at or claimed_at
    redis.call("HSET", record_key, "given_back", attempt, "queued_at", queued_at)
    redis.call("HINCRBY", record_key, "max_attempts", 1)
    given_back[#given_back + 1] = { messages, message, tonumber(queued_at) }
    -- Not among the queued by age: it overtakes older ones, whose messages would then seem lost.
    redis.call("ZADD", KEYS[1], now + ARGV[1], job_id)
  end
end
-- The last first: then each goes to the very head, unless others came before it.
table.sort(given_back, function(one, other) return one[3] > other[3] end)
for _, each in ipairs(given_back) do
  put_in_order(unpack(each))
end
return answers
