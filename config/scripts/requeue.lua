-- RUNNING -> QUEUED by the holder of the newest tokens, whose process ends. Each job's new message goes to the head of its
-- queue, the first job's foremost: others have waited less long. An attempt keeps its number, so that no two have the
-- same, and does not count: the job may have one more.
--
-- KEYS: 1 leases (sorted set), then for each job 2 record (hash), 3 events (stream), 4 messages of its priority (list)
-- ARGV: 1 seconds until a reaper publishes what nobody has taken, then for each job 2 its id, 3 token, 4 the new token,
-- 5 message
-- Returns for each job "queued", "cancelled" (the caller wants no other attempt, the lease stays) or "lost"
local now, answers = clock(), {}
for i = (#KEYS - 1) / 3, 1, -1 do
  local record_key, events, messages = unpack(KEYS, 3 * i - 1, 3 * i + 1)
  local job_id, token, new_token, message = unpack(ARGV, 4 * i - 2, 4 * i + 1)
  local state, newest, cancel_requested, attempt = unpack(redis.call(
    "HMGET", record_key, "state", "token", "cancel_requested", "attempts"
  ))
  if state ~= "RUNNING" or newest ~= token then
    answers[i] = "lost"
  elseif cancel_requested then
    answers[i] = "cancelled"
  else
    answers[i] = "queued"
    requeue(record_key, events, attempt, new_token, now, "given_back")
    redis.call("HINCRBY", record_key, "max_attempts", 1)
    redis.call("RPUSH", messages, message)
    -- Not among the queued by age: it overtakes older ones, whose messages would then seem lost.
    redis.call("ZADD", KEYS[1], now + ARGV[1], job_id)
  end
end
return answers
