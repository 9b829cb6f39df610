-- RUNNING -> a final state, by the holder of the newest token only: outcome, last event, state, expiry, Celery's result
-- and the acknowledgement of the message in one move. Asked again by the same holder (its answer got lost on the way) it
-- says yes again and changes nothing. Several may ask for one holder: who wrote the outcome is who asks under its mark.
--
-- KEYS: 1 record (hash), 2 events (stream), 3 leases (sorted set), 4 dead letters (sorted set), 5 deadlines (sorted
-- set), 6 Celery's result (string, and a channel), 7 messages that are not acknowledged (hash), 8 the same by time (sorted
-- set), 9 ended jobs (stream), 10 the job's idempotency key (string), if it has one
-- ARGV: 1 job id, 2 token, 3 state, 4 outcome (JSON), 5 seconds until all of it expires, 6 seconds that a dead letter stays one,
-- 7 Celery's result (JSON), 8 most events of a stream, 9 delivery tag of its message or "", 10 mark of who asks, 11 stage, 12
-- code and 13 message of an attempt that did not answer the job, "" of one that did, 14.. events (JSON) that were not written
-- yet
-- Returns 1, 2 where another wrote the outcome for the same holder, or 0 where the lease was lost
local token, state, claimed_at, deadline_at, canvas, settler, attempt, worker = unpack(redis.call(
  "HMGET", KEYS[1], "token", "state", "claimed_at", "deadline_at", "canvas", "settler", "attempts", "worker"
))
if token ~= ARGV[2] then
  return 0
elseif state ~= "RUNNING" then
  return settler == ARGV[10] and 1 or 2
end

local now, ttl = clock(), tonumber(ARGV[5])
for i = 14, #ARGV do
  redis.call("XADD", KEYS[2], "MAXLEN", "~", ARGV[8], "*", "event", ARGV[i])
end
if ARGV[3] == "FAILED" then
  ttl = math.max(ttl, tonumber(ARGV[6]))
  redis.call("ZADD", KEYS[4], now, ARGV[1])
end
redis.call("HSET", KEYS[1], "settler", ARGV[10])
if ARGV[12] ~= "" then
  add_failed_attempt(KEYS[1], attempt, worker, claimed_at, now, ARGV[11], ARGV[12], ARGV[13])
end
finish(KEYS[1], KEYS[2], KEYS[9], ARGV[1], ARGV[3], ARGV[4], now, tonumber(claimed_at))
expire(KEYS[1], ARGV[1], ttl)
if canvas then
  -- Celery is to call something for it. Should nobody do so, a reaper publishes it once more.
  redis.call("ZADD", KEYS[3], now + 10, ARGV[1])
else
  redis.call("ZREM", KEYS[3], ARGV[1])
  if ARGV[9] ~= "" then
    redis.call("ZREM", KEYS[8], ARGV[9])
    redis.call("HDEL", KEYS[7], ARGV[9])
  end
end
if (deadline_at or "") ~= "" then
  redis.call("ZREM", KEYS[5], ARGV[1])
end
redis.call("SET", KEYS[6], ARGV[7], "EX", ARGV[5])
redis.call("PUBLISH", KEYS[6], ARGV[7])
if KEYS[10] and owns(KEYS[10], ARGV[1]) then
  redis.call("EXPIRE", KEYS[10], ARGV[5])
end
return 1
